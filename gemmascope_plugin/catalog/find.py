"""``find()``: dictionaries by what they are, never by path.

1. Every argument becomes a criterion: a test on a spec, and the value of the spec that it looks at.
2. A criterion that no spec of the pool meets is a mistake on its own: unknown name, nearest match.
3. Criteria that each match something but nothing together: for each one, the values that exist
   when the others hold are listed.
4. ``l0="nearest:80"`` picks last, one spec per (release, site, kind, layer, width); ties go to the
   sparser one.

The pool is every plain release; canonical releases list the same files again and are searched only
when named.  A search over all tables takes about a millisecond.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from gemmascope_plugin.catalog.sites import KINDS, SITE_ALIASES, SITES, TRANSCODER_WORDS
from gemmascope_plugin.catalog.spec import SaeSpec
from gemmascope_plugin.catalog.spec_list import SpecList
from gemmascope_plugin.catalog.tables import canonical_releases, specs_of, tables
from gemmascope_plugin.errors import UnknownNameError, nearest, shorten

_L0_FIX = "l0='canonical', l0=71, l0='nearest:80' or l0=(50, 100)"


_Test = Callable[[SaeSpec], bool]


@dataclass(frozen=True)
class _Criterion:
    """One argument: the tests of its values, of which one must hold, and what they look at."""

    name: str
    given: object
    tests: Sequence[tuple[object, _Test]]
    value: Callable[[SaeSpec], str | int | float | None]

    def matches(self, spec: SaeSpec) -> bool:
        return any(test(spec) for _, test in self.tests)


def find(
    *,
    model: str | None = None,
    site: str | Sequence[str] | None = None,
    layer: int | Iterable[int] | None = None,
    width: str | int | Sequence[str | int] | None = None,
    l0: str | int | float | Sequence[int | float] | None = None,
    kind: str | None = None,
    release: str | None = None,
    sae_id: str | None = None,
) -> SpecList:
    """All dictionaries that meet every given argument.

    Args:
        model: ``gemma-2-2b``, ``google/gemma-2-2b`` or short, ``2b``.
        site: ``res``, ``att``, ``mlp``, ``embedding`` or another name of one of them, such as
            ``resid_post`` or ``attn_z``; ``transcoder`` asks for that kind.  Several may be given.
        layer: A layer, a list or a range of layers.
        width: A label, ``16k``, or a number of features, ``16384``, or a list of them.
        l0: ``"canonical"``; a number; ``"nearest:80"``; or a range ``(low, high)``, ends included.
        kind: ``sae`` or ``transcoder``.
        release: A release name; a canonical release is searched only when named here.
        sae_id: Id in the release.

    Returns:
        The specs in the order of the tables; never empty.

    Raises:
        UnknownNameError: A value does not exist, or the values do not exist together.
    """
    if release is None:
        pool = [s for name, t in tables().items() if name not in canonical_releases() for s in t]
    else:
        pool = list(specs_of(release))
    criteria = [
        *_model(model, pool),
        *_site(site),
        *_layer(layer),
        *_width(width),
        *_kind(kind),
        *_sae_id(sae_id),
        *_l0(l0),
    ]
    for criterion in criteria:
        for value, test in criterion.tests:
            if not any(map(test, pool)):
                raise _unknown(criterion, value, pool)
    found = [s for s in pool if all(c.matches(s) for c in criteria)]
    if not found:
        raise _nothing_together(criteria, pool)
    return SpecList(_nearest_l0(found, _target(l0)))


def _model(given: str | None, pool: Sequence[SaeSpec]) -> list[_Criterion]:
    if given is None:
        return []
    wanted = str(given).lower().removeprefix("google/")
    names = {spec.model for spec in pool}
    short = [name for name in names if name.endswith(f"-{wanted}")]
    name = short[0] if wanted not in names and len(short) == 1 else wanted
    return [_Criterion("model", given, [(given, lambda s: s.model == name)], lambda s: s.model)]


def _site(given: str | Sequence[str] | None) -> list[_Criterion]:
    if given is None:
        return []
    words = [given] if isinstance(given, str) else list(given)
    tests = [(word, _site_test(word)) for word in words]
    return [_Criterion("site", given, tests, lambda s: s.site)]


def _site_test(word: str) -> _Test:
    lower = word.lower()
    if lower in TRANSCODER_WORDS:
        return lambda s: s.kind == "transcoder"
    if lower in SITE_ALIASES:
        return lambda s: s.site == SITE_ALIASES[lower]
    close = nearest(word, (*SITE_ALIASES, *TRANSCODER_WORDS))
    raise UnknownNameError(
        f"no site {word!r}",
        exists=shorten((*SITES, "transcoder")),
        nearest=close,
        fix=f"site={close.split(' or ')[0] if close else repr(SITES[0])}",
    )


def _layer(given: int | Iterable[int] | None) -> list[_Criterion]:
    if given is None:
        return []
    if isinstance(given, range):  # an interval: the part beyond the last layer is no mistake
        tests = [(given, lambda s: s.layer in given)]
    else:
        layers = [given] if isinstance(given, int) else list(given)
        tests = [(n, lambda s, n=n: s.layer == n) for n in layers]
    return [_Criterion("layer", given, tests, lambda s: s.layer)]


def _width(given: str | int | Sequence[str | int] | None) -> list[_Criterion]:
    if given is None:
        return []
    widths = [given] if isinstance(given, (str, int)) else list(given)
    tests = [(w, _width_test(str(w).lower())) for w in widths]
    return [_Criterion("width", given, tests, lambda s: s.width)]


def _width_test(word: str) -> _Test:
    return lambda s: word in (s.width, str(s.d_sae))


def _kind(given: str | None) -> list[_Criterion]:
    if given is None:
        return []
    name = str(given).lower()
    name = name if name in KINDS else name.removesuffix("s")
    return [_Criterion("kind", given, [(given, lambda s: s.kind == name)], lambda s: s.kind)]


def _sae_id(given: str | None) -> list[_Criterion]:
    if given is None:
        return []
    return [_Criterion("sae_id", given, [(given, lambda s: s.sae_id == given)], lambda s: s.sae_id)]


def _l0(given: str | int | float | Sequence[int | float] | None) -> list[_Criterion]:
    if given is None:
        return []
    return [_Criterion("l0", given, [(given, _l0_test(given))], lambda s: s.l0)]


def _l0_test(given: str | int | float | Sequence[int | float]) -> _Test:
    if given == "canonical":
        return lambda s: s.canonical
    if _target(given) is not None:
        return lambda s: s.l0 is not None
    if not isinstance(given, (str, int, float)):
        if len(given) != 2:
            raise UnknownNameError(f"l0={given!r} is not a range (low, high)", fix=_L0_FIX)
        low, high = _number(given[0]), _number(given[1])
        return lambda s: s.l0 is not None and low <= s.l0 <= high
    exact = _number(given)
    return lambda s: s.l0 is not None and exact in (s.l0, round(s.l0))


def _target(given: object) -> float | None:
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
            nearest=nearest(str(text), ("canonical", "nearest:80")),
            fix=_L0_FIX,
        ) from None


def _nearest_l0(found: Sequence[SaeSpec], target: float | None) -> list[SaeSpec]:
    if target is None:
        return list(found)
    best: dict[tuple[object, ...], SaeSpec] = {}
    for spec in found:
        key = (spec.release, spec.site, spec.kind, spec.layer, spec.d_sae)
        distance = (abs((spec.l0 or 0.0) - target), spec.l0)
        kept = best.get(key)
        if kept is None or distance < (abs((kept.l0 or 0.0) - target), kept.l0):
            best[key] = spec
    return list(best.values())


def _values(criterion: _Criterion, specs: Iterable[SaeSpec]) -> list[str | int | float]:
    """The values that a criterion could take, in order; widths by size."""
    pairs = {
        (s.d_sae if criterion.name == "width" else value, value)
        for s in specs
        if (value := criterion.value(s)) is not None
    }
    return [value for _, value in sorted(pairs)]


def _closest(given: object, values: Sequence[str | int | float]) -> str | None:
    """The nearest number, or the nearest name."""
    numbers = [v for v in values if not isinstance(v, str)]
    if numbers and isinstance(given, (int, float)):
        return f"{min(numbers, key=lambda v: abs(v - given)):g}"
    return nearest(str(given), (str(v) for v in values)) if isinstance(given, (str, int)) else None


def _shown(values: Sequence[str | int | float]) -> str:
    numbers = [v for v in values if not isinstance(v, str)]
    if len(numbers) > 8:
        return f"{numbers[0]:g} to {numbers[-1]:g}"
    return shorten([v if isinstance(v, str) else f"{v:g}" for v in values])


def _example(values: Sequence[str | int | float]) -> str:
    first = values[0] if values else None
    return f"{first:g}" if isinstance(first, float) else repr(first)


def _unknown(criterion: _Criterion, value: object, pool: Sequence[SaeSpec]) -> UnknownNameError:
    values = _values(criterion, pool)
    close = _closest(value, values)
    if value == "canonical":
        problem = "nothing is marked canonical here"
    else:
        problem = f"no dictionary has {criterion.name}={value!r}"
    example = close.split(" or ")[0] if close else _example(values)
    return UnknownNameError(
        problem,
        exists=f"{criterion.name} {_shown(values)}",
        nearest=close,
        fix=f"find({criterion.name}={example})",
    )


def _nothing_together(criteria: Sequence[_Criterion], pool: Sequence[SaeSpec]) -> UnknownNameError:
    """For each criterion, the values that exist when all the others hold."""
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
