"""The tables of known dictionaries, one JSON file per release beside this module.

A file holds what all rows share once, and short rows:

    {"format": 1, "release": ..., "canonical_release": name or null, "repo_id": ..., "model": ...,
     "groups": [{"kind", "site", "hook_in", "hook_out", "d_in", "d_out", "affine", "levels",
                 "provenance", "path", "widths": {label: d_sae},
                 "rows": [[layer, width, l0, canonical 0/1, neuronpedia id], ...]}]}

1. ``hook_in``, ``hook_out`` and ``path`` are templates in ``layer``, ``width`` and ``l0``; the id
   of a dictionary is its path.  The last two cells of a row may be left away.
2. A ``canonical_release`` lists the rows marked canonical a second time, under the id that SAELens
   gives them, e.g. ``layer_20/width_16k/canonical``.
3. Files are read on first use and kept; all of them together cost a few milliseconds.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from gemmascope_plugin.catalog.sites import EMBEDDING_PATH, STANDARD_PATH, raw_nbytes
from gemmascope_plugin.catalog.spec import SaeSpec
from gemmascope_plugin.errors import GemmaScopeError, UnknownNameError, nearest, shorten

FORMAT = 1
TABLES = Path(__file__).with_name("tables")
_SHARED = ("kind", "site", "d_in", "d_out", "affine", "levels", "provenance")


@cache
def _files() -> tuple[dict[str, Any], ...]:
    return tuple(json.loads(f.read_text(encoding="utf-8")) for f in sorted(TABLES.glob("*.json")))


@cache
def tables() -> dict[str, tuple[SaeSpec, ...]]:
    """All specs by release name, canonical releases included."""
    known: dict[str, tuple[SaeSpec, ...]] = {}
    for file in _files():
        specs = parse_release(file)
        known[file["release"]] = specs
        if name := file["canonical_release"]:
            known[name] = tuple(_alias(name, spec) for spec in specs if spec.canonical)
    return known


@cache
def canonical_releases() -> frozenset[str]:
    """Names of the releases that only list files of another release again."""
    return frozenset(f["canonical_release"] for f in _files() if f["canonical_release"])


def releases() -> tuple[str, ...]:
    """Names of all releases, canonical ones included."""
    return tuple(tables())


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
    ids = [spec.sae_id for spec in tables()[release]]
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
    if release in tables():
        return tables()[release]
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
    like = {(s.site, s.width): s for s in specs_of(release)}
    match = re.fullmatch(r"(layer_(\d+)|embedding)/width_(\w+)/average_l0_(\d+)", path)
    site = "embedding" if match and match[1] == "embedding" else specs_of(release)[-1].site
    if match is None or (site, match[3]) not in like:
        raise UnknownNameError(
            f"folder {path!r} of release {release!r} has an unknown pattern",
            exists=shorten(sorted({s.width for s in specs_of(release)})) + " as widths",
            nearest=nearest(path, (s.path for s in specs_of(release))),
        )
    template, layer = like[site, match[3]], int(match[2] or 0)
    return replace(
        template,
        sae_id=path,
        path=path,
        layer=layer,
        l0=float(match[4]),
        hook_in=_template(template.hook_in, template.layer).format(layer=layer),
        hook_out=_template(template.hook_out, template.layer).format(layer=layer),
        neuronpedia_id=None,
        provenance="derived",
        canonical=False,
    )


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


def _alias(release: str, spec: SaeSpec) -> SaeSpec:
    # Neuronpedia has the same file under a second id when it also shows other sparsities.
    page = spec.neuronpedia_id.partition("__l0-")[0] if spec.neuronpedia_id else None
    folder = spec.path.rpartition("/")[0]
    return replace(spec, release=release, sae_id=f"{folder}/canonical", neuronpedia_id=page)


def _template(hook: str, layer: int) -> str:
    return hook.replace(f"blocks.{layer}.", "blocks.{layer}.")


def dump_release(
    specs: Sequence[SaeSpec], *, canonical_release: str | None = None, folder: Path = TABLES
) -> Path:
    """Write the table of one release, to a temporary name that is then renamed.

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
        "canonical_release": canonical_release,
        "repo_id": first.repo_id,
        "model": first.model,
        "groups": list(groups.values()),
    }
    if parse_release(file) != tuple(specs):
        raise GemmaScopeError(
            f"specs of {first.release!r} cannot be written as a table",
            exists="the same order of groups, ids equal to paths, paths in Gemma Scope's pattern",
        )
    target = folder / f"{first.release}.json"
    temporary = target.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(_one_row_per_line(file), encoding="utf-8")
    temporary.replace(target)
    for cached in (_files, tables, canonical_releases):
        cached.cache_clear()
    return target


def _group_head(spec: SaeSpec) -> dict[str, Any]:
    return {
        **{key: getattr(spec, key) for key in _SHARED},
        "levels": list(spec.levels),
        "hook_in": _template(spec.hook_in, spec.layer),
        "hook_out": _template(spec.hook_out, spec.layer),
        "path": EMBEDDING_PATH if spec.site == "embedding" else STANDARD_PATH,
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
