"""Measures the bundled suite, and names its features by the grammar's known concepts.

1. Dictionaries are measured on held-out documents by ``measures.measure``, special tokens left out;
   ``delta_loss_share`` is the rise of the next-token loss as a share of the rise with zeros at the site.
2. Concepts are the grammar's roles and the identity of the word (``word=to``).
3. A feature's label is the concept with the best F1 (``features/labels.py``); precision is the share of
   the feature's tokens where the concept holds, recall the share of the concept's tokens where the
   feature is active.

Cost: that of ``measures.measure`` per dictionary, and the meetings of active features with concepts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int

from gemmascope_plugin.causes import Task
from gemmascope_plugin.causes.builtin import Split
from gemmascope_plugin.demo.tasks import TASK_NAMES, make_task
from gemmascope_plugin.features.cooccurrence import MIN_F1, best_concepts
from gemmascope_plugin.measures import measure
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.saes import SparseActs

EXCLUDE = ("bos", "eos", "pad")


@torch.no_grad()
def task_score(model: HookedModel, task: Task) -> float:
    """Share of prompts whose most probable next token is right; for years, the greater years' mass."""
    bound = task.bind(model)
    logits = bound.answer_logits(model, bound.clean)
    right = bound.metric.right
    assert right is not None, "the tasks of the suite have answers"
    if task.name == "years":
        return float(right.pick(logits.softmax(-1), 0.0).sum(-1).mean())
    return float((logits.argmax(-1) == right.ids[:, 0]).float().mean())


def task_scores(model: HookedModel, *, split: Split = "held_out", n: int = 256) -> dict[str, float]:
    """Every task's score."""
    return {name: task_score(model, make_task(name, split=split, n=n)) for name in TASK_NAMES}


def dictionary_scores(
    model: HookedModel, sae: Any, tokens: Int[torch.Tensor, "document pos"]
) -> dict[str, float]:
    """L0, FVU, share of the ablation loss, dead share of one dictionary."""
    measures = measure(model, sae, tokens, batch_size=128, n_positions=0)
    return {
        "l0": measures.l0,
        "fvu": measures.fvu,
        "delta_loss_share": measures.losses.share_of_zero,
        "dead_share": measures.dead_share,
        "loss": measures.losses.clean,
        "loss_spliced": measures.losses.spliced,
        "loss_zeroed": measures.losses.zeroed,
    }


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
