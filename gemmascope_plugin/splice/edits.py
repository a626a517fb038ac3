"""The kinds of feature edits: frozen values, each with its exact definition.

Amounts are numbers, one number per feature, or tensors that broadcast against ``[batch, pos, k]``. How
edits are applied stands in ``edit.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float

from gemmascope_plugin.errors import EmptySelectionError, InputError, ModelError, check_choice
from gemmascope_plugin.models.protocol import is_finite
from gemmascope_plugin.saes import SparseActs
from gemmascope_plugin.splice.edit import Acts, Amount, Edit, amount_like, edited_tokens
from gemmascope_plugin.splice.window import Window


@dataclass(frozen=True, kw_only=True, eq=False)
class Ablate(Edit):
    """``a' = 0``, or the mean: ``a'_i = mean of a_i`` over kept tokens, or given means.

    Example:
        >>> suite = gs.tiny()
        >>> task, sae = suite.task("ioi", n=8), suite.load("res", 2)
        >>> feature = suite.feature(sae, "next_is_indirect_object")
        >>> edit = gs.Ablate(features=feature)
        >>> with gs.splice(suite.model, sae, edits=edit) as spliced:
        ...     logits = spliced(task.clean)
        >>> round(float(task.bind(suite.model).metric(logits).mean()), 2)
        7.2
    """

    to: Literal["zero", "mean"] | Amount = "zero"
    """``"zero"``, ``"mean"`` or the reference means themselves, one per feature."""

    def bind(self, acts_hook: str, d_sae: int) -> Edit:
        """Also refuses an unknown word."""
        if isinstance(self.to, str):
            check_choice("ablation", self.to, ("zero", "mean"))
        return super().bind(acts_hook, d_sae)

    def apply(self, acts: Acts, window: Window) -> Acts:
        """Zeros or means."""
        if not isinstance(self.to, str):
            return amount_like(self.to, acts, self).expand_as(acts)
        if self.to == "zero":
            return torch.zeros_like(acts)
        if window.start > 0:
            raise EmptySelectionError(
                "Ablate(to='mean') has no tokens to average during generation with a key-value cache",
                fix="Ablate(to=<means>) with numbers, one per feature",
            )
        keep = window.keep[..., None]
        return ((acts * keep).sum((0, 1)) / keep.sum().clamp(min=1)).expand_as(acts)


@dataclass(frozen=True, kw_only=True, eq=False)
class Clamp(Edit):
    """``a' = value``, active or not.

    Example:
        >>> suite = gs.tiny()
        >>> sae = suite.load("res", 2)
        >>> feature = suite.feature(sae, "next_is_singular_verb")
        >>> edit = gs.Clamp(features=feature, value=16.0, positions=-1)
        >>> with gs.splice(suite.model, sae, edits=edit) as spliced:
        ...     logits = spliced("today the keys near the cabinet")
        >>> suite.model.tokenizer.decode(logits[0, -1].argmax())
        'is'
    """

    value: Amount

    def apply(self, acts: Acts, window: Window) -> Acts:
        """The same value everywhere."""
        return amount_like(self.value, acts, self).expand_as(acts)


@dataclass(frozen=True, kw_only=True, eq=False)
class Scale(Edit):
    """``a' = factor * a``.

    Example:
        >>> suite = gs.tiny()
        >>> task, sae = suite.task("ioi", n=8), suite.load("res", 2)
        >>> feature = suite.feature(sae, "next_is_indirect_object")
        >>> edit = gs.Scale(features=feature, factor=0.5)
        >>> with gs.splice(suite.model, sae, edits=edit) as spliced:
        ...     logits = spliced(task.clean)
        >>> round(float(task.bind(suite.model).metric(logits).mean()), 2)
        9.09
    """

    factor: Amount

    def apply(self, acts: Acts, window: Window) -> Acts:
        """The activations times the factor."""
        return acts * amount_like(self.factor, acts, self)


@dataclass(frozen=True, kw_only=True, eq=False)
class Add(Edit):
    """``a' = a + amount``, active or not; the result may be negative.

    Example:
        >>> suite = gs.tiny()
        >>> sae = suite.load("res", 2)
        >>> feature = suite.feature(sae, "next_is_singular_verb")
        >>> edit = gs.Add(features=feature, amount=16.0)
        >>> with gs.splice(suite.model, sae, edits=edit) as spliced:
        ...     logits = spliced("today the keys near the cabinet")
        >>> suite.model.tokenizer.decode(logits[0, -1].argmax())
        'is'
    """

    amount: Amount

    def apply(self, acts: Acts, window: Window) -> Acts:
        """The activations plus the amount."""
        return acts + amount_like(self.amount, acts, self)


@dataclass(frozen=True, kw_only=True, eq=False)
class Replace(Edit):
    """``a'[b, t] = source[b, t]``: feature patching, from the cache of another run.

    Tokens after the end of ``source``, as generation adds them, keep ``a``.

    Example:
        >>> suite = gs.tiny()
        >>> sae = suite.load("res", 2)
        >>> with gs.splice(suite.model, sae) as spliced:
        ...     _, other = spliced.run_with_cache("today the key near the cabinet")
        >>> edit = gs.Replace(features=None, source=other)
        >>> with gs.splice(suite.model, sae, edits=edit) as spliced:
        ...     logits = spliced("today the keys near the cabinet")
        >>> suite.model.tokenizer.decode(logits[0, -1].argmax())
        'is'
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

    def apply(self, acts: Acts, window: Window) -> Acts:
        """The source where it reaches, the activations elsewhere."""
        source: Any = self.source
        n_batch, n_pos = source.shape[:2]
        if n_pos < window.end or n_batch not in (1, window.batch):
            raise EmptySelectionError(
                f"Replace has activations of {n_batch} prompts with {n_pos} tokens",
                exists=f"a batch of {window.batch} with {window.end} tokens each",
            )
        if window.rows is not None:  # some rows of the batch, whose padding is not a source
            source = source[list(window.rows) if n_batch > 1 else slice(None), : window.end]
        here = source[:, window.start : window.stop].to(acts)
        missing = acts.shape[1] - here.shape[1]
        if missing == acts.shape[1]:
            return acts
        here = here.expand(len(acts), -1, -1)
        return torch.cat([here, acts[:, acts.shape[1] - missing :]], dim=1) if missing else here


