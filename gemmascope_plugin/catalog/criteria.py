"""Arguments of ``find()`` as tests on a spec, and the errors when nothing passes them.

1. A list asks for any of its values; ``range`` and, for numbers, a pair ``(low, high)`` ask for an
   interval.  Each value has a test of its own, so that a single wrong one can be named.
2. Words are compared without regard to case, sites and widths through their other names.
3. A crosscoder or CLT has all of its layers and hooks.

A test costs about 0.2 microseconds per spec.  An error says what there is, what is nearest, what to type:

1. A value that nothing has: the values of that argument that exist, and the nearest.
2. Values that exist but not together: for each argument, the values that exist when all the others
   hold.

It costs a few passes over the specs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from gemmascope_plugin.arguments import as_index, as_indices
from gemmascope_plugin.catalog.site_names import KIND_WORDS, SITE_ALIASES, SITES
from gemmascope_plugin.catalog.spec import SaeSpec
from gemmascope_plugin.errors import UnknownNameError, nearest, shorten

L0_FIX = "l0='canonical', l0='medium', l0=71, l0='nearest:80', l0=(50, 100) or l0=[38, 71]"
LABELS = ("small", "medium", "big")
PLAIN = "plain"
"""How the variant of a dictionary without one is called."""

Test = Callable[[SaeSpec], bool]
Value = str | int | float


@dataclass(frozen=True)
class Criterion:
    """One argument: the tests of its values, of which one must hold, and what they look at."""

    name: str
    value: object
    """What was asked for."""
    tests: Sequence[tuple[object, Test]]
    values: Callable[[SaeSpec], Iterable[Value]]
    """The values of a spec that the argument could ask for."""

    def matches(self, spec: SaeSpec) -> bool:
        """Whether one of the values fits."""
        return any(test(spec) for _, test in self.tests)


def site(value: str | Sequence[str], *, several: bool = False) -> Criterion:
    """Where it lives; words for a kind (``transcoder``) and folders (``resid_post_all``) too.

    ``several`` says whether a site also means the dictionaries of several layers that live there.
    """
    tests = [(w, _site_test(w, several)) for w in as_words(value)]
    return Criterion(
        "site", value, tests, lambda s: [s.site] if several or not s.layers else [s.kind]
    )


def _site_test(word: str, several: bool) -> Test:
    lower = word.lower()
    stem = lower.removesuffix("_all")
    kind, site = KIND_WORDS.get(stem), SITE_ALIASES.get(stem)
    if kind is None and site is None:
        close = nearest(word, (*SITE_ALIASES, *KIND_WORDS))
        raise UnknownNameError(
            f"no site {word!r}",
            exists=shorten((*SITES, *dict.fromkeys(KIND_WORDS.values()))),
            nearest=close,
            fix=f"site={close.split(' or ')[0] if close else repr(SITES[0])}",
        )

    def test(spec: SaeSpec) -> bool:
        if kind is not None:
            is_place = spec.kind == kind
        else:
            is_place = spec.site == site and (several or not spec.layers)
        return is_place and (stem == lower or spec.variant == "all")

    return test


def layer(value: Any) -> Criterion:
    """A layer that the dictionary reads."""
    tests: list[tuple[object, Test]]
    if isinstance(value, range):  # an interval: the part beyond the last layer is not a mistake
        tests = [(value, lambda s: any(n in value for n in s.all_layers))]
    else:
        numbers = as_indices(value)
        if numbers is None:
            text = value.strip() if isinstance(value, str) else ""
            raise UnknownNameError(
                f"layer={value!r} is not the number of a layer",
                exists="a number, a list of numbers, or a range",
                fix=f"layer={int(text)}" if text.isdecimal() else "layer=12, or layer=[12, 20]",
            )
        tests = [(n, lambda s, n=n: n == s.layer or n in s.layers) for n in numbers]
    return Criterion("layer", value, tests, lambda s: s.all_layers)


def width(value: str | int | range | Sequence[str | int]) -> Criterion:
    """Label or number of features."""
    tests: list[tuple[object, Test]]
    if isinstance(value, range):
        tests = [(value, lambda s: value.start <= s.d_sae < value.stop)]
    else:
        is_single = isinstance(value, str) or as_index(value) is not None
        words = [value] if is_single or not isinstance(value, Iterable) else list(value)
        labels = [word if isinstance(word, str) else as_index(word) for word in words]
        if None in labels:
            raise UnknownNameError(f"width={value!r} is not a width", fix='width="16k", or 16384')
        tests = [(label, _width_test(str(label).lower())) for label in labels]
    return Criterion("width", value, tests, lambda s: [s.width])


def _width_test(word: str) -> Test:
    return lambda s: s.width == word or str(s.d_sae) == word


def kind(value: str | Sequence[str]) -> Criterion:
    """What it maps; the plural is understood."""
    words = [(w, KIND_WORDS.get(w.lower(), w.lower().removesuffix("s"))) for w in as_words(value)]
    tests = [(word, lambda s, name=name: s.kind == name) for word, name in words]
    return Criterion("kind", value, tests, lambda s: [s.kind])


def variant(value: str | Sequence[str]) -> Criterion:
    """``plain``, ``all``, ``seed_1`` and so on."""
    words = [(w, w.lower()) for w in as_words(value)]
    tests = [(word, lambda s, name=name: (s.variant or PLAIN) == name) for word, name in words]
    return Criterion("variant", value, tests, lambda s: [s.variant or PLAIN])


def hook(name: str, value: str | Sequence[str]) -> Criterion:
    """A hook that the dictionary reads (``hook_in``) or writes (``hook_out``)."""
    attribute = "hooks_in" if name == "hook_in" else "hooks_out"
    words = as_words(value)
    tests = [(word, lambda s, w=word: w in getattr(s, attribute)) for word in words]
    return Criterion(name, value, tests, lambda s: getattr(s, attribute))


def number(name: str, value: int | range | Sequence[int]) -> Criterion:
    """A whole number of the spec: one, a list of them, a range, or a pair ``(low, high)``."""
    tests: list[tuple[object, Test]]
    if isinstance(value, range):
        tests = [(value, lambda s: value.start <= getattr(s, name) < value.stop)]
    elif isinstance(value, tuple) and len(value) == 2:
        low, high = value
        tests = [(value, lambda s: low <= getattr(s, name) <= high)]
    else:
        numbers = as_indices(value)
        if numbers is None:
            raise UnknownNameError(
                f"{name}={value!r} is not a number",
                exists="a whole number, a list of them, a range, a pair (low, high)",
            )
        tests = [(n, lambda s, n=n: getattr(s, name) == n) for n in numbers]
    return Criterion(name, value, tests, lambda s: [getattr(s, name)])


def equal(name: str, value: Any) -> Criterion:
    """A field that is one of the given words, or equals a flag or a tuple of numbers."""
    is_list = isinstance(value, Sequence) and not isinstance(value, (str, tuple))
    tests = [(v, lambda s, v=v: getattr(s, name) == v) for v in (value if is_list else [value])]
    return Criterion(name, value, tests, lambda s: _texts(getattr(s, name)))


def _texts(value: object) -> list[Value]:
    if value is None:
        return []
    return [value if isinstance(value, str) else repr(value)]


def l0(value: str | int | float | Sequence[int | float]) -> Criterion:
    """Sparsity: a number, a label, ``canonical``, ``nearest:80``, a pair or a list."""
    if isinstance(value, list):
        tests = [(each, _l0_test(each)) for each in value]
    else:
        tests = [(value, _l0_test(value))]
    return Criterion("l0", value, tests, lambda s: [] if s.l0 is None else [s.l0])


def _l0_test(value: str | int | float | Sequence[int | float]) -> Test:
    if value == "canonical":
        return lambda s: s.canonical
    if value in LABELS:
        return lambda s: s.l0_label == value
    if target(value) is not None:
        return lambda s: s.l0 is not None
    if not isinstance(value, (str, int, float)):
        if len(value) != 2:
            raise UnknownNameError(f"l0={value!r} is not a range (low, high)", fix=L0_FIX)
        low, high = _number(value[0]), _number(value[1])
        return lambda s: s.l0 is not None and low <= s.l0 <= high
    exact = _number(value)
    return lambda s: s.l0 is not None and exact in (s.l0, round(s.l0))


def target(value: object) -> float | None:
    """The L0 asked for in ``nearest:80``."""
    if not isinstance(value, str) or not value.startswith("nearest:"):
        return None
    return _number(value.removeprefix("nearest:"), value)


def _number(text: object, shown: object = None) -> float:
    try:
        return float(text)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):
        raise UnknownNameError(
            f"l0={shown if shown is not None else text!r} is not understood",
            nearest=nearest(str(text), ("canonical", *LABELS, "nearest:80")),
            fix=L0_FIX,
        ) from None


def as_words(value: str | Sequence[str]) -> list[str]:
    """One word or several; anything else is refused."""
    words = [value] if isinstance(value, str) or not isinstance(value, Iterable) else list(value)
    for word in words:
        if not isinstance(word, str):
            raise UnknownNameError(f"{word!r} is not a name", exists="texts, one or several")
    return words


def unknown_model(name: object, names: Iterable[str]) -> UnknownNameError:
    """The refusal of a model that nothing is of."""
    options = sorted(set(names))
    close = nearest(str(name), options)
    return UnknownNameError(
        f"no dictionary has model={name!r}",
        exists=f"model {shorten(options, 16)}",
        nearest=close,
        fix=f"find(model={close.split(' or ')[0] if close else repr(options[0])})",
    )


def unknown_value(
    criterion: Criterion, value: object, pool: Sequence[SaeSpec], where: str = ""
) -> UnknownNameError:
    """The refusal of a value that no spec of the pool has; ``where`` says why only this was searched."""
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
    arguments = ", ".join(f"{c.name}={c.value!r}" for c in criteria)
    possible, close = [], None
    for criterion in sorted(criteria, key=lambda c: c.name != "l0"):
        remaining = [s for s in pool if all(c.matches(s) for c in criteria if c is not criterion)]
        if values := _values(criterion, remaining):
            possible.append(f"{criterion.name} {_shown(values)} (the rest as given)")
            number = _closest(criterion.value, values)
            close = close or (f"{criterion.name}={number}" if number else None)
    return UnknownNameError(
        f"no dictionary has {arguments} together",
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


def _closest(value: object, values: Sequence[Value]) -> str | None:
    """The nearest number, or the nearest name."""
    numbers = [v for v in values if not isinstance(v, str)]
    if numbers and isinstance(value, (int, float)):
        return f"{min(numbers, key=lambda v: abs(v - value)):.12g}"
    return nearest(str(value), (str(v) for v in values)) if isinstance(value, (str, int)) else None


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
