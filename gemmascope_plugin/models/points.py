"""Hook points by name, the same names on both model classes, and the RMS norms that lie between them.

1. A name is looked up in ``hook_dict``, which holds aliases on the bridge as well.
2. A hook that exists but is switched off by a config flag is refused: attached to it, a function
   would silently never run.
3. Attention head outputs come as ``[batch, pos, head, d_head]`` and are flattened for dictionaries.
4. A site has one tensor, on every model class and folding (:func:`reading`). ``blocks.L.mlp.hook_in``,
   the output of the norm before the MLP *with* its gain (what the transcoders of Gemma Scope 2 read),
   does not exist on ``HookedTransformer``: there it is ``ln2.hook_normalized`` times the gain
   (:func:`norm_gain`). ``ln2.hook_normalized``, which Gemma Scope 1 reads, is the same in every
   folding.
5. A gain is ``w`` on ``HookedTransformer`` and ``1 + w`` on the bridge. A model whose norms were
   folded has moved the gain into the weights after the norm: an error that says how to load it
   instead, never a guess.
6. A ``Norm`` is a norm as a function, with both derivatives; it runs no hooks, unlike the model's
   module. ``y = gain * x / s``, ``s = sqrt(mean(x^2) + eps)``, and with ``x_hat = x / s``

   * forward: ``J v = gain * (v - x_hat * mean(x_hat * v)) / s``;
   * backward: ``J^T u = (gain * u - x_hat * mean(x_hat * gain * u)) / s``.

Cost: one multiplication per token and dimension where a gain is applied, a few for a norm.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Shaped

from gemmascope_plugin.errors import MissingHookError, nearest
from gemmascope_plugin.models.protocol import HookedModel, wide

_GATED = {
    "hook_mlp_in": "use_hook_mlp_in",
    "hook_q_input": "use_split_qkv_input",
    "hook_k_input": "use_split_qkv_input",
    "hook_v_input": "use_split_qkv_input",
    "hook_result": "use_attn_result",
    "hook_attn_in": "use_attn_in",
}
"""Last part of a hook name to the config flag that must be on for it to fire."""

_D_MODEL_HOOKS = (
    "hook_embed",
    "hook_resid_pre",
    "hook_resid_mid",
    "hook_resid_post",
    "hook_attn_out",
    "hook_mlp_out",
    "ln2.hook_normalized",
    "ln2.hook_out",
    "mlp.hook_in",
)


_TABLES: weakref.WeakKeyDictionary[Any, tuple[Any, dict[str, Any]]] = weakref.WeakKeyDictionary()


def hook_points(model: HookedModel) -> Mapping[str, Any]:
    """``model.hook_dict``, without making it anew as the bridge does, which takes milliseconds.

    It is made again once the bridge has other points, or other names for them.
    """
    registry = getattr(model, "_hook_registry", None)
    if registry is None:
        return model.hook_dict
    state = (len(registry), getattr(model, "compatibility_mode", None))
    entry = _TABLES.get(model)
    if entry is None or entry[0] != state:
        table = model.hook_dict
        entry = _TABLES[model] = ((len(registry), state[1]), table)
    return entry[1]


def hook_names(model: HookedModel) -> list[str]:
    """All hook names of the model, aliases included."""
    return list(hook_points(model))


def hook_point(model: HookedModel, name: str, points: Mapping[str, Any] | None = None) -> Any:
    """The hook point called ``name``.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``.
        name: Its name.
        points: ``model.hook_dict``, where the caller has it.

    Raises:
        MissingHookError: The model has no such hook, or a flag keeps it from firing.
    """
    points = hook_points(model) if points is None else points
    if name not in points:
        raise MissingHookError(
            f"The model has no hook {name!r}",
            exists=f"{n_layers(model)} layers, {len(points)} hooks",
            nearest=nearest(name, points),
            fix="list(model.hook_dict) shows every name",
        )
    flag = _GATED.get(name.rsplit(".", 1)[-1])
    if flag and not getattr(model.cfg, flag, False):
        raise MissingHookError(
            f"The hook {name!r} exists but never fires while {flag} is off",
            fix=f"model.set_{flag}(True), or read another hook",
        )
    return points[name]


def can_restart(model: HookedModel) -> bool:
    """Whether nothing but the model itself takes part in its passes.

    Somebody's hooks, those of dictionaries among them, may need layers that would be left out.
    """
    points = {id(point): point for point in hook_points(model).values()}.values()
    return not any(point.fwd_hooks for point in points)


def n_layers(model: HookedModel) -> int:
    """Number of transformer blocks."""
    return int(model.cfg.n_layers)


def n_heads(model: HookedModel) -> int:
    """Number of query heads per layer."""
    return int(model.cfg.n_heads)


def lowest_layer(*names: str) -> int:
    """The lowest layer that has one of the hooks; 0 for hooks outside the layers."""
    parts = [name.split(".") for name in names]
    return min(int(part[1]) if part[0] == "blocks" else 0 for part in parts)


def width_at(model: HookedModel, name: str) -> int | None:
    """Last dimension of the tensor at a dictionary site, heads flattened; None when not known."""
    if name.endswith("attn.hook_z"):
        return n_heads(model) * int(model.cfg.d_head)
    if name.endswith(_D_MODEL_HOOKS):
        return int(model.cfg.d_model)
    return None


def flatten_heads(x: torch.Tensor) -> Float[torch.Tensor, "batch pos d_in"]:
    """``[batch, pos, head, d_head]`` to ``[batch, pos, head * d_head]``; 3-D tensors pass through."""
    return rearrange(x, "b p h d -> b p (h d)") if x.ndim == 4 else x


def restore_heads(
    x: Float[torch.Tensor, "batch pos d_in"], like: torch.Tensor
) -> Float[torch.Tensor, "batch pos ..."]:
    """Inverse of :func:`flatten_heads`; ``like`` tells the shape to return to."""
    return x.reshape(like.shape)


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
    """How to read the tensor called ``name`` in this model; folding may have taken its gain away."""
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
    """The hook with the norm's output before its gain, the same in every folding."""
    name = f"blocks.{layer}.ln2.hook_normalized"
    hook_point(model, name)
    return name


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


def norm_of(model: HookedModel, module: object) -> Norm:
    """A norm of the model as a function; without a gain where folding took it away."""
    weight, eps = _weight(module), getattr(module, "eps", None)
    gain = None if weight is None else _gain(model, weight)
    return Norm(gain, float(model.cfg.eps if eps is None else eps))


def _norm(model: HookedModel, layer: int) -> Any:
    return getattr(model.blocks[layer], "ln2", None)


def _weight(norm: object) -> torch.Tensor | None:
    """The norm's parameter; None where folding took it away."""
    # The bridge's own ``w`` is a copy that folding leaves as it was; ``weight`` is what it uses.
    weight = getattr(norm, "weight", None)
    return weight if weight is not None else getattr(norm, "w", None)


def _gain(model: HookedModel, weight: torch.Tensor) -> Float[torch.Tensor, " d_model"]:
    return weight.detach() + float(getattr(model.cfg, "rmsnorm_uses_offset", False))
