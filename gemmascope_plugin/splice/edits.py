"""Feature edits: frozen values that say what becomes of chosen features at chosen positions.

Every edit maps the activations ``a`` of its features to ``a'``; with the error kept, the tensor at
the site becomes ``x + sum_i (a'_i - a_i) W_dec[i]`` and nothing else changes. Several edits apply in
the given order, each to the result of the one before.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float

from gemmascope_plugin.errors import EmptySelectionError, check_feature

Positions = int | slice | Sequence[int] | None


@dataclass(frozen=True, kw_only=True)
class Edit(ABC):
    """What becomes of some features. Subclasses say it in ``apply``."""

    features: int | Sequence[int]
    """Feature indices."""
    positions: Positions = None
    """Token positions, negative ones from the end; None for all. Excluded tokens never change."""
    sae: Any = None
    """Which dictionary is meant when several are spliced: the SAE object or its output hook name."""

    @abstractmethod
    def apply(self, acts: Float[torch.Tensor, "*tokens k"]) -> Float[torch.Tensor, "*tokens k"]:
        """The new activations of this edit's features."""

    @property
    def indices(self) -> tuple[int, ...]:
        """The features as a tuple."""
        return (self.features,) if isinstance(self.features, int) else tuple(self.features)

    def check(self, d_sae: int, where: str) -> None:
        """Refuses indices outside the dictionary.

        Raises:
            FeatureIndexError: An index is negative or too large.
            EmptySelectionError: No feature is named.
        """
        if not self.indices:
            raise EmptySelectionError(f"{type(self).__name__} names no feature")
        for index in self.indices:
            check_feature(index, d_sae, where)

    def where(self, n_pos: int) -> Bool[torch.Tensor, " pos"]:
        """True at the positions that the edit touches.

        Raises:
            EmptySelectionError: A position lies outside the prompt.
        """
        touched = torch.zeros(n_pos, dtype=torch.bool)
        if self.positions is None:
            return ~touched
        chosen = self.positions
        listed = [chosen] if isinstance(chosen, int) else chosen
        if not isinstance(listed, slice) and any(not -n_pos <= p < n_pos for p in listed):
            raise EmptySelectionError(
                f"Positions {self.positions} lie outside the prompt",
                exists=f"positions 0 to {n_pos - 1}",
            )
        touched[listed if isinstance(listed, slice) else list(listed)] = True
        return touched


@dataclass(frozen=True, kw_only=True)
class Ablate(Edit):
    """``a' = 0``."""

    def apply(self, acts: Float[torch.Tensor, "*tokens k"]) -> Float[torch.Tensor, "*tokens k"]:
        """Zeros."""
        return torch.zeros_like(acts)


@dataclass(frozen=True, kw_only=True)
class Clamp(Edit):
    """``a' = value``, active or not."""

    value: float

    def apply(self, acts: Float[torch.Tensor, "*tokens k"]) -> Float[torch.Tensor, "*tokens k"]:
        """The same value everywhere."""
        return torch.full_like(acts, self.value)


@dataclass(frozen=True, kw_only=True)
class Scale(Edit):
    """``a' = factor * a``."""

    factor: float

    def apply(self, acts: Float[torch.Tensor, "*tokens k"]) -> Float[torch.Tensor, "*tokens k"]:
        """The activations times the factor."""
        return acts * self.factor


@dataclass(frozen=True, kw_only=True)
class Add(Edit):
    """``a' = a + amount``, active or not; the result may be negative."""

    amount: float

    def apply(self, acts: Float[torch.Tensor, "*tokens k"]) -> Float[torch.Tensor, "*tokens k"]:
        """The activations plus the amount."""
        return acts + self.amount


def touched_features(edits: Sequence[Edit]) -> list[int]:
    """The features that any of the edits names, each once, sorted."""
    return sorted({i for edit in edits for i in edit.indices})


def apply_edits(
    edits: Sequence[Edit],
    acts: Float[torch.Tensor, "batch pos k"],
    features: Sequence[int],
) -> Float[torch.Tensor, "batch pos k"]:
    """Applies edits in order to the activations of ``features`` (column ``j`` is ``features[j]``)."""
    column = {feature: j for j, feature in enumerate(features)}
    for edit in edits:
        columns = torch.tensor([column[i] for i in edit.indices], device=acts.device)
        here = edit.where(acts.shape[1]).to(acts.device)[None, :, None]
        old = acts[..., columns]
        acts = acts.index_copy(-1, columns, torch.where(here, edit.apply(old), old))
    return acts
