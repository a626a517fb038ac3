"""A task in the ids of one model: its metric under any run, and how well the model does it.

1. ``BoundTask.measure`` runs the model and keeps the end of the residual stream at the positions that are
   asked about; the metric makes the logits that it needs.
2. *Right* is a positive metric where it compares with wrong answers (``logit_diff``, ``margin``,
   ``probability`` and ``sequence_logprob`` with ``wrong``). *First* is an answer that is the likeliest
   token of all; where a metric compares with nothing, that is right as well.

Cost: of figures, one pass over the clean prompts, some at a time, and the vocabulary at the asked
positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped

from gemmascope_plugin.causes.metric import BoundMetric, Metric
from gemmascope_plugin.causes.metrics import LogitDiff, Margin, Probability
from gemmascope_plugin.causes.sequence import BoundSequences, SequenceLogprob
from gemmascope_plugin.errors import TaskError
from gemmascope_plugin.models.asked import read_out
from gemmascope_plugin.models.protocol import HookedModel, check_finite, weights_of
from gemmascope_plugin.models.readout import Readout
from gemmascope_plugin.models.record import hooking
from gemmascope_plugin.types import Direction

Hooks = Sequence[tuple[str, Callable[..., Any]]]

MIN_GAP = 1e-4
"""Smallest difference between the clean and the corrupted metric that can be divided by."""
BATCH = 16
"""Rows in one forward pass of figures."""


@dataclass(frozen=True)
class BoundTask:
    """A task in the ids of one model.

    Rows are prompts; of answers of several tokens a prompt has one row or two (``sequence.py``).
    """

    clean: Int[torch.Tensor, "prompt pos"]
    corrupt: Int[torch.Tensor, "prompt pos"]
    lengths: Int[torch.Tensor, " prompt"]
    """Tokens of each prompt; what follows is padding."""
    metric: BoundMetric
    name: str

    def __len__(self) -> int:
        return len(self.clean)

    @property
    def n_prompts(self) -> int:
        """Prompts of the task, whatever number of rows each has become."""
        return len(self) // self.metric.rows_per_prompt

    @property
    def prompt_lengths(self) -> Int[torch.Tensor, " prompt"]:
        """Tokens of each row without an answer that stands behind it."""
        metric = self.metric
        return metric.prompt_lengths if isinstance(metric, BoundSequences) else self.lengths

    def fold(self, values: Shaped[torch.Tensor, "*any row"]) -> Shaped[torch.Tensor, "*any prompt"]:
        """Values of rows, along the last dimension, as values of prompts."""
        size = self.metric.rows_per_prompt
        return values if size == 1 else values.unflatten(-1, (-1, size)).mean(-1)

    @property
    def logits(self) -> str:
        """Which logits the metric reads, for metadata."""
        return f"{'before' if self.metric.metric.before_cap else 'after'} the final soft-cap"

    def answers(self, model: HookedModel) -> str | None:
        """The right and wrong tokens of the first prompt, for metadata; None where there are none."""
        sides = [side for side in (self.metric.right, self.metric.wrong) if side is not None]
        return " against ".join(side.label(model) for side in sides) or None

    def details(self, model: HookedModel) -> dict[str, Any]:
        """What every result says of the task and of the model."""
        return {
            "task": self.name,
            "metric": self.metric.metric.name,
            "logits": self.logits,
            "answers": self.answers(model),
            "n_prompts": self.n_prompts,
            "weights": weights_of(model),
        }

    def runs(
        self, direction: Direction
    ) -> tuple[Int[torch.Tensor, "prompt pos"], Int[torch.Tensor, "prompt pos"]]:
        """Tokens of the run that is patched, and of the other, whose activations are inserted."""
        noising = direction == "noising"
        return (self.clean, self.corrupt) if noising else (self.corrupt, self.clean)

    @property
    def mask(self) -> Bool[torch.Tensor, "prompt pos"]:
        """True at the prompts' own tokens."""
        at = torch.arange(self.clean.shape[1], device=self.clean.device)
        return at < self.lengths[:, None]

    def measure(self, runner: Any, tokens: Any, **kwargs: Any) -> Float[torch.Tensor, " row"]:
        """The metric of each row of a run; arguments as for :meth:`readout`."""
        return self.metric.of_rows(self.readout(runner, tokens, **kwargs))

    def readout(self, runner: Any, tokens: Any, *, fwd_hooks: Hooks = (), **kwargs: Any) -> Readout:
        """What a run with hooks says at the position, or positions, that each row is asked about."""
        before_cap = self.metric.metric.before_cap
        with (
            hooking(runner, fwd_hooks=list(fwd_hooks)),
            read_out(runner, self.metric.places, before_cap=before_cap) as readouts,
        ):
            runner(tokens, **kwargs)
        (readout,) = readouts
        return readout

    def parts(self, size: int) -> Iterator[BoundTask]:
        """The task in parts of at most ``size`` prompts."""
        for index in torch.arange(len(self), device=self.clean.device).split(size):
            yield self.part(index)

    def part(self, index: Int[torch.Tensor, " row"]) -> BoundTask:
        """Some of its prompts."""
        return BoundTask(
            self.clean[index],
            self.corrupt[index],
            self.lengths[index],
            self.metric.part(index),
            self.name,
        )

    def cut(self, width: int) -> BoundTask:
        """The same with prompts cut to a width that none of them exceeds."""
        return replace(self, clean=self.clean[:, :width], corrupt=self.corrupt[:, :width])

    @torch.no_grad()
    def with_reference(self, model: HookedModel) -> BoundTask:
        """The same with what the clean run says."""
        reference = self.readout(model, self.clean)
        return replace(self, metric=replace(self.metric, reference=reference))

    def ends(self, runner: Any) -> dict[str, float]:
        """Mean metric of both runs, checked to lie apart."""
        with torch.no_grad():
            clean, corrupt = (
                float(self.measure(runner, tokens).mean()) for tokens in (self.clean, self.corrupt)
            )
        return self.metric_values(clean, corrupt, runner)

    def metric_values(self, clean: float, corrupt: float, runner: Any = None) -> dict[str, float]:
        """Both ends of the scale, checked to be finite and to lie apart."""
        check_finite(clean, "The metric of the clean prompts", runner)
        check_finite(corrupt, "The metric of the corrupted prompts", runner)
        if abs(clean - corrupt) < MIN_GAP:
            raise TaskError(
                f"The metric is {clean:.6f} on clean and {corrupt:.6f} on corrupted prompts; effects "
                "cannot be put on a scale between them",
                fix="a corruption that changes the answer, or another metric",
            )
        return {"metric_clean": clean, "metric_corrupt": corrupt}


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
def figures_of(model: HookedModel, bound: BoundTask) -> TaskFigures:
    """Runs the clean prompts of a task."""
    metrics, first = [], []
    for part in bound.parts(BATCH):
        readout = part.readout(model, part.clean)
        metrics.append(part.metric.of_rows(readout).cpu())
        if part.metric.right is not None:
            ids, mask = part.metric.right.ids, part.metric.right.mask
            first.append(((ids == readout.top(1)[1]) & mask).any(-1).cpu())
    metric = bound.fold(torch.cat(metrics))
    top = torch.cat(first) if first else None
    return TaskFigures(metric, metric > 0 if _compares(bound.metric.metric) else top, top)


def right_prompts(model: HookedModel, bound: BoundTask) -> list[int]:
    """The prompts that a model gets right."""
    figures = figures_of(model, bound)
    if figures.right is None:
        raise TaskError(
            f"{bound.metric.metric.name} does not say which prompts are right",
            fix="logit_diff, probability, margin, cross_entropy, or sequence_logprob with wrong=",
        )
    chosen = figures.right.nonzero().flatten().tolist()
    if not chosen:
        raise TaskError(
            f"The model gets none of the {bound.n_prompts} prompts of {bound.name!r} right "
            f"(mean metric {figures.mean:+.3f})",
            fix="another task, or another model",
        )
    return chosen


def _compares(metric: Metric) -> bool:
    """Whether a metric above zero means that the answer is preferred."""
    if isinstance(metric, LogitDiff | Margin):
        return True
    return isinstance(metric, Probability | SequenceLogprob) and metric.wrong is not None
