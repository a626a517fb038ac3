"""What an edit of features is, and how several are applied.

1. Every edit maps the activations ``a`` of its features to ``a'`` at the tokens that it selects;
   elsewhere, and at excluded tokens, ``a' = a``. The kinds stand in ``edits.py``.
2. With the error kept, the tensor at the site becomes ``x + sum_i (a'_i - a_i) W_dec[i]`` and nothing
   else changes; with the error dropped it is the reconstruction of ``a'``.
3. Several edits apply in the given order, each to the result of the one before.

Cost: a gather and a scatter of the edited columns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Bool, Float

from gemmascope_plugin.arguments import feature_ids
from gemmascope_plugin.errors import EmptySelectionError, InputError, check_feature
from gemmascope_plugin.models.protocol import is_finite
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
        """This edit, checked, for the dictionary whose features are at ``acts_hook``."""
        if self.indices == ():
            raise EmptySelectionError(f"{type(self).__name__} names no feature")
        for index in self.indices or ():
            check_feature(index, d_sae, acts_hook.rsplit(".", 1)[0])
        return self


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


def amount_like(amount: Amount, acts: torch.Tensor, edit: Edit) -> torch.Tensor:
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
