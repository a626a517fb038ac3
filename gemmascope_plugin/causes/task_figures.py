"""How well a model does a task: the metric, and whether it is right, prompt by prompt.

*Right* is a positive metric where it compares with wrong answers (``logit_diff``, ``margin``,
``probability`` and ``sequence_logprob`` with ``wrong``). *First* is an answer that is the likeliest token
of all; where a metric compares with nothing, that is right as well.

Cost: one pass over the clean prompts, some at a time, and the vocabulary at the asked positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float

from gemmascope_plugin.causes.metrics import LogitDiff, Margin, Probability
from gemmascope_plugin.causes.sequence import SequenceLogprob
from gemmascope_plugin.errors import TaskError
from gemmascope_plugin.models.protocol import HookedModel

BATCH = 16
"""Rows in one forward pass."""


@dataclass(frozen=True, eq=False)
class TaskFigures:
    """What a model makes of the clean prompts."""

    metric: Float[torch.Tensor, " prompt"]
    right: Bool[torch.Tensor, " prompt"] | None
    """None where the metric knows no right and wrong."""
    first: Bool[torch.Tensor, " prompt"] | None
    """None where no single token is the answer."""

    @property
    def mean(self) -> float:
        """Mean metric."""
        return float(self.metric.mean())

    @property
    def accuracy(self) -> float | None:
        """Share of prompts that are right."""
        return None if self.right is None else float(self.right.float().mean())

    @property
    def top1(self) -> float | None:
        """Share of prompts whose likeliest next token is an answer."""
        return None if self.first is None else float(self.first.float().mean())

    def __repr__(self) -> str:
        shares = [(self.accuracy, "right"), (self.top1, "first")]
        words = [f"{share:.2f} {word}" for share, word in shares if share is not None]
        return ", ".join([f"{self.mean:+.2f}", *words])


@torch.no_grad()
def figures_of(model: HookedModel, task: Any, *, batch: int = BATCH) -> TaskFigures:
    """Runs the clean prompts of a task."""
    bound, metrics, first = task.bind(model), [], []
    for part in bound.parts(batch):
        said = part.said(model, part.clean)
        metrics.append(part.metric.of_rows(said).cpu())
        if part.metric.right is not None:
            ids, mask = part.metric.right.ids, part.metric.right.mask
            first.append(((ids == said.top(1)[1]) & mask).any(-1).cpu())
    metric = bound.fold(torch.cat(metrics))
    top = torch.cat(first) if first else None
    return TaskFigures(metric, metric > 0 if _compares(task.asked) else top, top)


def right_prompts(model: HookedModel, task: Any) -> list[int]:
    """The prompts that a model gets right."""
    figures = figures_of(model, task)
    if figures.right is None:
        raise TaskError(
            f"{task.asked.name} does not say which prompts are right",
            fix="logit_diff, probability, margin, cross_entropy, or sequence_logprob with wrong=",
        )
    chosen = figures.right.nonzero().flatten().tolist()
    if not chosen:
        raise TaskError(
            f"The model gets none of the {len(task)} prompts of {task.name!r} right "
            f"(mean metric {figures.mean:+.3f})",
            fix="another task, or another model",
        )
    return chosen


def _compares(metric: Any) -> bool:
    """Whether a metric above zero means that the answer is preferred."""
    if isinstance(metric, LogitDiff | Margin):
        return True
    return isinstance(metric, Probability | SequenceLogprob) and metric.wrong is not None
