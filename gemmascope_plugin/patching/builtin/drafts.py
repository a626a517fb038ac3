"""Drafts of prompts in plain text, and which of them fit a tokenizer.

1. Word lists and templates are split in two, every other entry for each split: prompts of one split share
   no name, noun, fact or template with those of the other, whatever the seed.
2. A draft fits if the clean and the corrupted prompt are equally long in tokens and differ, all words are
   known, and every answer is exactly one token **behind its prompt**: the tokens of prompt and answer
   together are those of the prompt and one more. What does not fit is dropped and counted.
3. Answers are kept as token ids.

Cost: one call of the tokenizer per draft.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, NamedTuple, TypeVar

from gemmascope_plugin.errors import ModelError, TaskError
from gemmascope_plugin.models.protocol import HookedModel

T = TypeVar("T")
Tokens = Literal["one", "first", "all"]


class Draft(NamedTuple):
    """One clean prompt, its corruption, and what may follow the clean one."""

    clean: str
    corrupt: str
    answer: tuple[str, ...]
    """Right continuations, blanks included; any counts."""
    wrong: tuple[str, ...]
    tokens: Tokens = "one"
    """``one``: each continuation has to be one token. ``first``: it counts by its first token, and one
    that is both right and wrong by it counts as neither. ``all``: a single right and a single wrong
    continuation, or none, of any number of tokens."""


@dataclass(frozen=True)
class Half:
    """One of two splits of every list."""

    start: int

    def __call__(self, items: Sequence[T]) -> list[T]:
        """Every other item, from the first or the second on."""
        return list(items[self.start :: 2])


class Pair(NamedTuple):
    """A draft that fits, in token ids where that matters."""

    clean: str
    corrupt: str
    answer: list[int]
    wrong: list[int]


@dataclass(frozen=True)
class Fitted:
    """The drafts that fit."""

    pairs: tuple[Pair, ...]
    n_dropped: int
    """Drafts that were tried and did not."""

    def columns(self, ask: Callable[..., Any]) -> tuple[list[str], list[str], Any]:
        """Clean prompts, corrupted ones and a metric.

        Args:
            ask: Right and wrong answers of each prompt to a metric; without wrong ones where none has
                any.
        """
        answers, wrong = [p.answer for p in self.pairs], [p.wrong for p in self.pairs]
        metric = ask(answers, wrong) if any(wrong) else ask(answers)
        return [p.clean for p in self.pairs], [p.corrupt for p in self.pairs], metric


def fit(model: HookedModel, drafts: Iterator[Draft], n: int, tries: int) -> Fitted:
    """The first ``n`` different drafts that fit the tokenizer of a model.

    Args:
        model: Its tokenizer counts.
        drafts: In the order in which they are tried.
        n: How many are wanted.
        tries: How many are tried at most.

    Raises:
        ModelError: The model has no tokenizer.
    """
    if model.tokenizer is None:
        raise ModelError(
            "The model has no tokenizer", fix="Task(clean, corrupt, metric) with token ids"
        )
    seen: set[tuple[str, str]] = set()
    pairs: list[Pair] = []
    dropped = 0
    for draft in islice(drafts, tries):
        if len(pairs) == n:
            break
        if (draft.clean, draft.corrupt) in seen:
            continue
        seen.add((draft.clean, draft.corrupt))
        pair = fitted(model, draft)
        if pair is None:
            dropped += 1
        else:
            pairs.append(pair)
    return Fitted(tuple(pairs), dropped)


def too_few(fitting: Fitted, n: int, name: str) -> TaskError:
    """What to say where fewer than ``n`` drafts fit."""
    return TaskError(
        f"Only {len(fitting.pairs)} of {n} prompts of {name!r} fit this tokenizer; "
        f"{fitting.n_dropped} were dropped: answers of several tokens, unknown words, or clean and "
        "corrupted prompts of different lengths",
        fix=f"n={len(fitting.pairs)}" if fitting.pairs else "Task.from_template(...), other words",
    )


def fitted(model: HookedModel, draft: Draft) -> Pair | None:
    """A draft with the ids of its answers; None where it does not fit."""
    texts = [draft.clean, draft.corrupt]
    texts += [draft.clean + end for end in (*draft.answer, *draft.wrong)]
    rows = model.tokenizer(texts, add_special_tokens=False)["input_ids"]
    clean, corrupt, *longer = (list(row) for row in rows)
    unknown = model.tokenizer.unk_token_id
    if clean == corrupt or len(clean) != len(corrupt) or unknown in (*clean, *corrupt):
        return None
    n = len(clean)
    if any(row[:n] != clean or len(row) == n or unknown in row for row in longer):
        return None  # the prompt's own last tokens change when the answer follows
    ends = [row[n:] for row in longer]
    if draft.tokens == "all":
        sides = ends if len(ends) == 2 else [ends[0], []]
        return None if sides[0] == sides[1] else Pair(draft.clean, draft.corrupt, *sides)
    if draft.tokens == "one" and any(len(end) > 1 for end in ends):
        return None
    firsts = [end[0] for end in ends]
    answer, wrong = set(firsts[: len(draft.answer)]), set(firsts[len(draft.answer) :])
    if draft.tokens == "first":
        answer, wrong = answer - wrong, wrong - answer
    if not answer or (draft.wrong and not wrong) or answer & wrong:
        return None
    return Pair(draft.clean, draft.corrupt, sorted(answer), sorted(wrong))
