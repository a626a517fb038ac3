"""All releases by name, whichever rule or file their specs come from.

1. A release has a builder: Gemma Scope 1 (ladders of L0s), Gemma Scope 2 (rules), community suites,
   the tables of the bundled dictionaries.
2. Releases are built when first asked for and kept; the names and models alone cost next to nothing.
3. Where ``refresh()`` has listed a repository, its specs are corrected by what was found there.
4. A canonical release lists files of another release again under ids such as
   ``layer_20/width_16k/canonical``.
5. ``google/gemma-3-4b-it``, ``gemma-3-4b-it`` and ``4b-it`` are one model (``resolve_model``); case does
   not matter.  The pretrained models of Gemma 3 end in ``-pt`` (``gemma-3-4b`` is understood), but for
   the 270M (``gemma-3-270m-pt`` is understood); those of Gemma 2 have no ending (``gemma-2-2b-pt`` is
   understood).  A short name that two models share, ``27b``, is refused.

Building everything, 12,194 specs and 429 canonical aliases, costs about 35 ms once per process.

The tables of the bundled dictionaries are one JSON file per release in ``tables/``, which holds what all
rows share once, and short rows:

    {"format": 1, "release": ..., "canonical_release": name or null, "repo_id": ..., "model": ...,
     "groups": [{"kind", "site", "hook_in", "hook_out", "d_in", "d_out", "affine", "levels",
                 "provenance", "format", "gain", "variant", "path", "widths": {label: d_sae},
                 "rows": [[layer, width, l0, canonical 0/1, neuronpedia id], ...]}]}

1. ``hook_in``, ``hook_out`` and ``path`` are templates in ``layer``, ``width`` and ``l0``; the id
   of a dictionary is its path.  The last two cells of a row may be left away, and so may format, gain
   and variant where they are the usual ones.
2. A ``canonical_release`` lists the rows marked canonical a second time.
3. A table is written to a temporary name and renamed, after it was read back as what it should be.

Reading costs a fraction of a millisecond per file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import gemmascope_plugin.catalog.community as community
import gemmascope_plugin.catalog.gemma_scope_1 as gemma_scope_1
import gemmascope_plugin.catalog.gemma_scope_2 as gemma_scope_2
import gemmascope_plugin.catalog.manifest as manifest
from gemmascope_plugin.catalog.manifest import spec_of_folder
from gemmascope_plugin.catalog.site_names import at_layer, path_template, raw_nbytes
from gemmascope_plugin.catalog.spec import DEFAULTS, SaeSpec
from gemmascope_plugin.errors import GemmaScopeError, UnknownNameError, nearest, shorten
from gemmascope_plugin.files.whole import write_text_whole

_OWNERS = ("google/", "openai-community/")
_FAMILIES = ("gemma-2-", "gemma-3-")
_OTHER_NAMES = {"gpt2-small": ("gpt2",)}

FORMAT = 1
TABLES = Path(__file__).with_name("tables")
_SHARED = ("kind", "site", "d_in", "d_out", "affine", "levels", "provenance")
_USUAL = ("format", "gain", "variant")
"""Fields that only stand in a table where they are not the usual ones."""


def parse_release(file: dict[str, Any]) -> tuple[SaeSpec, ...]:
    """The specs of one table."""
    if file["format"] != FORMAT:
        raise GemmaScopeError(f"table of {file['release']!r} has format {file['format']}")
    shared = {key: file[key] for key in ("release", "repo_id", "model")}
    return tuple(
        _parse_row(shared, group, row) for group in file["groups"] for row in group["rows"]
    )


def _parse_row(shared: dict[str, Any], group: dict[str, Any], row: list[Any]) -> SaeSpec:
    layer, width, l0, canonical, neuronpedia_id = row + [0, None][len(row) - 3 :]
    path = group["path"].format(layer=layer, width=width, l0=l0)
    constants: dict[str, Any] = {key: group[key] for key in _SHARED}
    constants |= {key: group[key] for key in _USUAL if key in group}
    constants["levels"] = tuple(group["levels"])
    d_in, d_out, d_sae = group["d_in"], group["d_out"], group["widths"][width]
    return SaeSpec(
        **shared,
        **constants,
        sae_id=path,
        path=path,
        layer=layer,
        width=width,
        d_sae=d_sae,
        l0=float(l0),
        hook_in=group["hook_in"].format(layer=layer),
        hook_out=group["hook_out"].format(layer=layer),
        nbytes=raw_nbytes(d_in, d_out, d_sae, affine=group["affine"]),
        neuronpedia_id=neuronpedia_id,
        canonical=bool(canonical),
    )


def dump_release(specs: Sequence[SaeSpec], *, folder: Path = TABLES) -> Path:
    """Writes the table of one bundled release, to a temporary name that is then renamed.

    Ids must equal paths, and paths follow Gemma Scope's ``layer_{L}/width_{W}/average_l0_{N}`` (or
    ``embedding/...``) with ``l0`` rounded.
    """
    if len({(s.release, s.repo_id, s.model) for s in specs}) != 1:
        raise GemmaScopeError("a table needs specs of exactly one release, repository and model")
    first = specs[0]
    groups: dict[str, dict[str, Any]] = {}
    for spec in specs:
        head = _group_head(spec)
        group = groups.setdefault(json.dumps(head), {**head, "widths": {}, "rows": []})
        group["widths"][spec.width] = spec.d_sae
        group["rows"].append(_row(spec))
    file = {
        "format": FORMAT,
        "release": first.release,
        "canonical_release": None,
        "repo_id": first.repo_id,
        "model": first.model,
        "groups": list(groups.values()),
    }
    if parse_release(file) != tuple(specs):
        raise GemmaScopeError(
            f"specs of {first.release!r} cannot be written as a table",
            exists="the same order of groups, ids equal to paths, paths in Gemma Scope's pattern",
        )
    target = write_text_whole(folder / f"{first.release}.json", _one_row_per_line(file))
    clear_caches()
    return target


def _group_head(spec: SaeSpec) -> dict[str, Any]:
    unusual = {key: getattr(spec, key) for key in _USUAL if getattr(spec, key) != DEFAULTS[key]}
    return {
        **{key: getattr(spec, key) for key in _SHARED},
        **unusual,
        "levels": list(spec.levels),
        "hook_in": at_layer(spec.hook_in, spec.layer, "{layer}"),
        "hook_out": at_layer(spec.hook_out, spec.layer, "{layer}"),
        "path": path_template(spec.format, spec.kind, spec.site, affine=spec.affine),
    }


def _row(spec: SaeSpec) -> list[Any]:
    l0 = int(spec.l0) if spec.l0 is not None and spec.l0 == int(spec.l0) else spec.l0
    row = [spec.layer, spec.width, l0, int(spec.canonical), spec.neuronpedia_id]
    while row[-1] in (None, 0) and len(row) > 3:
        row.pop()
    return row


def _one_row_per_line(file: dict[str, Any]) -> str:
    rows = [row for group in file["groups"] for row in group["rows"]]
    numbered = iter(range(len(rows)))
    groups = [{**g, "rows": [f"@{next(numbered)}@" for _ in g["rows"]]} for g in file["groups"]]
    text = json.dumps({**file, "groups": groups}, indent=1)
    return re.sub(r'"@(\d+)@"', lambda m: json.dumps(rows[int(m[1])]), text) + "\n"


_ORDER = ("res", "att", "mlp", "transcoders")


@cache
def _files() -> dict[str, dict[str, Any]]:
    """Release to its table, for all bundled dictionaries."""
    texts = (file.read_text(encoding="utf-8") for file in sorted(TABLES.glob("*.json")))
    return {table["release"]: table for table in map(json.loads, texts)}


@cache
def _models() -> dict[str, str]:
    """Release to model, for all releases but canonical ones."""
    names = sorted(_files(), key=lambda name: _rank(name.rpartition("-")[2]))
    bundled = {name: _files()[name]["model"] for name in names}
    return {**gemma_scope_1.heads(), **gemma_scope_2.heads(), **community.heads(), **bundled}


def _rank(suffix: str) -> int:
    """Place of a release among those of its model, by the end of its name."""
    return _ORDER.index(suffix) if suffix in _ORDER else len(_ORDER)


@cache
def _canonical() -> dict[str, str]:
    """Canonical release to the release whose files it lists again."""
    files = _files().items()
    bundled = {f["canonical_release"]: name for name, f in files if f["canonical_release"]}
    return {**gemma_scope_1.canonical_heads(), **bundled}


@cache
def models() -> dict[str, str]:
    """Release to model; canonical releases follow the one whose files they list."""
    again = {plain: name for name, plain in _canonical().items()}
    by_release: dict[str, str] = {}
    corrections = bool(manifest.listings())
    for release, model in _models().items():
        if corrections and not _build(release):
            continue  # nothing of it exists
        by_release[release] = model
        if release in again:
            by_release[again[release]] = model
    return by_release


@cache
def built_in(release: str) -> tuple[SaeSpec, ...]:
    """The specs of one release that is not canonical, whatever ``refresh()`` found."""
    if release in gemma_scope_1.heads():
        return gemma_scope_1.build(release)
    if release in gemma_scope_2.heads():
        return gemma_scope_2.build(release)
    if release in community.heads():
        return community.build(release)
    return parse_release(_files()[release])


@cache
def _build(release: str) -> tuple[SaeSpec, ...]:
    plain = _canonical().get(release)
    if plain is None:
        return manifest.corrected(release, built_in(release))
    if plain in _files():
        return tuple(gemma_scope_1.alias(release, s) for s in _build(plain) if s.canonical)
    return gemma_scope_1.build_canonical(release, _build(plain))


def clear_caches() -> None:
    """Forget what was built; the next question reads tables and manifest again."""
    for cached in (_files, _models, _canonical, models, built_in, _build, manifest.listings):
        cached.cache_clear()


def resolve_model(text: str, names: Iterable[str]) -> str | None:
    """The one of ``names`` that is meant; None when none is. Refuses what could be several."""
    word = text.lower().replace("gemma-v3-", "gemma-3-")
    for owner in _OWNERS:
        word = word.removeprefix(owner)
    options = sorted(set(names))
    if word in options:
        return word
    matches = [name for name in options if word in _other_names(name)]
    if len(matches) > 1:
        raise UnknownNameError(
            f"model {text!r} could be several",
            exists=", ".join(matches),
            fix=" or ".join(f"model={name!r}" for name in matches),
        )
    return matches[0] if matches else None


def _other_names(name: str) -> set[str]:
    full = {name, *_OTHER_NAMES.get(name, ())}
    if name.startswith("gemma-3-") and name.endswith("-pt"):
        full.add(name.removesuffix("-pt"))
    elif name.startswith(_FAMILIES) and not name.endswith("-it"):
        full.add(f"{name}-pt")
    short = {each.removeprefix(family) for each in full for family in _FAMILIES}
    return full | short


def tables() -> dict[str, tuple[SaeSpec, ...]]:
    """All specs by release name, canonical releases included."""
    return {release: _build(release) for release in models()}


def canonical_releases() -> frozenset[str]:
    """Names of the releases that only list files of another release again."""
    return frozenset(_canonical())


def releases() -> tuple[str, ...]:
    """Names of all releases, canonical ones included."""
    return tuple(models())


def get(release: str, sae_id: str) -> SaeSpec:
    """The spec with this id.

    Args:
        release: Release name, e.g. ``gemma-scope-2b-pt-res``.
        sae_id: Id in the release, e.g. ``layer_20/width_16k/average_l0_71``.

    Returns:
        The spec.

    Raises:
        UnknownNameError: The release or the id does not exist.
    """
    for spec in specs_of(release):
        if spec.sae_id == sae_id:
            return spec
    ids = [spec.sae_id for spec in specs_of(release)]
    raise UnknownNameError(
        f"no dictionary {sae_id!r} in release {release!r}",
        exists=shorten(ids, 4),
        nearest=nearest(sae_id, ids),
        fix=f"find(release={release!r}) lists all of them",
    )


def specs_of(release: str) -> tuple[SaeSpec, ...]:
    """All specs of one release."""
    if release in _models() or release in _canonical():
        specs = _build(release)
        if specs:
            return specs
    raise UnknownNameError(
        f"no release {release!r}",
        exists=shorten(releases(), 12),
        nearest=nearest(release, releases()),
        fix="find() without release= searches all of them",
    )


def derive(release: str, path: str) -> SaeSpec:
    """A spec for a folder of a known repository that no table lists, from its name alone.

    Whether it exists is not known, and the spec says ``provenance="derived"``.
    """
    specs = specs_of(release)
    spec = spec_of_folder(specs[0].repo_id, path)
    if spec is not None and spec.release == _canonical().get(release, release):
        return spec
    raise UnknownNameError(
        f"folder {path!r} of release {release!r} has an unknown pattern",
        exists=shorten(sorted({s.width for s in specs})) + " as widths",
        nearest=nearest(path, (s.path for s in specs)),
    )
