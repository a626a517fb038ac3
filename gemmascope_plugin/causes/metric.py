"""Metrics: what a causal question asks of the logits, one number per prompt, higher is better.

1. A metric is read at one position of each prompt, ``position``: negative ones count from the end of the
   prompt itself, whatever was padded behind it.
2. It reads the model's own logits, *after* the final soft-cap where a model has one, or with
   ``before_cap=True`` those before it, where contributions add up. Every result says which.
3. ``metrics.py`` has the usual ones, ``custom`` any other.
4. Right and wrong answers of each prompt are token ids, sets padded to one width. An answer is a word, an
   id of any library's integers, or several of them; a single one is that of one prompt. Of a word that is
   a token with and without a space in front, the prompt decides which is meant (``models/tokens.py``).

Cost: of one position per prompt, what the metric asks of the next token: the rows of the unembedding that
belong to the words it names, the whole vocabulary in tiles where it needs a normaliser, or every logit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, SupportsIndex

import torch
from jaxtyping import Bool, Float, Int

from gemmascope_plugin.arguments import as_index
from gemmascope_plugin.errors import TaskError
from gemmascope_plugin.models.protocol import HookedModel, device_of
from gemmascope_plugin.models.readout import OfLogits, Readout
from gemmascope_plugin.models.tokens import quoted_label, token_id

Logits = Float[torch.Tensor, "row d_vocab"]
RowLogits = Logits | Readout


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
    def score(self, readout: Readout, bound: BoundMetric) -> Float[torch.Tensor, " row"]:
        """One number per row from what is said at ``position``; ``bound`` has what rows need."""

    def take(self, index: Sequence[int]) -> Metric:
        """The same question about some of the prompts."""
        return replace(self, position=_taken(self.position, index))

    def positions(self, lengths: Int[torch.Tensor, " prompt"]) -> Int[torch.Tensor, " prompt"]:
        """Where each prompt is asked, from its start."""
        position = self.position
        places = [position] * len(lengths) if isinstance(position, int) else list(position)
        if len(places) != len(lengths):
            raise TaskError(
                f"{self.name} has {len(places)} positions for {len(lengths)} prompts",
                fix="position=-1, or [one per prompt]",
            )
        for row, (place, length) in enumerate(zip(places, lengths.tolist(), strict=True)):
            if not -length <= place < length:
                raise TaskError(
                    f"Answer position {place} lies outside prompt {row} of {length} tokens",
                    exists=f"positions 0 to {length - 1}, or {-length} to -1 from the end",
                )
        at = torch.tensor(places, device=lengths.device)
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

    def of_rows(self, logits: RowLogits) -> Float[torch.Tensor, " row"]:
        """The same from logits at the position of each row, or from what makes them."""
        readout = OfLogits.of(logits) if isinstance(logits, torch.Tensor) else logits
        times, rest = divmod(len(readout), self.n_prompts)
        assert rest == 0, f"{len(readout)} rows are not copies of {self.n_prompts} prompts"
        index = torch.arange(self.n_prompts, device=readout.device).repeat(times)
        return self.metric.score(readout, self.part(index))

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


Answer = str | int | Sequence[str | int]
"""A token, or a set of tokens of which any counts."""
Answers = str | SupportsIndex | Iterable[Any]
"""Answers as people give them: one per prompt, ids of any library, in a list, an array or a tensor."""


def answer_list(noun: str, answers: Any) -> list[Answer]:
    """One entry per prompt, ids as plain integers; a single answer is that of one prompt."""
    single = _single(answers)
    if single is not None:
        return [single]
    return [_entry(noun, entry) for entry in _listed(noun, answers)]


def _entry(noun: str, entry: Any) -> Answer:
    single = _single(entry)
    if single is not None:
        return single
    choices = [_single(choice) for choice in _listed(noun, entry)]
    if None in choices:
        raise _no_answer(noun, entry)
    return [choice for choice in choices if choice is not None]


def _single(value: object) -> str | int | None:
    return value if isinstance(value, str) else as_index(value)


def _listed(noun: str, value: Any) -> list[Any]:
    if isinstance(value, Mapping | bytes) or not isinstance(value, Iterable):
        raise _no_answer(noun, value)
    return list(value)


def _no_answer(noun: str, value: object) -> TaskError:
    return TaskError(
        f"{noun} has {value!r}, which is neither a word nor a token id",
        fix=f'{noun}=[" Paris", " Rome"], one per prompt, or token ids',
    )


@dataclass(frozen=True)
class TokenSets:
    """One set of token ids per prompt."""

    ids: Int[torch.Tensor, "prompt choice"]
    mask: Bool[torch.Tensor, "prompt choice"]
    """False at padding."""

    @classmethod
    def of(
        cls,
        model: HookedModel,
        entries: Sequence[Answer],
        prompts: Sequence[Any] | None = None,
    ) -> TokenSets:
        """Words and ids as ids of this model."""
        sets = [[e] if isinstance(e, str | int) else list(e) for e in entries]
        width = max(len(choices) for choices in sets)
        ids = torch.zeros(len(sets), width, dtype=torch.long)
        mask = torch.zeros(len(sets), width, dtype=torch.bool)
        for row, choices in enumerate(sets):
            if not choices:
                raise TaskError(f"Prompt {row} has an empty set of answers")
            before = None if prompts is None else prompts[row]
            tokens = [token_id(model, choice, before) for choice in choices]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = True
        return cls(ids.to(device_of(model)), mask.to(device_of(model)))

    def label(self, model: HookedModel, row: int = 0) -> str:
        """The tokens of one prompt for people, three at most, with their ids."""
        tokens = self.ids[row][self.mask[row]].tolist()
        shown = [quoted_label(model, token) for token in tokens[:3]]
        more = len(tokens) - len(shown)
        return ", ".join(shown) + (f" and {more} more" if more else "")

    def pick(
        self, values: Float[torch.Tensor, "prompt d_vocab"], fill: float
    ) -> Float[torch.Tensor, "prompt choice"]:
        """The values of the tokens in each set, ``fill`` at padding."""
        return self.filled(values.gather(-1, self.ids), fill)

    def filled(
        self, values: Float[torch.Tensor, "prompt choice"], fill: float
    ) -> Float[torch.Tensor, "prompt choice"]:
        """Values of the tokens in each set with ``fill`` at padding."""
        return values.masked_fill(~self.mask, fill)

    def outside(
        self, values: Float[torch.Tensor, "prompt d_vocab"]
    ) -> Float[torch.Tensor, "prompt d_vocab"]:
        """The values of all other tokens, minus infinity at those of the set."""
        inside = torch.zeros(values.shape, dtype=torch.bool, device=values.device)
        inside = inside.scatter(-1, self.ids, self.mask)
        # where a set is narrower than the widest, its padding points at token 0
        inside[:, 0] = (self.mask & (self.ids == 0)).any(-1)
        return values.masked_fill(inside, -torch.inf)

    def rows(self, index: Int[torch.Tensor, " row"]) -> TokenSets:
        """The sets of some prompts, in this order."""
        return TokenSets(self.ids[index], self.mask[index])
