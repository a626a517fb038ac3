"""A causal question: clean prompts, corrupted prompts of the same length, and a metric."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int

from gemmascope_plugin.errors import ModelError, TaskError
from gemmascope_plugin.models import to_tokens
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.patching.metric import BoundMetric, Metric

Prompts = str | Sequence[str] | torch.Tensor

MIN_GAP = 1e-4
"""Smallest difference between the clean and the corrupted metric that can be divided by."""


@dataclass(frozen=True)
class Task:
    """Clean prompts, corrupted prompts, and what to ask of the logits."""

    clean: Prompts
    """Text or token ids ``[prompt, pos]``."""
    corrupt: Prompts
    """As many prompts, each as long in tokens as its clean partner."""
    metric: Metric
    """Higher is better; one answer per prompt."""
    name: str = "task"

    def __repr__(self) -> str:
        first = self.clean if isinstance(self.clean, str) else self.clean[0]
        return f"Task({self.name!r}, {len(self)} prompts, {self.metric.name}, first {first!r})"

    def __len__(self) -> int:
        return 1 if isinstance(self.clean, str) else len(self.clean)

    def first(self, n: int) -> Task:
        """The same task on its first ``n`` prompts."""
        wrong = None if self.metric.wrong is None else list(self.metric.wrong)[:n]
        metric = replace(self.metric, answer=list(self.metric.answer)[:n], wrong=wrong)
        clean, corrupt = (p if isinstance(p, str) else p[:n] for p in (self.clean, self.corrupt))
        return replace(self, clean=clean, corrupt=corrupt, metric=metric)

    def bind(self, model: HookedModel) -> BoundTask:
        """Token ids and a metric for this model, checked.

        Raises:
            TaskError: Prompts that differ in number or length, or that do not differ at all.
            EmptySelectionError: An empty prompt.
        """
        try:
            clean, corrupt = to_tokens(model, self.clean), to_tokens(model, self.corrupt)
        except ModelError as error:
            raise TaskError(
                f"The prompts of task {self.name!r} cannot be put in one batch ({error})",
                fix="prompts of one length in tokens",
            ) from error
        if clean.shape != corrupt.shape:
            raise TaskError(
                f"Clean prompts have shape {tuple(clean.shape)}, corrupted ones "
                f"{tuple(corrupt.shape)} (prompts, tokens)",
                fix="corrupted prompts of the same number and length in tokens",
            )
        if torch.equal(clean, corrupt):
            raise TaskError("Clean and corrupted prompts are the same tokens")
        if not -clean.shape[1] <= self.metric.position < clean.shape[1]:
            raise TaskError(
                f"Answer position {self.metric.position} lies outside prompts of "
                f"{clean.shape[1]} tokens"
            )
        return BoundTask(clean, corrupt, self.metric.bind(model, len(clean)), self.name)


@dataclass(frozen=True)
class BoundTask:
    """A task in the ids of one model."""

    clean: Int[torch.Tensor, "prompt pos"]
    corrupt: Int[torch.Tensor, "prompt pos"]
    metric: BoundMetric
    name: str

    def metric_values(self, clean: float, corrupt: float) -> dict[str, float]:
        """Both ends of the scale, checked to lie apart.

        Raises:
            TaskError: The metric hardly differs between clean and corrupted prompts.
        """
        if abs(clean - corrupt) < MIN_GAP:
            raise TaskError(
                f"The metric is {clean:.6f} on clean and {corrupt:.6f} on corrupted prompts; effects "
                "cannot be put on a scale between them",
                fix="a corruption that changes the answer, or another metric",
            )
        return {"metric_clean": clean, "metric_corrupt": corrupt}
