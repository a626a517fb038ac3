"""Names features by the grammar's known concepts, with measured precision and recall.

1. Concepts are the grammar's roles and the identity of the word (``word=to``).
2. A feature's label is the concept with the best F1 (``features/labels.py``); precision is the share of
   the feature's tokens where the concept holds, recall the share of the concept's tokens where the
   feature is active.

Cost: the meetings of active features with concepts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool

from gemmascope_plugin.features.labels import MIN_F1, best_concepts
from gemmascope_plugin.saes import SparseActs


@dataclass(frozen=True)
class Label:
    """What a feature stands for, and how well the description fits."""

    concept: str
    precision: float
    """Share of the tokens on which the feature is active where the concept holds."""
    recall: float
    """Share of the concept's tokens on which the feature is active."""
    f1: float

    def __str__(self) -> str:
        return f"{self.concept} (precision {self.precision:.2f}, recall {self.recall:.2f})"


def label_features(
    active: Bool[torch.Tensor, "token d_sae"],
    concepts: Bool[torch.Tensor, "token concept"],
    names: Sequence[str],
) -> dict[int, Label]:
    """The best concept of every feature whose F1 reaches ``MIN_F1``.

    Args:
        active: Where each feature fires.
        concepts: Where each concept holds, at the same tokens.
        names: One name per concept.
    """
    best = best_concepts(SparseActs.from_dense(active.float()), concepts)
    labels = {}
    for i in (best.f1 >= MIN_F1).nonzero().flatten().tolist():
        scores = (float(best.precision[i]), float(best.recall[i]), float(best.f1[i]))
        labels[i] = Label(names[int(best.concept[i])], *(round(score, 4) for score in scores))
    return labels


def labels_to_json(labels: dict[int, Label]) -> dict[str, list[Any]]:
    """Compact form: feature to ``[concept, precision, recall, f1]``."""
    return {str(i): [x.concept, x.precision, x.recall, x.f1] for i, x in labels.items()}


def labels_from_json(rows: dict[str, list[Any]]) -> dict[int, Label]:
    """Inverse of :func:`labels_to_json`."""
    return {int(i): Label(*row) for i, row in rows.items()}
