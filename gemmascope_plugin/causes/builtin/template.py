"""A task from a sentence and lists of what may stand in it.

1. ``{name}`` is a slot; ``fill`` has a list for every slot, or rows for several slots that belong
   together: ``("country", "capital"): [("France", "Paris"), ...]``.
2. ``corrupt`` says which slots hold something else in the corrupted prompt: what stands in another slot
   (``{"A": "B", "B": "A"}`` swaps the two), or ``"other"``, another entry of the slot's own list. Or it
   is a template of its own. ``{other A}`` is what then stands for ``A``, in ``wrong`` and in a template.
3. Combinations are drawn without repetition; no two slots of a prompt hold the same text.
4. What does not fit the tokenizer is dropped and counted (``drafts.py``).

The checks at the end are of the arguments of ``Task.from_template`` (``models/gate.py``).

Cost: one call of the tokenizer per combination that is tried.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from random import Random
from string import Formatter
from typing import Any

from gemmascope_plugin.causes.builtin.drafts import Draft, Tokens
from gemmascope_plugin.causes.metric import Metric
from gemmascope_plugin.errors import InputError, TaskError, UnknownNameError, nearest, shorten
from gemmascope_plugin.models.protocol import describe

Fill = Mapping[str | tuple[str, ...], Sequence[str | Sequence[str]]]
OTHER = "other"


@dataclass(frozen=True)
class Template:
    """A sentence, what follows it, and what may stand in it; checked."""

    clean: str
    answer: str
    wrong: str | None
    corrupt: str
    changes: Mapping[str, str]
    """Slot to slot or ``other``; empty where the corrupted prompt is a template of its own."""
    lists: Mapping[tuple[str, ...], tuple[tuple[str, ...], ...]]
    tokens: Tokens

    @classmethod
    def of(
        cls,
        clean: str,
        answer: str,
        wrong: str | None,
        corrupt: str | Mapping[str, str],
        fill: Fill,
        tokens: Tokens,
        *,
        compares: bool = True,
    ) -> Template:
        """Checks that slots and lists fit each other."""
        lists = _lists(fill)
        slots = tuple(slot for group in lists for slot in group)
        changes = {} if isinstance(corrupt, str) else dict(corrupt)
        if not corrupt:
            raise TaskError(
                "corrupt changes nothing", fix='corrupt={"A": "other"}, or another template'
            )
        for slot, source in changes.items():
            _check_slot(slot, slots, "corrupt")
            if source != OTHER and source not in slots:
                raise UnknownNameError(
                    f"corrupt={{{slot!r}: {source!r}}}: {source!r} is neither a slot nor 'other'",
                    exists=f"'other' for another entry of its list, slots {shorten(slots)}",
                    nearest=nearest(source, [OTHER, *slots]),
                    fix=f"corrupt={{{slot!r}: 'other'}}",
                )
        broken = corrupt if isinstance(corrupt, str) else clean
        if wrong is not None and wrong == answer:
            raise TaskError(
                f"wrong={wrong!r} is the answer itself", fix="another slot, or leave wrong out"
            )
        if compares and wrong is None and set(changes) & set(slots_of(answer)):
            wrong = _renamed(answer, changes)
        texts = {"template": clean, "answer": answer, "wrong": wrong, "corrupt": broken}
        named = set(changes.values())
        for label, text in texts.items():
            for slot in slots_of(text or ""):
                named.add(_check_slot(slot.removeprefix(f"{OTHER} "), slots, label))
        if unused := [slot for slot in slots if slot not in named]:
            raise UnknownNameError(
                f"fill has a list for {unused[0]!r}, and no such slot stands anywhere",
                exists=shorten(sorted(named)),
                fix=f"{{{unused[0]}}} in the template, or leave it out",
            )
        return cls(clean, answer, wrong, broken, changes, lists, tokens)

    @property
    def n_combinations(self) -> int:
        """In how many ways slots can be filled."""
        return prod(len(rows) for rows in self.lists.values())

    def drafts(self, rng: Random, tries: int) -> Iterator[Draft]:
        """Combinations in random order, none twice."""
        total = self.n_combinations
        for number in rng.sample(range(total), min(total, tries)):
            draft = self._draft(rng, number)
            if draft is not None:
                yield draft

    def _draft(self, rng: Random, number: int) -> Draft | None:
        """One combination; None where a text stands in two slots, or a list has no other entry."""
        texts, others = self._drawn(rng, number)
        others |= {slot: texts[source] for slot, source in self.changes.items() if source != OTHER}
        values = {**texts, **{f"{OTHER} {slot}": text for slot, text in others.items()}}
        drawn = [f"{OTHER} {slot}" for slot, source in self.changes.items() if source == OTHER]
        if not self._named | set(drawn) <= set(values):
            return None
        shown = [*texts.values(), *(values[slot] for slot in drawn)]
        if len(set(shown)) < len(shown):
            return None
        changed = {**values, **{slot: others[slot] for slot in self.changes}}
        answer, wrong = (
            () if text is None else (filled(text, values),) for text in (self.answer, self.wrong)
        )
        clean, corrupt = filled(self.clean, values), filled(self.corrupt, changed)
        return Draft(clean, corrupt, answer, wrong, self.tokens)

    def _drawn(self, rng: Random, number: int) -> tuple[dict[str, str], dict[str, str]]:
        """What stands in each slot, and another entry of its list."""
        texts: dict[str, str] = {}
        others: dict[str, str] = {}
        for group, rows in self.lists.items():
            number, place = divmod(number, len(rows))
            texts.update(zip(group, rows[place], strict=True))
            if len(rows) > 1:
                other = (place + 1 + rng.randrange(len(rows) - 1)) % len(rows)
                others.update(zip(group, rows[other], strict=True))
        return texts, others

    @property
    def _named(self) -> set[str]:
        texts = (self.clean, self.answer, self.wrong or "", self.corrupt)
        return {slot for text in texts for slot in slots_of(text)}


def slots_of(text: str) -> list[str]:
    """The names in braces."""
    try:
        return [name for _, name, _, _ in Formatter().parse(text) if name is not None]
    except ValueError as error:
        raise TaskError(
            f"The template {text!r} cannot be read ({error})", fix="{name} for a slot"
        ) from error


def filled(text: str, values: Mapping[str, str]) -> str:
    """The text with its slots filled; ``{{`` is a brace."""
    parts = Formatter().parse(text)
    return "".join(plain + ("" if name is None else values[name]) for plain, name, _, _ in parts)


def _renamed(text: str, changes: Mapping[str, str]) -> str:
    """The answer to the corrupted prompt, in the slots of the clean one."""
    renamed = ""
    for plain, name, _, _ in Formatter().parse(text):
        renamed += plain.replace("{", "{{").replace("}", "}}")
        if name is not None:
            renamed += f"{{{OTHER} {name}}}" if name in changes else f"{{{name}}}"
    return renamed


def _check_slot(slot: str, slots: Sequence[str], where: str) -> str:
    if slot not in slots:
        raise UnknownNameError(
            f"There is no list for the slot {slot!r} of {where}",
            exists=f"lists for {shorten(slots)}",
            nearest=nearest(slot, slots),
            fix=f"fill={{{slot!r}: [...]}}",
        )
    return slot


def _lists(fill: Fill) -> dict[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    lists = {}
    for key, rows in fill.items():
        group = (key,) if isinstance(key, str) else tuple(key)
        entries = tuple((row,) if isinstance(row, str) else tuple(row) for row in rows)
        if isinstance(rows, str) or not entries:
            raise TaskError(f"fill[{key!r}] is {rows!r}", fix=f"fill[{key!r}] = [a list of texts]")
        bad = [row for row in entries if len(row) != len(group)]
        if bad:
            raise TaskError(
                f"fill[{key!r}] has the entry {bad[0]!r} for {len(group)} slots",
                fix="as many texts in every row as there are slots",
            )
        lists[group] = tuple(dict.fromkeys(entries))
    if not lists:
        raise TaskError("fill is empty", fix='fill={"A": ["Mary", "John"]}')
    return lists


_FILL = 'fill={"A": ["Mary", "John"], "place": ["park", "store"]}'
_CORRUPT = 'corrupt={"A": "other"}, or the template of the corrupted prompt'
_WITH_WRONG = "logit_diff, probability, sequence_logprob"
_ASKS = f"{_WITH_WRONG}, margin, cross_entropy"


def check_needed_text(name: str, example: str) -> Callable[[Any, str], None]:
    """A check for an argument that is a text."""

    def check(value: object, call: str) -> None:
        if not isinstance(value, str):
            raise InputError(f"{name}={describe(value)} is not a text", fix=f"{name}={example}")

    return check


def check_text(name: str, example: str) -> Callable[[Any, str], None]:
    """The same for one that may be left out, where it is None."""
    needed = check_needed_text(name, example)

    def check(value: object, call: str) -> None:
        if value is not None:
            needed(value, call)

    return check


def check_corrupt(corrupt: object, call: str) -> None:
    """Refuses what is neither a template nor slots with what stands there instead."""
    if isinstance(corrupt, str):
        return
    if not isinstance(corrupt, Mapping):
        raise InputError(f"corrupt={describe(corrupt)} says no change", fix=_CORRUPT)
    for slot, source in corrupt.items():
        if not isinstance(slot, str) or not isinstance(source, str):
            raise InputError(f"corrupt has {slot!r}: {source!r}", fix=_CORRUPT)


def check_fill(fill: object, call: str) -> None:
    """Refuses what is not slots with lists of texts."""
    if not isinstance(fill, Mapping):
        raise InputError(f"fill={describe(fill)} has no slots with lists", fix=_FILL)
    for key, rows in fill.items():
        slots = [key] if isinstance(key, str) else key
        if not isinstance(slots, (list, tuple)) or not all(isinstance(s, str) for s in slots):
            raise InputError(f"fill has the slot {key!r}, which is not a text", fix=_FILL)
        if not isinstance(rows, Iterable):
            raise InputError(
                f"fill[{key!r}] is {rows!r}, not a list of texts", fix=f"fill[{key!r}] = [...]"
            )
        for row in [] if isinstance(rows, str) else rows:
            texts = row if isinstance(row, Iterable) else [row]
            bad = [text for text in texts if not isinstance(text, str)]
            if bad:
                raise InputError(
                    f"fill[{key!r}] has the entry {bad[0]!r}, which is not a text",
                    fix=repr(str(bad[0])) if isinstance(bad[0], (int, float)) else _FILL,
                )


def check_ask(metric: object, call: str) -> None:
    """Refuses what does not make a metric of answers."""
    if isinstance(metric, str):
        raise TaskError(
            f"metric={metric!r} is a text", exists=_ASKS, fix=f"metric=gemmascope_plugin.{metric}"
        )
    if isinstance(metric, Metric):
        raise TaskError(
            f"metric is a {metric.name} that has its answers already; the template makes answers",
            exists=_ASKS,
            fix="metric=logit_diff, without a call",
        )
    if "answer" not in _parameters(metric):
        name = getattr(metric, "__name__", None) or describe(metric)
        raise TaskError(
            f"metric={name} does not ask for answers",
            exists=_ASKS + ", or a function of answer and wrong",
            fix="another of them, or Task(task.clean, task.corrupt, kl_divergence()) of a task made "
            "with one of them",
        )


def takes_wrong(ask: Callable[..., Any]) -> bool:
    """Whether a metric compares with wrong answers."""
    return "wrong" in _parameters(ask)


def needs_wrong(ask: Callable[..., Any]) -> bool:
    """Whether it cannot do without them."""
    wrong = _parameters(ask).get("wrong")
    return wrong is not None and wrong.default is wrong.empty


def check_wrong(ask: Callable[..., Any], wrong: str | None) -> None:
    """Refuses wrong answers that a metric would not look at."""
    if wrong is not None and not takes_wrong(ask):
        raise TaskError(
            f"wrong={wrong!r}, and {plain(ask).__name__} does not compare with wrong answers",
            exists=f"metrics that do: {_WITH_WRONG}",
            fix="leave wrong out, or metric=logit_diff",
        )


def plain(ask: Callable[..., Any]) -> Any:
    """The function without arguments that were bound to it."""
    return plain(ask.func) if isinstance(ask, partial) else ask


def _parameters(function: Any) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters if callable(function) else {}
    except ValueError:
        return {}
