"""Metrics: what a causal question asks of the logits, one number per prompt, higher is better.

All metrics read the model's own logits, that is *after* the final soft-cap where a model has one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int

from gemmascope_plugin.errors import TaskError, UnknownNameError
from gemmascope_plugin.models.protocol import HookedModel, device_of
from gemmascope_plugin.models.tokens import word_id

Answer = str | int | Sequence[str | int]
"""A token, or a set of tokens of which any counts."""


@dataclass(frozen=True)
class Metric(ABC):
    """A question about the next token at one position of each prompt."""

    answer: Sequence[Answer]
    """Right tokens, one entry per prompt."""
    wrong: Sequence[Answer] | None = None
    """Tokens to compare with, one entry per prompt."""
    position: int = -1
    """Where the next token is asked for."""
    name: ClassVar[str]
    """For titles and metadata."""

    @abstractmethod
    def score(
        self, logits: Float[torch.Tensor, "prompt d_vocab"], bound: BoundAnswers
    ) -> Float[torch.Tensor, " prompt"]:
        """One number per prompt from the logits at ``position``."""

    def bind(self, model: HookedModel, n_prompts: int) -> BoundMetric:
        """Turns words into ids of this model.

        Raises:
            TaskError: The number of answers differs from the number of prompts.
            UnknownNameError: A word is not a single token, or an id is outside the vocabulary.
        """
        for label, entries in (("answer", self.answer), ("wrong", self.wrong)):
            if entries is not None and len(entries) != n_prompts:
                raise TaskError(
                    f"{self.name} has {len(entries)} entries in {label} for {n_prompts} prompts",
                    fix=f"{label}=[one entry per prompt]",
                )
        right = _ids(model, self.answer)
        wrong = None if self.wrong is None else _ids(model, self.wrong)
        return BoundMetric(self, BoundAnswers(*right, *(wrong or (None, None))))


@dataclass(frozen=True)
class BoundAnswers:
    """Answers as ids, sets padded to one width."""

    right: Int[torch.Tensor, "prompt choice"]
    right_mask: Bool[torch.Tensor, "prompt choice"]
    wrong: Int[torch.Tensor, "prompt choice_wrong"] | None
    wrong_mask: Bool[torch.Tensor, "prompt choice_wrong"] | None

    def repeated(self, times: int) -> BoundAnswers:
        """The same answers for ``times`` copies of the prompts."""
        wrong = None if self.wrong is None else self.wrong.repeat(times, 1)
        wrong_mask = None if self.wrong_mask is None else self.wrong_mask.repeat(times, 1)
        right, right_mask = self.right.repeat(times, 1), self.right_mask.repeat(times, 1)
        return BoundAnswers(right, right_mask, wrong, wrong_mask)


@dataclass(frozen=True)
class BoundMetric:
    """A metric with token ids."""

    metric: Metric
    answers: BoundAnswers

    def __call__(
        self, logits: Float[torch.Tensor, "row pos d_vocab"]
    ) -> Float[torch.Tensor, " row"]:
        """One number per row; rows may be several copies of the prompts, copy after copy."""
        times, rest = divmod(len(logits), len(self.answers.right))
        assert rest == 0, f"{len(logits)} rows are not copies of {len(self.answers.right)} prompts"
        at = logits[:, self.metric.position].float()
        return self.metric.score(at, self.answers.repeated(times))


class LogitDiff(Metric):
    """``logit(answer) - logit(wrong)``; a set of tokens counts with its log-sum-exp."""

    name = "logit difference"

    def score(
        self, logits: Float[torch.Tensor, "prompt d_vocab"], bound: BoundAnswers
    ) -> Float[torch.Tensor, " prompt"]:
        """Difference in logits, in nats of odds."""
        assert bound.wrong is not None and bound.wrong_mask is not None
        right = _pick(logits, bound.right, bound.right_mask, -torch.inf).logsumexp(-1)
        return right - _pick(logits, bound.wrong, bound.wrong_mask, -torch.inf).logsumexp(-1)


class Probability(Metric):
    """Probability of the answer, or of the whole set, minus that of ``wrong`` if given."""

    name = "probability"

    def score(
        self, logits: Float[torch.Tensor, "prompt d_vocab"], bound: BoundAnswers
    ) -> Float[torch.Tensor, " prompt"]:
        """Probability mass, 0 to 1, or a difference of two."""
        p = logits.softmax(-1)
        right = _pick(p, bound.right, bound.right_mask, 0.0).sum(-1)
        if bound.wrong is None or bound.wrong_mask is None:
            return right
        return right - _pick(p, bound.wrong, bound.wrong_mask, 0.0).sum(-1)


def logit_diff(
    answer: Sequence[Answer], wrong: Sequence[Answer], *, position: int = -1
) -> LogitDiff:
    """``logit(answer) - logit(wrong)`` at ``position``, one entry per prompt."""
    return LogitDiff(answer, wrong, position)


def probability(
    answer: Sequence[Answer], wrong: Sequence[Answer] | None = None, *, position: int = -1
) -> Probability:
    """Probability of ``answer`` (minus that of ``wrong``) at ``position``."""
    return Probability(answer, wrong, position)


def _ids(
    model: HookedModel, entries: Sequence[Answer]
) -> tuple[Int[torch.Tensor, "prompt choice"], Bool[torch.Tensor, "prompt choice"]]:
    sets = [[e] if isinstance(e, str | int) else list(e) for e in entries]
    width = max(len(choices) for choices in sets)
    ids = torch.zeros(len(sets), width, dtype=torch.long)
    mask = torch.zeros(len(sets), width, dtype=torch.bool)
    for row, choices in enumerate(sets):
        if not choices:
            raise TaskError(f"Prompt {row} has an empty set of answers")
        found = [c if isinstance(c, int) else word_id(model, c) for c in choices]
        beyond = [i for i in found if not 0 <= i < model.cfg.d_vocab]
        if beyond:
            raise UnknownNameError(
                f"Token id {beyond[0]} does not exist",
                exists=f"token ids 0 to {model.cfg.d_vocab - 1}",
            )
        ids[row, : len(found)] = torch.tensor(found)
        mask[row, : len(found)] = True
    return ids.to(device_of(model)), mask.to(device_of(model))


def _pick(
    values: Float[torch.Tensor, "prompt d_vocab"],
    ids: Int[torch.Tensor, "prompt choice"],
    mask: Bool[torch.Tensor, "prompt choice"],
    fill: float,
) -> Float[torch.Tensor, "prompt choice"]:
    return values.gather(-1, ids).masked_fill(~mask, fill)