@dataclass(frozen=True, kw_only=True, eq=False)
class Custom(Edit):
    """``a' = fn(a)`` with any function of the activations ``[batch, pos, k]`` of the chosen features.

    Example:
        >>> suite = gs.tiny()
        >>> task, sae = suite.task("ioi", n=8), suite.load("res", 2)
        >>> feature = suite.feature(sae, "next_is_indirect_object")
        >>> edit = gs.Custom(features=feature, fn=lambda acts: acts.clamp(max=1.0))
        >>> with gs.splice(suite.model, sae, edits=edit) as spliced:
        ...     logits = spliced(task.clean)
        >>> round(float(task.bind(suite.model).metric(logits).mean()), 2)
        7.75
    """

    fn: Callable[[torch.Tensor], torch.Tensor]
    """Returns a tensor of the same shape; must not change its argument in place."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.fn):
            raise InputError(
                f"Custom(fn={self.fn!r:.60}) is not a function", fix="fn=lambda acts: acts * 2"
            )

    def apply(self, acts: Acts, window: Window) -> Acts:
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

    Example:
        >>> suite = gs.tiny()
        >>> task, sae = suite.task("ioi", n=8), suite.load("res", 2)
        >>> feature = suite.feature(sae, "next_is_indirect_object")
        >>> edit = gs.Project(features=feature, factor=0.0)
        >>> with gs.splice(suite.model, sae, edits=edit) as spliced:
        ...     logits = spliced(task.clean)
        >>> round(float(task.bind(suite.model).metric(logits).mean()), 2)
        7.08
    """

    factor: Amount

    def apply(self, acts: Acts, window: Window) -> Acts:
        """The coordinates along the directions times the factor."""
        return acts * amount_like(self.factor, acts, self)

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
