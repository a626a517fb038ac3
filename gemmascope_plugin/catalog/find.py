"""``find()``: dictionaries by what they are, never by path, in a list that explains itself.

1. A model or a release narrows the pool; every other argument becomes a criterion (``criteria``).
2. A criterion that no spec of the pool meets is a mistake on its own: unknown name, nearest match.
3. Criteria that each match something but nothing together: for each one, the values that exist
   when the others hold are listed.
4. ``l0="nearest:80"`` picks last, one spec per release, site, layer, width and flags; ties go to the
   sparser one.  ``l0="canonical"`` leaves one per site, layer, width and affine flag: where the suite
   of all layers and the suite of the chosen layers both have one, that of the chosen layers.
5. ``site="res"`` asks for dictionaries of that one tensor.  Crosscoders and CLTs live at several layers
   and are found by their kind, or when other arguments name them (``_NAMES_SEVERAL``).

Gemma Scope comes before the suites of others, and within a model residual dictionaries before attention,
MLP, transcoders and those of several layers.  Canonical releases list the same files again and are
searched only when named.  Listed and derived entries are both found.  The first search builds the
tables it needs, 2 ms for one model and 35 ms for all; later ones cost below a microsecond per spec.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, SupportsIndex, overload

import gemmascope_plugin.catalog.criteria as criteria
from gemmascope_plugin.arguments import human_size
from gemmascope_plugin.catalog.criteria import Criterion
from gemmascope_plugin.catalog.spec import SaeSpec
from gemmascope_plugin.catalog.tables import canonical_releases, models, resolve_model, specs_of
from gemmascope_plugin.errors import AmbiguousSpecError, number_of, shorten

if TYPE_CHECKING:
    import pandas as pd

_Words = str | Sequence[str]
_Numbers = int | range | Sequence[int]

_SPECIAL = {
    "layer": criteria.layer,
    "width": criteria.width,
    "kind": criteria.kind,
    "l0": criteria.l0,
    "variant": criteria.variant,
}
_NUMBERS = ("d_in", "d_out", "d_sae", "nbytes")
_HOOKS = ("hook_in", "hook_out")
_NAMES_SEVERAL = {"kind", "layers", "format", "release", "sae_id", "path", "neuronpedia_id"}
"""Arguments with which a site also means the crosscoders and CLTs that live there."""
_NAMES_VARIANT = {"variant", "release", "sae_id", "path", "neuronpedia_id"}
"""Arguments that say which of several suites is meant."""


def find(
    *,
    model: _Words | None = None,
    site: _Words | None = None,
    layer: SupportsIndex | Iterable[SupportsIndex] | None = None,
    width: str | int | range | Sequence[str | int] | None = None,
    l0: str | int | float | Sequence[int | float] | None = None,
    kind: _Words | None = None,
    release: _Words | None = None,
    sae_id: _Words | None = None,
    affine: bool | None = None,
    variant: _Words | None = None,
    provenance: _Words | None = None,
    canonical: bool | None = None,
    d_in: _Numbers | None = None,
    d_out: _Numbers | None = None,
    d_sae: _Numbers | None = None,
    nbytes: _Numbers | None = None,
    hook_in: _Words | None = None,
    hook_out: _Words | None = None,
    repo_id: _Words | None = None,
    path: _Words | None = None,
    neuronpedia_id: _Words | None = None,
    levels: tuple[int, ...] | None = None,
    format: _Words | None = None,
    l0_is: _Words | None = None,
    l0_label: _Words | None = None,
    gain: _Words | None = None,
    layers: tuple[int, ...] | None = None,
) -> SpecList:
    """All dictionaries that meet every given argument.

    Words and numbers may be lists, which ask for any of their values; ``range(...)`` and pairs
    ``(low, high)``, ends included, ask for an interval of numbers.

    Args:
        model: ``gemma-3-4b-it``, ``google/gemma-3-4b-it`` or short, ``4b-it``.
        site: ``res``, ``att``, ``mlp``, ``embedding`` or another name of one of them, such as
            ``resid_post`` or ``attn_z``; ``transcoder``, ``crosscoder`` and ``clt`` ask for that
            kind, ``resid_post_all`` and the like for that folder.  Without ``kind`` a site does not
            mean crosscoders and CLTs.
        layer: A layer, a list or a range of layers; of a dictionary of several layers, any of them.
        width: A label, ``16k``, a number of features, ``16384``, a list or a range of features.
        l0: ``"canonical"``; a number; ``"nearest:80"``; a pair ``(low, high)``; a list of numbers;
            or Gemma Scope 2's ``"small"``, ``"medium"``, ``"big"``.
        kind: ``sae``, ``transcoder``, ``crosscoder`` or ``clt``.
        release: A release name; a canonical release is searched only when named here.
        sae_id: Id in the release.
        affine: With or without an affine skip.
        variant: ``plain``, ``all`` (the suites of every layer), ``seed_1`` and so on.
        provenance: ``listed`` or ``derived``; by default both.
        canonical: Whether it is the canonical choice.
        d_in: Width of the tensor read; numbers may be pairs and ranges.
        d_out: Width of the tensor reconstructed.
        d_sae: Number of features.
        nbytes: Size of the parameters, e.g. ``(0, 10**9)``.
        hook_in: A hook that it reads.
        hook_out: A hook that it reconstructs.
        repo_id: Repository.
        path: Folder in the repository.
        neuronpedia_id: Neuronpedia's id, model and source.
        levels: Matryoshka prefix sizes, all of them.
        format: Layout of the files, e.g. ``gemma-scope-2``.
        l0_is: ``measured`` or ``target``.
        l0_label: ``small``, ``medium`` or ``big``.
        gain: ``with`` or ``without`` the gain of the norm before the MLP.
        layers: Of a crosscoder or CLT, all its layers.

    Returns:
        The specs, in the order above; never empty.

    Raises:
        UnknownNameError: A value does not exist, or the values do not exist together.

    Example:
        >>> gs.find(model="2b", site="res", layer=12, width="16k", l0="canonical")
        release                id                                kind  site  layer  width  l0
          canonical  size      provenance
        gemma-scope-2b-pt-res  layer_12/width_16k/average_l0_82  sae   res   12     16k    82  *
          302.1 MB  listed
        1 dictionary
    """
    arguments = {name: value for name, value in locals().items() if value is not None}
    pool, where = _pool(arguments.pop("release", None), arguments.get("model"))
    several = release is not None or not _NAMES_SEVERAL.isdisjoint(arguments)
    criterion_list = list(_criteria(arguments, several))
    for criterion in criterion_list:
        for value, test in criterion.tests:
            if not any(map(test, pool)):
                raise criteria.unknown_value(criterion, value, pool, where)
    specs = [s for s in pool if all(c.matches(s) for c in criterion_list)]
    if not specs:
        whole_catalog = pool if release is not None else _pool(None, None)[0]
        raise criteria.nothing_together(criterion_list, whole_catalog)
    if l0 == "canonical" and release is None and _NAMES_VARIANT.isdisjoint(arguments):
        specs = _one_suite(specs)
    return SpecList(_nearest_l0(specs, criteria.target(l0)))


def _pool(release: _Words | None, model: _Words | None) -> tuple[list[SaeSpec], str]:
    """What to search, and how to call it in an error."""
    if release is not None:
        names = criteria.as_words(release)
        return [s for name in names for s in specs_of(name)], f" of {', '.join(names)}"
    skipped = canonical_releases()
    plain = {name: of for name, of in models().items() if name not in skipped}
    if model is None:
        return [s for name in plain for s in specs_of(name)], ""
    meant = _models(model)
    where = f" of {', '.join(meant)}"
    return [s for name, of in plain.items() if of in meant for s in specs_of(name)], where


def _models(words: _Words) -> list[str]:
    """The models meant by the words."""
    names = set(models().values())
    meant = []
    for word in criteria.as_words(words):
        name = resolve_model(word, names)
        if name is None:
            raise criteria.unknown_model(word, names)
        meant.append(name)
    return meant


def _criteria(arguments: dict[str, Any], several: bool) -> Iterator[Criterion]:
    for name, value in arguments.items():
        if name == "model":
            meant = _models(value)
            tests = [(value, lambda s, meant=meant: s.model in meant)]
            yield Criterion("model", value, tests, lambda s: [s.model])
        elif name == "site":
            yield criteria.site(value, several=several)
        elif name in _SPECIAL:
            yield _SPECIAL[name](value)
        elif name in _NUMBERS:
            yield criteria.number(name, value)
        elif name in _HOOKS:
            yield criteria.hook(name, value)
        else:
            yield criteria.equal(name, value)


def _one_suite(specs: Sequence[SaeSpec]) -> list[SaeSpec]:
    """The plain dictionary where there is one at this place, else the one of the other suite."""
    best: dict[tuple[object, ...], SaeSpec] = {}
    for spec in specs:
        place = (spec.model, spec.kind, spec.site, spec.layer, spec.d_sae, spec.affine)
        if place not in best or (best[place].variant and not spec.variant):
            best[place] = spec
    # The chosen layers and the others are two releases; together they are one row of layers.
    groups = list(dict.fromkeys(place[:3] for place in best))
    return sorted(best.values(), key=lambda s: (groups.index((s.model, s.kind, s.site)), s.layer))


def _nearest_l0(specs: Sequence[SaeSpec], target: float | None) -> list[SaeSpec]:
    if target is None:
        return list(specs)
    best: dict[tuple[object, ...], SaeSpec] = {}
    for spec in specs:
        key = (
            *(spec.release, spec.site, spec.kind, spec.layer, spec.d_sae),
            *(spec.affine, spec.variant),
        )
        distance = (abs((spec.l0 or 0.0) - target), spec.l0)
        nearest = best.get(key)
        if nearest is None or distance < (abs((nearest.l0 or 0.0) - target), nearest.l0):
            best[key] = spec
    return list(best.values())


COLUMNS = (
    *("release", "id", "kind", "site", "layer", "width", "l0", "canonical", "size"),
    "provenance",
)
TEXT_ROWS = 10
HTML_ROWS = 50
_TELLING = ("model", "kind", "site", "layer", "width", "variant", "affine", "l0", "release")


class SpecList(Sequence[SaeSpec]):
    """An immutable list of specs.

    Args:
        specs: What it holds, in order.
    """

    def __init__(self, specs: Iterable[SaeSpec] = ()) -> None:
        self._specs = tuple(specs)

    def __len__(self) -> int:
        return len(self._specs)

    @overload
    def __getitem__(self, index: int) -> SaeSpec: ...

    @overload
    def __getitem__(self, index: slice) -> SpecList: ...

    def __getitem__(self, index: int | slice) -> SaeSpec | SpecList:
        if isinstance(index, slice):
            return SpecList(self._specs[index])
        return self._specs[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SpecList) and self._specs == other._specs

    def __hash__(self) -> int:
        return hash(self._specs)

    def one(self) -> SaeSpec:
        """The only spec in the list.

        Raises:
            AmbiguousSpecError: There are none or several; says which argument tells them apart.
        """
        if len(self) == 1:
            return self[0]
        if not self:
            raise AmbiguousSpecError("one() of an empty list", fix="find(...) with other arguments")
        raise AmbiguousSpecError(
            f"{len(self)} dictionaries match, one is needed",
            exists=shorten([f"{s.release} {s.sae_id}" for s in self], 4),
            fix=" or ".join(self._telling_arguments()),
        )

    def _telling_arguments(self) -> list[str]:
        """Arguments of ``find`` that take several values here, each with those values."""
        hints = []
        for name in _TELLING:
            values = sorted({getattr(s, name) for s in self}, key=lambda v: (v is None, v))
            if name == "width":
                values = list(
                    dict.fromkeys(w for _, w in sorted({(s.d_sae, s.width) for s in self}))
                )
            elif name == "variant":
                values = ["plain" if v is None else v for v in values]
            elif name == "l0":
                values = [v for v in values if v is not None]
            if len(values) > 1:
                marked = (
                    "'canonical' or " if name == "l0" and any(s.canonical for s in self) else ""
                )
                shown = [f"{v:g}" if isinstance(v, float) else repr(v) for v in values]
                hints.append(f"{name}={marked}one of {shorten(shown, 6)}")
        return hints or [f"sae_id={self[0].sae_id!r}"]

    def to_frame(self) -> pd.DataFrame:
        """One row per spec, one column per field."""
        import pandas as pd

        return pd.DataFrame([spec.to_dict() for spec in self])

    def _rows(self, limit: int) -> list[tuple[str, ...]]:
        return [
            (
                s.release,
                s.sae_id,
                s.kind,
                s.site,
                s.layer_text,
                s.width,
                s.l0_text,
                "*" if s.canonical else "",
                human_size(s.nbytes),
                s.provenance,
            )
            for s in self._specs[:limit]
        ]

    def _note(self, limit: int) -> str:
        more = f", {len(self) - limit} more not shown" if len(self) > limit else ""
        return number_of(len(self), "dictionary") + more

    def __repr__(self) -> str:
        lines = [COLUMNS, *self._rows(TEXT_ROWS)]
        widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
        text = "\n".join(
            "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )
        return f"{text}\n{self._note(TEXT_ROWS)}"

    def _repr_html_(self) -> str:
        from gemmascope_plugin.figures.fragments import table

        return table(COLUMNS, self._rows(HTML_ROWS), self._note(HTML_ROWS))
