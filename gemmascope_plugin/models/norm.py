"""The RMS norms of a Gemma block: their gains, and the norm as a function with both derivatives.

``y = gain * x / s``, ``s = sqrt(mean(x^2) + eps)``, and with ``x_hat = x / s``

1. forward: ``J v = gain * (v - x_hat * mean(x_hat * v)) / s``;
2. backward: ``J^T u = (gain * u - x_hat * mean(x_hat * gain * u)) / s``.

It runs no hooks, unlike the model's own module. Cost: a few multiplications per entry.

A gain is ``w`` on ``HookedTransformer`` and ``1 + w`` on the bridge. A model whose norms were folded has
moved the gain into the weights after the norm: an error that says how to load it instead, never a guess.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float

from gemmascope_plugin.errors import MissingHookError
from gemmascope_plugin.models.finite import wide
from gemmascope_plugin.models.protocol import HookedModel


@dataclass(frozen=True, eq=False)
class Norm:
    """An RMS norm with the gain that it really multiplies by."""

    gain: Float[torch.Tensor, " d_model"] | None
    """``1 + w`` in the words of Gemma's checkpoints; None where it is one, or folded away."""
    eps: float

    def scale(self, x: Float[torch.Tensor, "*axes d_model"]) -> Float[torch.Tensor, "*axes 1"]:
        """``s``, at least in float32."""
        return (wide(x).pow(2).mean(-1, keepdim=True) + self.eps).sqrt()

    def __call__(
        self, x: Float[torch.Tensor, "*axes d_model"]
    ) -> Float[torch.Tensor, "*axes d_model"]:
        """``gain * x / s`` in the type of ``x``."""
        return self._gained(wide(x) / self.scale(x)).to(x.dtype)

    def jvp(
        self, x: Float[torch.Tensor, "*axes d_model"], v: Float[torch.Tensor, "*more d_model"]
    ) -> Float[torch.Tensor, "*more d_model"]:
        """How the output at ``x`` moves when the input moves by ``v``; ``v`` may have more axes."""
        s = self.scale(x)
        x_hat, move = wide(x) / s, wide(v)
        return self._gained((move - x_hat * (x_hat * move).mean(-1, keepdim=True)) / s).to(v.dtype)

    def vjp(
        self, x: Float[torch.Tensor, "*axes d_model"], u: Float[torch.Tensor, "*more d_model"]
    ) -> Float[torch.Tensor, "*more d_model"]:
        """The gradient at the input, from the gradient ``u`` at the output."""
        s = self.scale(x)
        x_hat, pull = wide(x) / s, self._gained(wide(u))
        return ((pull - x_hat * (x_hat * pull).mean(-1, keepdim=True)) / s).to(u.dtype)

    def frozen(
        self, x: Float[torch.Tensor, "*axes d_model"], v: Float[torch.Tensor, "*more d_model"]
    ) -> Float[torch.Tensor, "*more d_model"]:
        """``gain * v / s`` with the scale of ``x``: the share of ``v`` in the output."""
        return self._gained(wide(v) / self.scale(x)).to(v.dtype)

    def _gained(self, x: Float[torch.Tensor, "*axes d"]) -> Float[torch.Tensor, "*axes d"]:
        return x if self.gain is None else x * self.gain.to(x.device, x.dtype)


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
    """The gain of the norm before the MLP, ``1 + w`` in the words of Gemma's checkpoints."""
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


def gain_of(model: HookedModel, norm: object) -> Float[torch.Tensor, " d_model"] | None:
    """What a norm really multiplies by; None where folding took its gain away."""
    weight = _weight(norm)
    return None if weight is None else _gain(model, weight)


def _norm(model: HookedModel, layer: int) -> Any:
    return getattr(model.blocks[layer], "ln2", None)


def _weight(norm: object) -> torch.Tensor | None:
    """The norm's parameter; None where folding took it away."""
    # The bridge's own ``w`` is a copy that folding leaves as it was; ``weight`` is what it uses.
    weight = getattr(norm, "weight", None)
    return weight if weight is not None else getattr(norm, "w", None)


def _gain(model: HookedModel, weight: torch.Tensor) -> Float[torch.Tensor, " d_model"]:
    return weight.detach() + float(getattr(model.cfg, "rmsnorm_uses_offset", False))
