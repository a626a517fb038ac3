"""Tables of the bundled dictionaries, one JSON file per release in ``tables/``.

A file holds what all rows share once, and short rows:

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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemmascope_plugin.catalog.site_names import at_layer, path_template, raw_nbytes
from gemmascope_plugin.catalog.spec import DEFAULTS, SaeSpec
from gemmascope_plugin.errors import GemmaScopeError
from gemmascope_plugin.files.whole import write_text_whole

FORMAT = 1
TABLES = Path(__file__).with_name("tables")
_SHARED = ("kind", "site", "d_in", "d_out", "affine", "levels", "provenance")
_USUAL = ("format", "gain", "variant")
"""Fields that only stand in a table where they are not the usual ones."""


def read_tables(folder: Path) -> dict[str, dict[str, Any]]:
    """Release to its table, for all files of a folder."""
    texts = (file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.json")))
    return {table["release"]: table for table in map(json.loads, texts)}


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


def write_table(specs: Sequence[SaeSpec], *, canonical_release: str | None, folder: Path) -> Path:
    """Write the table of one release; ``tables.dump_release`` is the public form.

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
    return write_text_whole(folder / f"{first.release}.json", _one_row_per_line(file))


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
