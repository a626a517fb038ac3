"""All releases by name, whichever rule or file their specs come from.

1. A release has a builder: Gemma Scope 1 (ladders of L0s), Gemma Scope 2 (rules), community suites,
   the tables of the bundled dictionaries.
2. Releases are built when first asked for and kept; the names and models alone cost next to nothing.
3. Where ``refresh()`` has listed a repository, its specs are corrected by what was found there.
4. A canonical release lists files of another release again under ids such as
   ``layer_20/width_16k/canonical``.

Building everything, 12,194 specs and 429 canonical aliases, costs about 35 ms once per process.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import gemmascope_plugin.catalog.community as community
import gemmascope_plugin.catalog.gemma_scope_1 as gemma_scope_1
import gemmascope_plugin.catalog.gemma_scope_2 as gemma_scope_2
import gemmascope_plugin.catalog.gemma_scope_2_specs as gemma_scope_2_specs
import gemmascope_plugin.catalog.manifest as manifest
from gemmascope_plugin.catalog.patterns import releases_of_repositories, spec_of_folder
from gemmascope_plugin.catalog.spec import SaeSpec
from gemmascope_plugin.catalog.table_files import TABLES, parse_release, read_tables, write_table
from gemmascope_plugin.errors import UnknownNameError, nearest, shorten

_ORDER = ("res", "att", "mlp", "transcoders")


@cache
def _files() -> dict[str, dict[str, Any]]:
    return read_tables(TABLES)


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
    known: dict[str, str] = {}
    corrections = bool(manifest.listings())
    for release, model in _models().items():
        if corrections and not _build(release):
            continue  # nothing of it exists
        known[release] = model
        if release in again:
            known[again[release]] = model
    return known


@cache
def built_in(release: str) -> tuple[SaeSpec, ...]:
    """The specs of one release that is not canonical, whatever ``refresh()`` found."""
    if release in gemma_scope_1.heads():
        return gemma_scope_1.build(release)
    if release in gemma_scope_2.heads():
        return gemma_scope_2_specs.build(release)
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


def tables() -> dict[str, tuple[SaeSpec, ...]]:
    """All specs by release name, canonical releases included."""
    return {release: _build(release) for release in models()}


def canonical_releases() -> frozenset[str]:
    """Names of the releases that only list files of another release again."""
    return frozenset(_canonical())


def releases() -> tuple[str, ...]:
    """Names of all releases, canonical ones included."""
    return tuple(models())


def repositories() -> dict[str, tuple[str, ...]]:
    """Repository on the hub to its releases, canonical ones not among them."""
    return releases_of_repositories()


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
    """All specs of one release.

    Raises:
        UnknownNameError: There is no such release.
    """
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
    """A spec for a folder of a known repository that no table lists.

    Everything follows from the name of the folder; whether it exists is not known, and the spec
    says ``provenance="derived"``.

    Raises:
        UnknownNameError: The folder's name does not follow the release's pattern.
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


def dump_release(
    specs: Sequence[SaeSpec], *, canonical_release: str | None = None, folder: Path = TABLES
) -> Path:
    """Write the table of one bundled release, to a temporary name that is then renamed.

    Args:
        specs: All specs of the release; ids must equal paths, and paths must follow Gemma Scope's
            ``layer_{L}/width_{W}/average_l0_{N}`` (or ``embedding/...``) with ``l0`` rounded.
        canonical_release: Name under which the canonical rows are listed again.
        folder: Where the file goes; tables elsewhere are not found by ``find()``.

    Returns:
        The file, ``<release>.json``.

    Raises:
        GemmaScopeError: The specs are of several releases or cannot be written in this format.
    """
    target = write_table(specs, canonical_release=canonical_release, folder=folder)
    clear_caches()
    return target
