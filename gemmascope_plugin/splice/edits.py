"""The kinds of feature edits: frozen values, each with its exact definition.

``a`` are the activations of the edit's features at the tokens that it selects, ``a'`` what becomes of
them; what that makes of the model's tensor is in ``edit.py``. Amounts are numbers, one number per
feature, or tensors that broadcast against ``[batch, pos, k]``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float

from gemmascope_plugin.errors import EmptySelectionError, InputError, ModelError, check_choice
from gemmascope_plugin.models.finite import is_finite
from gemmascope_plugin.saes import SparseActs
from gemmascope_plugin.splice.edit import Edit, edited_tokens
from gemmascope_plugin.splice.window import Window

Amount = int | float | Sequence[float] | Float[torch.Tensor, "..."]


@dataclass(frozen=True, kw_only=True, eq=False)
class Ablate(Edit):
    """``a' = 0``, or the mean: ``a'_i = mean of a_i`` over kept tokens, or means that are given."""

    to: Literal["zero", "mean"] | Amount = "zero"
    """``"zero"``, ``"mean"`` or the reference means themselves, one per feature."""

    def bind(self, acts_hook: str, d_sae: int) -> Edit:
        """Also refuses an unknown word."""
        if isinstance(self.to, str):
            check_choice("ablation", self.to, ("zero", "mean"))
        return super().bind(acts_hook, d_sae)

    def apply(
        self, acts: Float[torch.Tensor, "batch pos k"], window: Window
    ) -> Float[torch.Tensor, "batch pos k"]:
        """Zeros or means."""
        if not isinstance(self.to, str):
            return _amount(self.to, acts, self).expand_as(acts)
        if self.to == "zero":
            return torch.zeros_like(acts)
        if window.start > 0:
            raise EmptySelectionError(
                "Ablate(to='mean') has no tokens to average during generation with a key-value cache",
                fix="Ablate(to=<means>) with numbers, one per feature",
            )
        kept = window.keep[..., None]
        return ((acts * kept).sum((0, 1)) / kept.sum().clamp(min=1)).expand_as(acts)


@dataclass(frozen=True, kw_only=True, eq=False)
class Clamp(Edit):
    """``a' = value``, active or not."""

    value: Amount

    def apply(
        self, acts: Float[torch.Tensor, "batch pos k"], window: Window
    ) -> Float[torch.Tensor, "batch pos k"]:
        """The same value everywhere."""
        return _amount(self.value, acts, self).expand_as(acts)


@dataclass(frozen=True, kw_only=True, eq=False)
class Scale(Edit):
    """``a' = factor * a``."""

    factor: Amount

    def apply(
        self, acts: Float[torch.Tensor, "batch pos k"], window: Window
    ) -> Float[torch.Tensor, "batch pos k"]:
        """The activations times the factor."""
        return acts * _amount(self.factor, acts, self)


@dataclass(frozen=True, kw_only=True, eq=False)
class Add(Edit):
    """``a' = a + amount``, active or not; the result may be negative."""

    amount: Amount

    def apply(
        self, acts: Float[torch.Tensor, "batch pos k"], window: Window
    ) -> Float[torch.Tensor, "batch pos k"]:
        """The activations plus the amount."""
        return acts + _amount(self.amount, acts, self)


@dataclass(frozen=True, kw_only=True, eq=False)
class Replace(Edit):
    """``a'[b, t] = source[b, t]``: feature patching, from the cache of another run.

    Tokens after the end of ``source``, as generation adds them, keep ``a``.
    """

    source: Mapping[str, torch.Tensor] | SparseActs | Float[torch.Tensor, "batch pos _"]
    """A cache of ``run_with_cache``, from which the entry of this edit's dictionary is taken, or
    activations ``[batch or 1, pos, d_sae]`` or ``[batch or 1, pos, k]``."""

    def bind(self, acts_hook: str, d_sae: int) -> Edit:
        """Takes the chosen features out of the source."""
        super().bind(acts_hook, d_sae)
        source: Any = self.source
        if isinstance(source, Mapping):
            check_choice("activation in the cache", acts_hook, source)
            source = source[acts_hook]
        if isinstance(source, SparseActs):
            source = source.to_dense()
        chosen = None if self.indices is None else list(self.indices)
        if chosen is not None and source.shape[-1] == d_sae:
            source = source[..., chosen]
        width = d_sae if chosen is None else len(chosen)
        if source.ndim != 3 or source.shape[-1] != width:
            raise EmptySelectionError(
                f"Replace has activations of shape {list(source.shape)}",
                exists=f"[batch or 1, pos, {width}] for {width} features of {acts_hook}",
            )
        return replace(self, source=source)

    def apply(
        self, acts: Float[torch.Tensor, "batch pos k"], window: Window
    ) -> Float[torch.Tensor, "batch pos k"]:
        """The source where it reaches, the activations elsewhere."""
        source: Any = self.source
        n_batch, n_pos = source.shape[:2]
        if n_pos < window.end or n_batch not in (1, window.batch):
            raise EmptySelectionError(
                f"Replace has activations of {n_batch} prompts with {n_pos} tokens",
                exists=f"a batch of {window.batch} with {window.end} tokens each",
            )
        if window.rows is not None:  # some rows of the batch, whose padding is no source
            source = source[list(window.rows) if n_batch > 1 else slice(None), : window.end]
        here = source[:, window.start : window.stop].to(acts)
        missing = acts.shape[1] - here.shape[1]
        if missing == acts.shape[1]:
            return acts
        here = here.expand(len(acts), -1, -1)
        return torch.cat([here, acts[:, acts.shape[1] - missing :]], dim=1) if missing else here


