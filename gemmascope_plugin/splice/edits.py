"""Feature edits: frozen values, each with its exact definition, and how several are applied.

Every edit maps the activations ``a`` of its features to ``a'`` at the tokens that it selects; elsewhere,
and at excluded tokens, ``a' = a``. With the error kept, the tensor at the site becomes
``x + sum_i (a'_i - a_i) W_dec[i]`` and nothing else changes; with the error dropped it is the
reconstruction of ``a'``. Several edits apply in the given order, each to the result of the one before.
Amounts are numbers, one number per feature, or tensors that broadcast against ``[batch, pos, k]``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float

from gemmascope_plugin.errors import (
    EmptySelectionError,
    InputError,
    ModelError,
    check_choice,
    check_feature,
)
from gemmascope_plugin.indices import feature_ids
from gemmascope_plugin.models.finite import is_finite
from gemmascope_plugin.saes import SparseActs
from gemmascope_plugin.splice.window import Positions, Rows, Window

Amount = int | float | Sequence[float] | Float[torch.Tensor, "..."]
Acts = Float[torch.Tensor, "batch pos k"]
"""Activations of the features of an edit."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Edit(ABC):
    """What becomes of some features. Subclasses say it in ``apply``."""

    features: Any
    """Feature indices, one or several, of any library's integers; None for every feature, which
    needs the whole encode."""
    positions: Positions = None
    """Token positions, absolute, negative ones from the end of the prompt; a slice; a boolean mask
    ``[pos]`` or ``[batch, pos]``; None for all."""
    rows: Rows = None
    """Rows of the batch; None for all."""
    layer: int | None = None
    """Layer whose features are meant, for crosscoders and cross-layer transcoders; elsewhere it may
    tell dictionaries apart."""
    sae: Any = None
    """Which dictionary is meant when several are spliced: the object, its name or its output hook."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "features", feature_ids(self.features))
        for field in fields(self):
            if str(field.type).endswith("Amount"):
                self._check_amount(field.name, getattr(self, field.name))

    def _check_amount(self, name: str, value: object) -> None:
        """Refuses what is not finite numbers; the word of ``Ablate(to=...)`` is judged by ``bind``."""
        shown = f"{type(self).__name__}({name}={value!r:.60})"
        try:
            numbers = None if isinstance(value, bool) else torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            numbers = None
        if numbers is None:
            if not (isinstance(value, str) and name == "to"):
                raise InputError(
                    f"{shown} is not a number",
                    exists="a number, one for each feature, or a tensor",
                )
        elif not is_finite(numbers):
            raise InputError(f"{shown} is not finite")

    @abstractmethod
    def apply(self, acts: Acts, window: Window) -> Acts:
        """The new activations of this edit's features, at every token."""

    @property
    def indices(self) -> tuple[int, ...] | None:
        """The features as a tuple; None for all."""
        ids = feature_ids(self.features)
        return (ids,) if isinstance(ids, int) else ids

    def bind(self, acts_hook: str, d_sae: int) -> Edit:
        """This edit, checked, for the dictionary whose features are at ``acts_hook``.

        Raises:
            FeatureIndexError: An index is negative or too large.
            EmptySelectionError: No feature is named.
        """
        if self.indices == ():
            raise EmptySelectionError(f"{type(self).__name__} names no feature")
        for index in self.indices or ():
            check_feature(index, d_sae, acts_hook.rsplit(".", 1)[0])
        return self


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
            return _amount(self.to, acts, self).expand_as(acts)
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
        return _amount(self.value, acts, self).expand_as(acts)


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
        return acts * _amount(self.factor, acts, self)


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
        return acts + _amount(self.amount, acts, self)


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


def touched_features(edits: Sequence[Edit]) -> list[int] | None:
    """The features that any of the edits names, each once, sorted; None for all."""
    named = [edit.indices for edit in edits]
    if any(indices is None for indices in named):
        return None
    return sorted({i for indices in named for i in indices or ()})


def apply_edits(edits: Sequence[Edit], acts: Acts, features: Sequence[int], window: Window) -> Acts:
    """Applies edits in order to the activations of ``features`` (column ``j`` is ``features[j]``)."""
    column = None if isinstance(features, range) else {f: j for j, f in enumerate(features)}
    for edit in edits:
        here = edited_tokens(edit, window)[..., None]
        if edit.indices is None:
            acts = torch.where(here, edit.apply(acts, window), acts)
            continue
        chosen = [i if column is None else column[i] for i in edit.indices]
        columns = torch.tensor(chosen, device=acts.device)
        old = acts[..., columns]
        new = edit.apply(old, window)
        acts = acts.index_copy(-1, columns, torch.where(here, new, old))
    return acts


def edited_tokens(edit: Edit, window: Window) -> Bool[torch.Tensor, "batch pos"]:
    """The kept tokens that an edit touches; none is an error, for it would silently do nothing."""
    here = window.select(edit.positions, edit.rows) & window.keep
    # A pass of one token, or of a part of the text, may well have nothing to edit.
    whole = window.start == 0 and window.stop == max(window.stop, window.horizon or 0)
    if whole and window.stop > 1 and not here.any():
        raise EmptySelectionError(
            f"{type(edit).__name__}(positions={_short(edit.positions)}) touches excluded tokens only",
            fix="other positions, or exclude=() to reach special tokens",
        )
    return here


def _short(positions: Positions) -> str:
    return "<mask>" if isinstance(positions, torch.Tensor) else repr(positions)


def _amount(amount: Amount, acts: torch.Tensor, edit: Edit) -> torch.Tensor:
    """A number or numbers as a tensor that broadcasts against the activations."""
    values = torch.as_tensor(amount, dtype=acts.dtype, device=acts.device)
    try:
        torch.broadcast_shapes(values.shape, acts.shape)
    except RuntimeError:
        fits = False
    else:
        fits = values.ndim <= acts.ndim
    if not fits:
        raise EmptySelectionError(
            f"{type(edit).__name__} has amounts of shape {list(values.shape)}",
            exists=f"activations of shape {list(acts.shape)}: batch, position, feature",
            fix="one number, one per feature, or a tensor that broadcasts against that shape",
        )
    return values
