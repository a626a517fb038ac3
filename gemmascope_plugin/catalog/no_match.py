"""What ``find()`` says when nothing matches: what there is, what is nearest, what to type.

1. A value that nothing has: the values of that argument that exist, and the nearest.
2. Values that exist but not together: for each argument, the values that exist when all the others
   hold.

Costs a few passes over the specs, in the case of an error only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gemmascope_plugin.catalog.criteria import Criterion, Value
from gemmascope_plugin.catalog.spec import SaeSpec
from gemmascope_plugin.errors import UnknownNameError, nearest, shorten


def unknown_model(given: object, names: Iterable[str]) -> UnknownNameError:
    """The refusal of a model that nothing is of."""
    options = sorted(set(names))
    close = nearest(str(given), options)
    return UnknownNameError(
        f"no dictionary has model={given!r}",
        exists=f"model {shorten(options, 16)}",
        nearest=close,
        fix=f"find(model={close.split(' or ')[0] if close else repr(options[0])})",
    )


def unknown(
    criterion: Criterion, value: object, pool: Sequence[SaeSpec], where: str = ""
) -> UnknownNameError:
    """The refusal of a value that no spec of the pool has.

    Args:
        criterion: The argument.
        value: The one of its values that fits nothing.
        pool: What was searched.
        where: Why only this was searched, e.g. `` of gemma-2-2b``.
    """
    values = _values(criterion, pool)
    close = _closest(value, values)
    if value == "canonical":
        problem = f"nothing{where} is marked canonical"
    else:
        problem = f"no dictionary{where} has {criterion.name}={value!r}"
    example = close.split(" or ")[0] if close else _example(values)
    return UnknownNameError(
        problem,
        exists=f"{criterion.name} {_shown(values)}" if values else None,
        nearest=close,
        fix=f"find({criterion.name}={example})" if values else "find() with fewer arguments",
    )


def nothing_together(criteria: Sequence[Criterion], pool: Sequence[SaeSpec]) -> UnknownNameError:
    """The refusal of arguments that no spec meets all of."""
    given = ", ".join(f"{c.name}={c.given!r}" for c in criteria)
    possible, close = [], None
    for criterion in sorted(criteria, key=lambda c: c.name != "l0"):
        others = [s for s in pool if all(c.matches(s) for c in criteria if c is not criterion)]
        if values := _values(criterion, others):
            possible.append(f"{criterion.name} {_shown(values)} (the rest as given)")
            number = _closest(criterion.given, values)
            close = close or (f"{criterion.name}={number}" if number else None)
    return UnknownNameError(
        f"no dictionary has {given} together",
        exists="; ".join(possible) or None,
        nearest=close,
        fix="find() with fewer arguments shows what there is",
    )


def _values(criterion: Criterion, specs: Iterable[SaeSpec]) -> list[Value]:
    """The values that a criterion could take, in order; widths by size."""
    pairs = {
        (s.d_sae if criterion.name == "width" else value, value)
        for s in specs
        for value in criterion.values(s)
    }
    return list(dict.fromkeys(value for _, value in sorted(pairs)))


def _closest(given: object, values: Sequence[Value]) -> str | None:
    """The nearest number, or the nearest name."""
    numbers = [v for v in values if not isinstance(v, str)]
    if numbers and isinstance(given, (int, float)):
        return f"{min(numbers, key=lambda v: abs(v - given)):.12g}"
    return nearest(str(given), (str(v) for v in values)) if isinstance(given, (str, int)) else None


def _shown(values: Sequence[Value]) -> str:
    numbers = [v for v in values if not isinstance(v, str)]
    if len(numbers) > 8:
        return f"{numbers[0]:.12g} to {numbers[-1]:.12g}"
    return shorten([v if isinstance(v, str) else f"{v:.12g}" for v in values])


def _example(values: Sequence[Value]) -> str:
    first = values[0] if values else None
    if isinstance(first, str) and (first in ("True", "False") or first.startswith("(")):
        return first  # a flag or a tuple, not a word
    return f"{first:g}" if isinstance(first, float) else repr(first)
