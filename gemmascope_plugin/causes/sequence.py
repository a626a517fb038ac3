"""Answers of several tokens: the sum of their log-probabilities by teacher forcing.

1. At bind a prompt becomes one row, ``prompt + answer[:-1]``, or two where there is a wrong answer to
   compare with. Clean and corrupted prompts get the same answers behind them.
2. A row is read at every position from which a token of its answer is predicted, ``len(answer)`` of them:
   ``sum_i log p(answer_i | prompt, answer_<i)``, in nats.
3. Rows have weights, ``+1`` without a wrong answer, else ``+2`` and ``-2``: the mean over rows is that
   over prompts of ``log p(answer) - log p(wrong)``, so whatever averages over rows stays right, and the
   mean over the rows of one prompt is that prompt's metric (``fold``).

A patch replaces activations in all rows of a prompt alike. Positions behind the prompt are those of the
answer's tokens, each row's own.

Cost: as a task with once or twice the prompts; logits of ``len(answer)`` positions per row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int

from gemmascope_plugin.causes.metric import BoundMetric, Metric, RowLogits
from gemmascope_plugin.errors import TaskError
from gemmascope_plugin.models.gate import gate
from gemmascope_plugin.models.prompts import pad_id
from gemmascope_plugin.models.protocol import HookedModel, describe
from gemmascope_plugin.models.readout import OfLogits, Readout
from gemmascope_plugin.models.tokens import answer_ids

Text = str | Sequence[int]
"""An answer as it stands behind the prompt, blanks included, or its token ids."""


@dataclass(frozen=True, kw_only=True)
class SequenceLogprob(Metric):
    """``log p(answer)``, minus ``log p(wrong)`` where there is one; answers of any number of tokens."""

    answer: Sequence[Text]
    wrong: Sequence[Text] | None = None
    name = "sequence log-probability"

    def bind(
        self, model: HookedModel, n_prompts: int, prompts: Sequence[Any] | None = None
    ) -> BoundMetric:
        """Knows its rows only once prompts are there, see :meth:`rows`."""
        return BoundMetric(self, n_prompts)

    def score(self, readout: Readout, bound: BoundMetric) -> Float[torch.Tensor, " row"]:
        """In nats; see :class:`BoundSequences`."""
        raise AssertionError("a task binds this metric to rows")

    def take(self, index: Sequence[int]) -> SequenceLogprob:
        """The same question about some of the prompts."""
        answer = [self.answer[i] for i in index]
        wrong = None if self.wrong is None else [self.wrong[i] for i in index]
        return replace(self, answer=answer, wrong=wrong)

    def rows(
        self, model: HookedModel, pair: tuple[Any, Any], lengths: Int[torch.Tensor, " prompt"]
    ) -> _Rows:
        """Clean and corrupted prompts with answers behind them."""
        kinds = [self._ids(model, "answer", self.answer, pair[0], lengths)]
        if self.wrong is not None:
            kinds.append(self._ids(model, "wrong", self.wrong, pair[0], lengths))
        answers = [ids for row in zip(*kinds, strict=True) for ids in row]
        source = torch.arange(len(lengths), device=lengths.device).repeat_interleave(len(kinds))
        clean, corrupt = (_with_answers(model, x[source], lengths[source], answers) for x in pair)
        sizes = torch.tensor([len(ids) for ids in answers], device=lengths.device)
        return _Rows(
            clean, corrupt, lengths[source] + sizes - 1, self._bound(answers, lengths[source])
        )

    def _bound(
        self, answers: Sequence[Sequence[int]], starts: Int[torch.Tensor, " row"]
    ) -> BoundSequences:
        device, per_prompt = starts.device, 1 if self.wrong is None else 2
        places = [
            (i, int(starts[i]) - 1 + j) for i, ids in enumerate(answers) for j in range(len(ids))
        ]
        row, at = torch.tensor(places, device=device).T
        weight = torch.ones(len(answers), device=device)
        if per_prompt == 2:
            weight = 2 * weight
            weight[1::2] *= -1
        token = torch.tensor([i for ids in answers for i in ids], device=device)
        return BoundSequences(
            self,
            len(answers),
            at=at,
            row=row,
            token=token,
            weight=weight,
            rows_per_prompt=per_prompt,
        )

    def _ids(
        self,
        model: HookedModel,
        noun: str,
        texts: Sequence[Text],
        prompts: Int[torch.Tensor, "prompt pos"],
        lengths: Int[torch.Tensor, " prompt"],
    ) -> list[list[int]]:
        if len(texts) != len(lengths):
            raise TaskError(
                f"{self.name} has {len(texts)} entries in {noun} for {len(lengths)} prompts",
                fix=f"{noun}=[one text per prompt]",
            )
        ends = [int(prompts[i, int(n) - 1]) for i, n in enumerate(lengths)]
        return [
            answer_ids(model, text, end, f"{noun} {i}")
            for i, (text, end) in enumerate(zip(texts, ends, strict=True))
        ]


def _check_texts(texts: object, call: str = "") -> None:
    """Refuses what is not one answer per prompt."""
    if isinstance(texts, (str, Mapping)) or not isinstance(texts, Sequence):
        raise TaskError(
            f"{describe(texts)} is not one answer per prompt",
            fix=f'{call}, as [" New York", " Texas"], or lists of token ids',
        )


def _check_wrong(texts: object, call: str = "") -> None:
    """The same where there may be none."""
    if texts is not None:
        _check_texts(texts, call)


@gate(answer=_check_texts, wrong=_check_wrong)
def sequence_logprob(
    answer: Sequence[Text], wrong: Sequence[Text] | None = None, *, before_cap: bool = False
) -> SequenceLogprob:
    """``log p(answer)`` of answers of any number of tokens, minus ``log p(wrong)`` if given, in nats.

    Args:
        answer: One text per prompt as it stands behind the prompt, with its blank: ``" New York"``; or
            token ids.
        wrong: Texts to compare with, which may have other numbers of tokens.
        before_cap: Whether probabilities are those of the logits before the final soft-cap.

    Example:
        >>> import gemmascope_plugin as gs
        >>> gs.sequence_logprob([" New York"], [" Texas"]).name
        'sequence log-probability'
    """
    return SequenceLogprob(answer=answer, wrong=wrong, before_cap=before_cap)


@dataclass(frozen=True)
class _Rows:
    """What a task of prompts with answers runs."""

    clean: Int[torch.Tensor, "row pos"]
    corrupt: Int[torch.Tensor, "row pos"]
    lengths: Int[torch.Tensor, " row"]
    metric: BoundSequences


@dataclass(frozen=True, kw_only=True)
class BoundSequences(BoundMetric):
    """Sums of log-probabilities, one per row; ``at`` and what follows have one entry per answer token."""

    row: Int[torch.Tensor, " ask"]
    """Which row is read there; ascending."""
    token: Int[torch.Tensor, " ask"]
    weight: Float[torch.Tensor, " row"]

    def places(self, n_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and positions that are read, of copies of the rows."""
        assert self.at is not None
        times = n_rows // self.n_prompts
        copies = torch.arange(times, device=self.row.device)[:, None] * self.n_prompts
        return (copies + self.row).flatten(), self.at.repeat(times)

    def of_rows(self, logits: RowLogits) -> Float[torch.Tensor, " answer"]:
        """Weighted sums over the tokens of each row's answer."""
        readout = OfLogits.of(logits) if isinstance(logits, torch.Tensor) else logits
        times, rest = divmod(len(readout), len(self.token))
        assert rest == 0, f"{len(readout)} positions are not copies of {len(self.token)}"
        each = readout.log_probs(self.token.to(readout.device).repeat(times)[:, None])[:, 0]
        rows = each.new_zeros(times * self.n_prompts)
        places = self.places(len(rows))[0].to(readout.device)
        return rows.index_add(0, places, each) * self.weight.to(each).repeat(times)

    def part(self, index: Int[torch.Tensor, " row"]) -> BoundSequences:
        """What belongs to these rows, in this order."""
        assert self.at is not None
        index = index.to(self.row.device)
        ends = torch.bincount(self.row, minlength=self.n_prompts).cumsum(0)
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        sizes = (ends - starts)[index]
        asks = [torch.arange(int(starts[i]), int(ends[i])) for i in index.tolist()]
        chosen = torch.cat(asks).to(index.device) if asks else index[:0]
        return replace(
            self,
            n_prompts=len(index),
            at=self.at[chosen],
            row=torch.arange(len(index), device=index.device).repeat_interleave(sizes),
            token=self.token[chosen],
            weight=self.weight[index],
            prompts=index if self.prompts is None else self.prompts[index],
        )

    @property
    def prompt_lengths(self) -> Int[torch.Tensor, " row"]:
        """Tokens of each row without its answer."""
        assert self.at is not None
        first = torch.ones_like(self.row, dtype=torch.bool)
        first[1:] = self.row[1:] != self.row[:-1]
        return self.at[first] + 1


def _with_answers(
    model: HookedModel,
    prompts: torch.Tensor,
    lengths: torch.Tensor,
    answers: Sequence[Sequence[int]],
) -> Int[torch.Tensor, "row pos"]:
    """Prompts and all but the last token of their answers, padded behind the end."""
    rows = [
        torch.cat([row[:n], row.new_tensor(list(ids[:-1]))])
        for row, n, ids in zip(prompts, lengths.tolist(), answers, strict=True)
    ]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id(model))