@dataclass(frozen=True, kw_only=True, eq=False)
class Custom(Edit):
    """``a' = fn(a)`` with any function of the activations ``[batch, pos, k]`` of the chosen features."""

    fn: Callable[[torch.Tensor], torch.Tensor]
    """Returns a tensor of the same shape; must not change its argument in place."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.fn):
            raise InputError(
                f"Custom(fn={self.fn!r:.60}) is not a function", fix="fn=lambda acts: acts * 2"
            )

    def apply(
        self, acts: Float[torch.Tensor, "batch pos k"], window: Window
    ) -> Float[torch.Tensor, "batch pos k"]:
        """What the function returns.

        Raises:
            ModelError: It returns something else than a tensor of the same shape, or makes numbers that
                are not finite.
        """
        new: Any = self.fn(acts)
        if not isinstance(new, torch.Tensor) or new.shape != acts.shape:
            got = list(new.shape) if isinstance(new, torch.Tensor) else type(new).__name__
            raise ModelError(
                f"The function of Custom returned {got}",
                exists=f"activations of shape {list(acts.shape)}",
                fix="return a tensor of the shape of the argument",
            )
        if not is_finite(new) and is_finite(acts):
            raise ModelError(
                "The function of Custom returned numbers that are not finite for activations that are"
            )
        return new


@dataclass(frozen=True, kw_only=True, eq=False)
class Project(Edit):
    """Orthogonal decomposition: ``y' = (I - P) y + factor * P y``, ``P`` onto ``W_dec[i]``.

    Works on the tensor at the output hook after all edits of activations, whatever the encoder makes of
    it: ``factor=0`` removes the direction, ``factor=2`` doubles what points along it. Several features
    are taken one after another. Neuronpedia's ``ORTHOGONAL_DECOMP``, for directions of any length.
    """

    factor: Amount

    def apply(
        self, acts: Float[torch.Tensor, "batch pos k"], window: Window
    ) -> Float[torch.Tensor, "batch pos k"]:
        """The coordinates along the directions times the factor."""
        return acts * _amount(self.factor, acts, self)

    def project(
        self,
        y: Float[torch.Tensor, "batch pos d_out"],
        W_dec: Float[torch.Tensor, "d_sae d_out"],
        window: Window,
    ) -> Float[torch.Tensor, "batch pos d_out"]:
        """The tensor with its components along the chosen rows of ``W_dec`` multiplied."""
        here = edited_tokens(self, window).to(y.device)[..., None]
        for index in self.indices or range(len(W_dec)):
            direction = W_dec[index].to(y.device, y.dtype)
            along = (y @ direction / direction.pow(2).sum().clamp(min=1e-30))[..., None]
            y = torch.where(here, y + (self.apply(along, window) - along) * direction, y)
        return y


def _amount(amount: Amount, acts: torch.Tensor, edit: Edit) -> torch.Tensor:
    """A number or numbers as a tensor that broadcasts against the activations."""
    given = torch.as_tensor(amount, dtype=acts.dtype, device=acts.device)
    try:
        torch.broadcast_shapes(given.shape, acts.shape)
    except RuntimeError:
        fits = False
    else:
        fits = given.ndim <= acts.ndim
    if not fits:
        raise EmptySelectionError(
            f"{type(edit).__name__} has amounts of shape {list(given.shape)}",
            exists=f"activations of shape {list(acts.shape)}: batch, position, feature",
            fix="one number, one per feature, or a tensor that broadcasts against that shape",
        )
    return given
