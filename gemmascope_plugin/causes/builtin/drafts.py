"""Drafts of prompts in plain text, and which of them fit a tokenizer.

1. Word lists and templates are split in two, every other entry for each split: prompts of one split share
   no name, noun, fact or template with those of the other, whatever the seed.
2. A draft fits if the clean and the corrupted prompt are equally long in tokens and differ, all words are
   known, and every answer is exactly one token **behind its prompt**: the tokens of prompt and answer
   together are those of the prompt and one more. What does not fit is dropped and counted.
3. Behind a letter an answer has its blank, where it is a token with one.
4. Answers are kept as token ids.
5. Lists are finite: drafting ends where draws have long brought nothing new.

Cost: the tokenizer reads each draft with each of its answers once, many drafts in a call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, NamedTuple, TypeVar

from gemmascope_plugin.errors import ModelError, TaskError
from gemmascope_plugin.models.protocol import HookedModel

T = TypeVar("T")
Tokens = Literal["one", "first", "all"]

SAME = "clean and corrupted prompts of the same tokens"
LENGTHS = "clean and corrupted prompts of different lengths in tokens"
UNKNOWN = "unknown words in prompts"
RUN_IN = "answers that are read into the last word of their prompt"
UNKNOWN_ANSWER = "answers that are unknown behind their prompt"
BARE = "answers without a blank that are words with one"
SEVERAL = "answers of several tokens"
EQUAL = "right and wrong answers of the same token"

BATCH, FEWEST = 64, 8
"""Most and fewest drafts in a call of the tokenizer."""
PATIENCE = (1000, 20)
"""Draws in a row that may bring nothing new: so many, and so many for each draft that has come up. Of
equally likely drafts one is then missing with a probability below exp(-20)."""


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
    reasons: Counter[str] = field(default_factory=Counter)
    """Why not, and how many."""

    def columns(self, ask: Callable[..., Any]) -> tuple[list[str], list[str], Any]:
        """Clean prompts, corrupted ones and a metric.

        The metric gets no wrong answers where no draft has any.
        """
        answers, wrong = [p.answer for p in self.pairs], [p.wrong for p in self.pairs]
        metric = ask(answers, wrong) if any(wrong) else ask(answers)
        return [p.clean for p in self.pairs], [p.corrupt for p in self.pairs], metric


def fit(model: HookedModel, drafts: Iterator[Draft], n: int, tries: int) -> Fitted:
    """The first ``n`` different drafts that fit the tokenizer of a model."""
    if model.tokenizer is None:
        raise ModelError(
            "The model has no tokenizer", fix="Task(clean, corrupt, metric) with token ids"
        )
    pairs: list[Pair] = []
    reasons: Counter[str] = Counter()
    fresh = _without_repeats(islice(drafts, tries))
    while len(pairs) < n:
        batch = list(islice(fresh, min(BATCH, max(FEWEST, n - len(pairs)))))
        if not batch:
            break
        for outcome in _judged(model, batch):
            if isinstance(outcome, str):
                reasons[outcome] += 1
            else:
                pairs.append(outcome)
            if len(pairs) == n:
                break
    return Fitted(tuple(pairs), reasons.total(), reasons)


def _without_repeats(drafts: Iterator[Draft]) -> Iterator[Draft]:
    """Each draft once, until draws have long brought nothing new."""
    drafted: set[tuple[str, str]] = set()
    repeats = 0
    for draft in drafts:
        if (draft.clean, draft.corrupt) in drafted:
            repeats += 1
            if repeats > PATIENCE[0] + PATIENCE[1] * len(drafted):
                return
            continue
        repeats = 0
        drafted.add((draft.clean, draft.corrupt))
        yield draft


def too_few(
    fitting: Fitted, n: int, name: str, sides: Sequence[tuple[str, str | None]] = ()
) -> TaskError:
    """What to say where fewer than ``n`` drafts fit."""
    reasons = ", ".join(f"{count} for {reason}" for reason, count in fitting.reasons.most_common())
    fix = f"n={len(fitting.pairs)}" if fitting.pairs else "Task.from_template(...), other words"
    bare = [(side, text) for side, text in sides if text and not text[0].isspace()]
    if bare and fitting.reasons.keys() & {RUN_IN, UNKNOWN_ANSWER, BARE}:
        fix = ", ".join(f"{side}={' ' + text!r}" for side, text in bare)
        fix += ", with the blank that stands before a word; for parts of words Task(...) with ids"
    return TaskError(
        f"Only {len(fitting.pairs)} of {n} prompts of {name!r} fit this tokenizer; "
        f"{fitting.n_dropped} were dropped" + (f": {reasons}" if reasons else ""),
        fix=fix,
    )


def _judged(model: HookedModel, drafts: Sequence[Draft]) -> Iterator[Pair | str]:
    """Each draft with the ids of its answers, or why it does not fit."""
    texts = [
        [d.clean, d.corrupt, *(d.clean + end for end in (*d.answer, *d.wrong))] for d in drafts
    ]
    flat = [text for group in texts for text in group]
    rows = iter(model.tokenizer(flat, add_special_tokens=False)["input_ids"])
    unknown = model.tokenizer.unk_token_id
    for draft, group in zip(drafts, texts, strict=True):
        outcome = _fitted(draft, [list(row) for row in islice(rows, len(group))], unknown)
        yield BARE if not isinstance(outcome, str) and _is_bare(model, draft) else outcome


def _is_bare(model: HookedModel, draft: Draft) -> bool:
    """Whether an answer stands right behind a letter and would be a token with a blank between as well.

    ``to`` + ``Mary`` is not what anybody says. Scripts without blanks between words are left alone.
    """
    if not _is_letter(draft.clean[-1:]):
        return False
    bare = [f" {end}" for end in (*draft.answer, *draft.wrong) if _is_letter(end[:1])]
    rows = model.tokenizer(bare, add_special_tokens=False)["input_ids"] if bare else []
    return any(len(row) == 1 and row[0] != model.tokenizer.unk_token_id for row in rows)


def _is_letter(sign: str) -> bool:
    """Of Latin, Greek, Cyrillic or Armenian script."""
    return sign.isalpha() and sign < "\u0590"


def _fitted(draft: Draft, rows: Sequence[list[int]], unknown: int | None) -> Pair | str:
    """A draft with the ids of its answers, or why it does not fit."""
    clean, corrupt, *longer = rows
    n = len(clean)
    if unknown in (*clean, *corrupt):
        return UNKNOWN
    if clean == corrupt:
        return SAME
    if n != len(corrupt):
        return LENGTHS
    if any(unknown in row for row in longer):
        return UNKNOWN_ANSWER
    if any(row[:n] != clean or len(row) == n for row in longer):
        return RUN_IN
    return _with_answers(draft, [row[n:] for row in longer])


def _with_answers(draft: Draft, ends: Sequence[list[int]]) -> Pair | str:
    """A draft whose prompts fit, with the ids of what follows, or why these do not fit."""
    if draft.tokens == "all":
        sides = ends if len(ends) == 2 else [ends[0], []]
        return EQUAL if sides[0] == sides[1] else Pair(draft.clean, draft.corrupt, *sides)
    if draft.tokens == "one" and any(len(end) > 1 for end in ends):
        return SEVERAL
    firsts = [end[0] for end in ends]
    answer, wrong = set(firsts[: len(draft.answer)]), set(firsts[len(draft.answer) :])
    if draft.tokens == "first":
        answer, wrong = answer - wrong, wrong - answer
    if not answer or (draft.wrong and not wrong) or answer & wrong:
        return EQUAL
    return Pair(draft.clean, draft.corrupt, sorted(answer), sorted(wrong))
