"""Arguments of ``find()`` as tests on a spec.

1. A list asks for any of its values; ``range`` and, for numbers, a pair ``(low, high)`` ask for an
   interval.  Each value has a test of its own, so that a single wrong one can be named.
2. Words are compared without regard to case, sites and widths through their other names.
3. A crosscoder or CLT has all of its layers and hooks.

A test costs about 0.2 microseconds per spec.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from gemmascope_plugin.catalog.site_names import KIND_WORDS, SITE_ALIASES, SITES
from gemmascope_plugin.catalog.spec import SaeSpec
from gemmascope_plugin.errors import UnknownNameError, nearest, shorten
from gemmascope_plugin.indices import as_index, as_indices

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
    given: object
    tests: Sequence[tuple[object, Test]]
    values: Callable[[SaeSpec], Iterable[Value]]
    """The values of a spec that the argument could ask for."""

    def matches(self, spec: SaeSpec) -> bool:
        """Whether one of the values fits."""
        return any(test(spec) for _, test in self.tests)


def site(given: str | Sequence[str], *, several: bool = False) -> Criterion:
    """Where it lives; words for a kind (``transcoder``) and folders (``resid_post_all``) too.

    ``several`` says whether a site also means the dictionaries of several layers that live there.
    """
    tests = [(w, _site_test(w, several)) for w in as_words(given)]
    return Criterion(
        "site", given, tests, lambda s: [s.site] if several or not s.layers else [s.kind]
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

    def found(spec: SaeSpec) -> bool:
        if kind is not None:
            here = spec.kind == kind
        else:
            here = spec.site == site and (several or not spec.layers)
        return here and (stem == lower or spec.variant == "all")

    return found


def layer(given: Any) -> Criterion:
    """A layer that the dictionary reads."""
    tests: list[tuple[object, Test]]
    if isinstance(given, range):  # an interval: the part beyond the last layer is no mistake
        tests = [(given, lambda s: any(n in given for n in s.all_layers))]
    else:
        numbers = as_indices(given)
        if numbers is None:
            text = given.strip() if isinstance(given, str) else ""
            raise UnknownNameError(
                f"layer={given!r} is not the number of a layer",
                exists="a number, a list of numbers, or a range",
                fix=f"layer={int(text)}" if text.isdecimal() else "layer=12, or layer=[12, 20]",
            )
        tests = [(n, lambda s, n=n: n == s.layer or n in s.layers) for n in numbers]
    return Criterion("layer", given, tests, lambda s: s.all_layers)


def width(given: str | int | range | Sequence[str | int]) -> Criterion:
    """Label or number of features."""
    tests: list[tuple[object, Test]]
    if isinstance(given, range):
        tests = [(given, lambda s: given.start <= s.d_sae < given.stop)]
    else:
        is_single = isinstance(given, str) or as_index(given) is not None
        words = [given] if is_single or not isinstance(given, Iterable) else list(given)
        labels = [word if isinstance(word, str) else as_index(word) for word in words]
        if None in labels:
            raise UnknownNameError(f"width={given!r} is not a width", fix='width="16k", or 16384')
        tests = [(label, _width_test(str(label).lower())) for label in labels]
    return Criterion("width", given, tests, lambda s: [s.width])


def _width_test(word: str) -> Test:
    return lambda s: s.width == word or str(s.d_sae) == word


def kind(given: str | Sequence[str]) -> Criterion:
    """What it maps; the plural is understood."""
    words = [(w, KIND_WORDS.get(w.lower(), w.lower().removesuffix("s"))) for w in as_words(given)]
    tests = [(word, lambda s, name=name: s.kind == name) for word, name in words]
    return Criterion("kind", given, tests, lambda s: [s.kind])


def variant(given: str | Sequence[str]) -> Criterion:
    """``plain``, ``all``, ``seed_1`` and so on."""
    words = [(w, w.lower()) for w in as_words(given)]
    tests = [(word, lambda s, name=name: (s.variant or PLAIN) == name) for word, name in words]
    return Criterion("variant", given, tests, lambda s: [s.variant or PLAIN])


def hook(name: str, given: str | Sequence[str]) -> Criterion:
    """A hook that the dictionary reads (``hook_in``) or writes (``hook_out``)."""
    attribute = "hooks_in" if name == "hook_in" else "hooks_out"
    words = as_words(given)
    tests = [(word, lambda s, w=word: w in getattr(s, attribute)) for word in words]
    return Criterion(name, given, tests, lambda s: getattr(s, attribute))


def number(name: str, given: int | range | Sequence[int]) -> Criterion:
    """A whole number of the spec: one, a list of them, a range, or a pair ``(low, high)``."""
    tests: list[tuple[object, Test]]
    if isinstance(given, range):
        tests = [(given, lambda s: given.start <= getattr(s, name) < given.stop)]
    elif isinstance(given, tuple) and len(given) == 2:
        low, high = given
        tests = [(given, lambda s: low <= getattr(s, name) <= high)]
    else:
        numbers = as_indices(given)
        if numbers is None:
            raise UnknownNameError(
                f"{name}={given!r} is not a number",
                exists="a whole number, a list of them, a range, a pair (low, high)",
            )
        tests = [(n, lambda s, n=n: getattr(s, name) == n) for n in numbers]
    return Criterion(name, given, tests, lambda s: [getattr(s, name)])


def equal(name: str, given: Any) -> Criterion:
    """A field that is one of the given words, or equals a flag or a tuple of numbers."""
    is_list = isinstance(given, Sequence) and not isinstance(given, (str, tuple))
    tests = [(v, lambda s, v=v: getattr(s, name) == v) for v in (given if is_list else [given])]
    return Criterion(name, given, tests, lambda s: _texts(getattr(s, name)))


def _texts(value: object) -> list[Value]:
    if value is None:
        return []
    return [value if isinstance(value, str) else repr(value)]


def l0(given: str | int | float | Sequence[int | float]) -> Criterion:
    """Sparsity: a number, a label, ``canonical``, ``nearest:80``, a pair or a list."""
    if isinstance(given, list):
        tests = [(one, _l0_test(one)) for one in given]
    else:
        tests = [(given, _l0_test(given))]
    return Criterion("l0", given, tests, lambda s: [] if s.l0 is None else [s.l0])


def _l0_test(given: str | int | float | Sequence[int | float]) -> Test:
    if given == "canonical":
        return lambda s: s.canonical
    if given in LABELS:
        return lambda s: s.l0_label == given
    if target(given) is not None:
        return lambda s: s.l0 is not None
    if not isinstance(given, (str, int, float)):
        if len(given) != 2:
            raise UnknownNameError(f"l0={given!r} is not a range (low, high)", fix=L0_FIX)
        low, high = _number(given[0]), _number(given[1])
        return lambda s: s.l0 is not None and low <= s.l0 <= high
    exact = _number(given)
    return lambda s: s.l0 is not None and exact in (s.l0, round(s.l0))


def target(given: object) -> float | None:
    """The L0 asked for in ``nearest:80``."""
    if not isinstance(given, str) or not given.startswith("nearest:"):
        return None
    return _number(given.removeprefix("nearest:"), given)


def _number(text: object, given: object = None) -> float:
    try:
        return float(text)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):
        raise UnknownNameError(
            f"l0={given if given is not None else text!r} is not understood",
            nearest=nearest(str(text), ("canonical", *LABELS, "nearest:80")),
            fix=L0_FIX,
        ) from None


def as_words(given: str | Sequence[str]) -> list[str]:
    """One word or several.

    Raises:
        UnknownNameError: Something else.
    """
    words = [given] if isinstance(given, str) or not isinstance(given, Iterable) else list(given)
    for word in words:
        if not isinstance(word, str):
            raise UnknownNameError(f"{word!r} is not a name", exists="texts, one or several")
    return words
