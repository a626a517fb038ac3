"""One tensor per site, on every model class and folding: where to attach and what to make of it.

1. A hook that the model has is read as it fires.
2. ``blocks.L.mlp.hook_in``, the output of the norm before the MLP *with* its gain (what the
   transcoders of Gemma Scope 2 read), does not exist on ``HookedTransformer``: there it is
   ``ln2.hook_normalized`` times the gain. The gain is ``w`` there and ``1 + w`` on the bridge.
3. A model whose norms were folded has moved the gain into the MLP. That tensor can no longer be read
   in it: an error that says how to load the model instead, never a guess. ``ln2.hook_normalized``,
   which Gemma Scope 1 reads, is the same in every folding.

Cost: one multiplication per token and dimension where a gain is applied.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Shaped

from gemmascope_plugin.errors import MissingHookError
from gemmascope_plugin.models.points import hook_point, hook_points, n_layers
from gemmascope_plugin.models.protocol import HookedModel

_GAINED = re.compile(r"blocks\.(\d+)\.(?:mlp\.hook_in|ln2\.hook_out)")
"""Names of the norm's output with gain; two hook points with one tensor on the bridge."""


@dataclass(frozen=True)
class Reading:
    """How to get the tensor of a site: attach to ``hook`` and call this with what fires there."""

    name: str
    """The tensor, by the name that users know."""
    hook: str
    """Hook point of the model to attach to."""
    gain: Float[torch.Tensor, " d_model"] | None = None
    """What the tensor at ``hook`` is multiplied by; None for nothing."""

    def __call__(self, x: Shaped[torch.Tensor, "*axes"]) -> Shaped[torch.Tensor, "*axes"]:
        """The tensor of the site, from the one at ``hook``."""
        return x if self.gain is None else x * self.gain.to(x.device, x.dtype)

    def detached(self, x: Shaped[torch.Tensor, "*axes"]) -> Shaped[torch.Tensor, "*axes"]:
        """The same without a gradient."""
        return self(x.detach())


def reading(model: HookedModel, name: str, points: Mapping[str, Any] | None = None) -> Reading:
    """How to read the tensor called ``name`` in this model.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``.
        name: Hook name, as a dictionary or a user says it.
        points: ``model.hook_dict``, from callers who ask often.

    Raises:
        MissingHookError: The model has no such tensor, or folding has taken its gain away.
    """
    points = hook_points(model) if points is None else points
    layer = gained_layer(name)
    if layer is None or layer >= n_layers(model):
        hook_point(model, name, points)
        return Reading(name, name)
    gain = norm_gain(model, layer)
    if name in points:
        return Reading(name, name)
    return Reading(name, before_gain(model, layer), gain)


def gained_layer(name: str) -> int | None:
    """The layer, if the name means a norm's output with its gain; else None."""
    match = _GAINED.fullmatch(name)
    return int(match[1]) if match else None


def before_gain(model: HookedModel, layer: int) -> str:
    """The hook with the norm's output before its gain, the same in every folding.

    Raises:
        MissingHookError: The block has no such norm.
    """
    name = f"blocks.{layer}.ln2.hook_normalized"
    hook_point(model, name)
    return name


def is_folded(model: HookedModel, layer: int) -> bool:
    """Whether the gain of the norm before the MLP was folded into the MLP's weights."""
    norm = _norm(model, layer)
    if norm is None:
        return False
    weight = _weight(norm)
    if weight is None:
        return True
    # Folding on the bridge keeps the norm and makes its gain exactly one.
    return getattr(model, "_weights_processed", False) and bool((_gain(model, weight) == 1).all())


def norm_gain(model: HookedModel, layer: int) -> Float[torch.Tensor, " d_model"]:
    """The gain of the norm before the MLP, ``1 + w`` in the words of Gemma's checkpoints.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``.
        layer: Layer index.

    Raises:
        MissingHookError: The block has no such norm, or its gain was folded into the MLP.
    """
    norm = _norm(model, layer)
    hook = f"blocks.{layer}.mlp.hook_in"
    if norm is None or getattr(norm, "b", None) is not None:
        raise MissingHookError(
            f"The block has no RMS norm before its MLP, so the model has no {hook!r}",
            fix="a Gemma model",
        )
    weight = _weight(norm)
    if weight is None or is_folded(model, layer):
        raise MissingHookError(
            f"The norms of this model were folded, so the gain that belongs to {hook!r} is gone",
            exists=f"'blocks.{layer}.ln2.hook_normalized', the same tensor without the gain",
            fix="gemmascope_plugin.load_model(name), which folds nothing, "
            "or HookedTransformer.from_pretrained(name, fold_ln=False)",
        )
    return _gain(model, weight)


def gain_of(model: HookedModel, norm: Any) -> Float[torch.Tensor, " d_model"] | None:
    """What a norm really multiplies by; None where folding took its gain away."""
    weight = _weight(norm)
    return None if weight is None else _gain(model, weight)


def _norm(model: Any, layer: int) -> Any:
    return getattr(model.blocks[layer], "ln2", None)


def _weight(norm: Any) -> torch.Tensor | None:
    """The norm's parameter; None where folding took it away."""
    # The bridge's own ``w`` is a copy that folding leaves as it was; ``weight`` is what it uses.
    found = getattr(norm, "weight", None)
    return found if found is not None else getattr(norm, "w", None)


def _gain(model: HookedModel, weight: torch.Tensor) -> Float[torch.Tensor, " d_model"]:
    return weight.detach() + float(getattr(model.cfg, "rmsnorm_uses_offset", False))
