"""What may stand at the arguments of ``Task.builtin`` and ``Task.from_template``, and what to type else.

Each check is given the argument and the call in words, as the gate hands them over (``models/gate.py``).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from gemmascope_plugin.causes.metric import Metric
from gemmascope_plugin.errors import InputError, TaskError
from gemmascope_plugin.models.protocol import describe, is_model

_FILL = 'fill={"A": ["Mary", "John"], "place": ["park", "store"]}'
_CORRUPT = 'corrupt={"A": "other"}, or the template of the corrupted prompt'
_WITH_WRONG = "logit_diff, probability, sequence_logprob"
_ASKS = f"{_WITH_WRONG}, margin, cross_entropy"


def check_task_name(name: object, call: str) -> None:
    """Refuses what is not a text."""
    if not isinstance(name, str):
        order = f'{call}: the name comes first: Task.builtin("ioi", model)'
        problem = "The model stands where the name of a task belongs"
        raise InputError(
            problem if is_model(name) else f"{describe(name)} is not the name of a task", fix=order
        )


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
