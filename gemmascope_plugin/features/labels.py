"""Which known concept each feature stands for: the one with the best F1.

1. For a feature active on ``n_f`` tokens and a concept that holds on ``n_c``, both on ``n`` of them:
   ``F1 = 2 n / (n_f + n_c)``, precision ``n / n_f``, recall ``n / n_c``.
2. The feature stands for the concept with the best F1, the first of equals, where that reaches
   ``min_f1``.

``concepts.py`` asks the other way round: the best feature of each concept.

Cost: the meetings of active features with concepts (``cooccurrence.py``); no table of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float64, Int64

from gemmascope_plugin.features.cooccurrence import active_only, joint_counts, token_counts
from gemmascope_plugin.saes import SparseActs

MIN_F1 = 0.5
"""Below this a feature stands for nothing."""


@dataclass(frozen=True, eq=False)
class BestConcepts:
    """The best concept of each feature, whatever its F1."""

    concept: Int64[torch.Tensor, " d_sae"]
    """Its column; -1 for a feature that meets no concept."""
    f1: Float64[torch.Tensor, " d_sae"]
    precision: Float64[torch.Tensor, " d_sae"]
    """Share of the feature's tokens where the concept holds."""
    recall: Float64[torch.Tensor, " d_sae"]
    """Share of the concept's tokens where the feature is active."""

    def at_least(self, min_f1: float = MIN_F1) -> Int64[torch.Tensor, " d_sae"]:
        """What each feature stands for, -1 for nothing."""
        return torch.where(self.f1 >= min_f1, self.concept, -1)


def best_concepts(
    active: SparseActs, concepts: Bool[torch.Tensor, "token concept"]
) -> BestConcepts:
    """The concept with the best F1 of every feature.

    Args:
        active: Activations; a feature is active where they are positive.
        concepts: Where each concept holds, at the same tokens.
    """
    active = active_only(active)
    fires, n_holds = token_counts(active), concepts.sum(0)
    concept = torch.full_like(fires, -1)
    f1, precision, recall = (torch.zeros_like(fires, dtype=torch.float64) for _ in range(3))
    marks = SparseActs.from_dense(concepts.to(active.values.dtype))
    if not len(marks.indices):
        return BestConcepts(concept, f1, precision, recall)
    for features, both in joint_counts(active, marks):
        scores = 2 * both.double() / (fires[features, None] + n_holds)
        best = scores.nan_to_num().max(1)
        hit = both.gather(1, best.indices[:, None])[:, 0].double()
        concept[features] = torch.where(best.values > 0, best.indices, -1)
        f1[features] = best.values
        precision[features] = hit / fires[features]
        recall[features] = hit / n_holds[best.indices].clamp(min=1)
    return BestConcepts(concept, f1, precision, recall)
