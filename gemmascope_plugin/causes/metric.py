"""Metrics: what a causal question asks of the logits, one number per prompt, higher is better.

1. A metric is read at one position of each prompt, ``position``: negative ones count from the end of the
   prompt itself, whatever was padded behind it.
2. It reads the model's own logits, *after* the final soft-cap where a model has one, or with
   ``before_cap=True`` those before it, where contributions add up. Every result says which.
3. ``metrics.py`` has the usual ones, ``custom`` any other.

Cost: of one position per prompt, what the metric asks of the next token: the rows of the unembedding that
belong to the words it names, the whole vocabulary in tiles where it needs a normaliser, or every logit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int

from gemmascope_plugin.causes.answer_tokens import Answer, TokenSets, answer_list
from gemmascope_plugin.errors import TaskError
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.models.readout import OfLogits, Readout

Logits = Float[torch.Tensor, "row d_vocab"]
Asked = Logits | Readout


@dataclass(frozen=True, kw_only=True)
class Metric(ABC):
    """A question about the next token at one position of each prompt."""

    position: int | Sequence[int] = -1
    """Where the next token is asked for: one for all prompts, or one per prompt."""
    before_cap: bool = False
    """Whether logits are read before the final soft-cap."""
    name: ClassVar[str]
    """For titles and metadata."""
    reads_all_logits: ClassVar[bool] = False
    """Whether every logit of a row is held at once; where not, a few words or tiles of the vocabulary."""

    @abstractmethod
    def bind(
        self, model: HookedModel, n_prompts: int, prompts: Sequence[Any] | None = None
    ) -> BoundMetric:
        """Turns words into ids of this model.

        The prompts' tokens up to where they are asked decide between a word with and without a space
        in front.
        """

    @abstractmethod
    def score(self, said: Readout, bound: BoundMetric) -> Float[torch.Tensor, " row"]:
        """One number per row from what is said at ``position``; ``bound`` has what rows need."""

    def take(self, index: Sequence[int]) -> Metric:
        """The same question about some of the prompts."""
        return replace(self, position=_taken(self.position, index))

    def positions(self, lengths: Int[torch.Tensor, " prompt"]) -> Int[torch.Tensor, " prompt"]:
        """Where each prompt is asked, from its start."""
        given = self.position
        wanted = [given] * len(lengths) if isinstance(given, int) else list(given)
        if len(wanted) != len(lengths):
            raise TaskError(
                f"{self.name} has {len(wanted)} positions for {len(lengths)} prompts",
                fix="position=-1, or [one per prompt]",
            )
        for row, (position, length) in enumerate(zip(wanted, lengths.tolist(), strict=True)):
            if not -length <= position < length:
                raise TaskError(
                    f"Answer position {position} lies outside prompt {row} of {length} tokens",
                    exists=f"positions 0 to {length - 1}, or {-length} to -1 from the end",
                )
        at = torch.tensor(wanted, device=lengths.device)
        return torch.where(at < 0, at + lengths, at)


@dataclass(frozen=True, kw_only=True)
class AnswerMetric(Metric, ABC):
    """A metric that knows right answers, and may know wrong ones."""

    answer: Sequence[Answer]
    """Right tokens, one entry per prompt."""
    wrong: Sequence[Answer] | None = None
    """Tokens to compare with, one entry per prompt."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "answer", answer_list("answer", self.answer))
        if self.wrong is not None:
            object.__setattr__(self, "wrong", answer_list("wrong", self.wrong))

    def bind(
        self, model: HookedModel, n_prompts: int, prompts: Sequence[Any] | None = None
    ) -> BoundMetric:
        """Turns words into ids of this model."""
        for label, entries in (("answer", self.answer), ("wrong", self.wrong)):
            if entries is not None and len(entries) != n_prompts:
                raise TaskError(
                    f"{self.name} has {len(entries)} entries in {label} for {n_prompts} prompts",
                    fix=f"{label}=[one entry per prompt]",
                )
        right = TokenSets.of(model, self.answer, prompts)
        wrong = None if self.wrong is None else TokenSets.of(model, self.wrong, prompts)
        return BoundMetric(self, n_prompts, right, wrong)

    def take(self, index: Sequence[int]) -> AnswerMetric:
        """The same question about some of the prompts."""
        answer = [self.answer[i] for i in index]
        wrong = None if self.wrong is None else [self.wrong[i] for i in index]
        return replace(self, position=_taken(self.position, index), answer=answer, wrong=wrong)


def _taken(position: int | Sequence[int], index: Sequence[int]) -> int | list[int]:
    return position if isinstance(position, int) else [position[i] for i in index]


@dataclass(frozen=True)
class BoundMetric:
    """A metric with what it needs of each prompt."""

    metric: Metric
    n_prompts: int
    right: TokenSets | None = None
    wrong: TokenSets | None = None
    reference: Readout | None = None
    """What the clean run says, for metrics that compare with it."""
    at: Int[torch.Tensor, " ask"] | None = None
    """Positions that are read, one per prompt, once the lengths of the prompts are known."""
    prompts: Int[torch.Tensor, " prompt"] | None = None
    """Which prompts of the task these are; None for all of them."""
    rows_per_prompt: int = 1
    """Rows that a prompt has become, next to each other; their mean is the prompt's metric."""

    def places(self, n_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and positions that are read."""
        assert self.at is not None
        rows = torch.arange(n_rows, device=self.at.device)
        return rows, self.at[rows % len(self.at)]

    def __call__(self, logits: Float[torch.Tensor, "row pos d_vocab"]) -> Any:
        """One number per row ``[row]``; rows may be several copies of the prompts, copy after copy."""
        rows = torch.arange(len(logits), device=logits.device)
        at = self.at if self.at is not None else self._positions(logits)
        return self.of_rows(logits[rows, at[rows % self.n_prompts]])

    def of_rows(self, asked: Asked) -> Float[torch.Tensor, " row"]:
        """The same from logits at the position of each row, or from what makes them."""
        said = OfLogits.of(asked) if isinstance(asked, torch.Tensor) else asked
        times, rest = divmod(len(said), self.n_prompts)
        assert rest == 0, f"{len(said)} rows are not copies of {self.n_prompts} prompts"
        index = torch.arange(self.n_prompts, device=said.device).repeat(times)
        return self.metric.score(said, self.part(index))

    def part(self, index: Int[torch.Tensor, " row"]) -> BoundMetric:
        """What belongs to these prompts, in this order."""
        return BoundMetric(
            self.metric,
            len(index),
            None if self.right is None else self.right.rows(index),
            None if self.wrong is None else self.wrong.rows(index),
            None if self.reference is None else self.reference.rows(index),
            None if self.at is None else self.at[index],
            index if self.prompts is None else self.prompts[index],
        )

    def _positions(self, logits: torch.Tensor) -> Int[torch.Tensor, " prompt"]:
        lengths = torch.full((self.n_prompts,), logits.shape[1], device=logits.device)
        return self.metric.positions(lengths)
