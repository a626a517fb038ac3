"""Gemma Scope 1: which L0s were released, per layer and width, is data; everything else is a rule.

``gemma_scope_1.json`` holds one ladder of measured L0s per release, width and layer.  From it:

1. The folder is ``layer_{L}/width_{W}/average_l0_{N}``, which is also the id.
2. Canonical is the L0 nearest to 100, of a tie the sparser one, except where the file says that the
   release chose the other (``canonical_against_the_rule``).
3. A canonical release lists these files again as ``layer_{L}/width_{W}/canonical``, without the widths
   in ``not_in_canonical_release``.
4. Neuronpedia shows the canonical file as ``{model}/{L}-gemmascope-{site}-{W}``; files that it also
   shows under ``...__l0-{N}`` are listed as ``pages``.

Three faults of SAELens' rows are not repeated: the model of ``9b-it-res``, and two Neuronpedia ids of
``9b-pt-res`` that belong to another file.  Reading the file costs a millisecond, a release less.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from gemmascope_plugin.catalog.site_names import (
    EMBEDDING_PATH,
    STANDARD_PATH,
    WIDTHS,
    hooks,
    raw_nbytes,
)
from gemmascope_plugin.catalog.spec import DEFAULTS, SaeSpec, unchecked

DATA = Path(__file__).with_name("gemma_scope_1.json")
CANONICAL_L0 = 100
N_LAYERS = {"gemma-2-2b": 26, "gemma-2-9b": 42, "gemma-2-9b-it": 42, "gemma-2-27b": 46}
_SHARED = ("release", "repo_id", "model", "kind", "site", "d_in")


@cache
def _data() -> dict[str, dict[str, Any]]:
    rows = json.loads(DATA.read_text(encoding="utf-8"))["releases"]
    return {row["release"]: row for row in rows}


def heads() -> dict[str, str]:
    """Release to model, without the canonical releases."""
    return {name: row["model"] for name, row in _data().items()}


def canonical_heads() -> dict[str, str]:
    """Canonical release to the release whose files it lists again."""
    rows = _data().items()
    return {row["canonical_release"]: name for name, row in rows if row["canonical_release"]}


def nearest_to_100(ladder: list[int]) -> int:
    """The canonical L0 by rule: nearest to 100, the sparser one of a tie."""
    return min(ladder, key=lambda l0: (abs(l0 - CANONICAL_L0), l0))


def build(release: str) -> tuple[SaeSpec, ...]:
    """The specs of one release, by layer, width and L0; embeddings last."""
    row = _data()[release]
    shared = {**DEFAULTS, **{key: row[key] for key in _SHARED}, "d_out": row["d_in"]}
    layers = sorted({int(layer) for ladder in row["ladders"].values() for layer in ladder})
    specs: list[SaeSpec] = []
    for layer in layers:
        hook_in, hook_out = hooks(row["kind"], row["site"], layer)
        fields = {**shared, "layer": layer, "hook_in": hook_in, "hook_out": hook_out}
        for width, ladder in row["ladders"].items():
            if str(layer) in ladder:
                specs += _ladder(row, fields, width, ladder[str(layer)])
    return (*specs, *_embeddings(row, shared))


def _ladder(
    row: dict[str, Any], fields: dict[str, Any], width: str, l0s: list[int]
) -> list[SaeSpec]:
    """All L0s of one layer and width."""
    layer, d_sae = fields["layer"], WIDTHS[width]
    fields = {**fields, "width": width, "d_sae": d_sae}
    fields["nbytes"] = raw_nbytes(row["d_in"], row["d_in"], d_sae)
    canonical = None if row["kind"] == "transcoder" else nearest_to_100(l0s)
    for other_layer, other_width, exception in row["canonical_against_the_rule"]:
        if (other_layer, other_width) == (layer, width):
            canonical = exception
    own_pages = row["pages"].get(width, {}).get(str(layer), ())
    specs = []
    for l0 in l0s:
        path = STANDARD_PATH.format(layer=layer, width=width, l0=l0)
        page = None
        if l0 in own_pages:
            page = _page(row, layer, width) + f"__l0-{l0}"
        elif row["kind"] == "transcoder" or _in_canonical_release(row, width, l0, canonical):
            page = _page(row, layer, width)
        values = {"sae_id": path, "path": path, "l0": float(l0), "canonical": l0 == canonical}
        specs.append(unchecked({**fields, **values, "neuronpedia_id": page}))
    return specs


def _page(row: dict[str, Any], layer: int, width: str) -> str:
    site = "transcoder" if row["kind"] == "transcoder" else row["site"]
    return f"{row['model']}/{layer}-gemmascope-{site}-{width}"


def _in_canonical_release(row: dict[str, Any], width: str, l0: int, canonical: int | None) -> bool:
    return l0 == canonical and width not in row["not_in_canonical_release"]


def _embeddings(row: dict[str, Any], shared: dict[str, Any]) -> list[SaeSpec]:
    width, d = "4k", row["d_in"]
    hook_in, hook_out = hooks("sae", "embedding", 0)
    fields = {
        **shared,
        **{"site": "embedding", "layer": 0, "hook_in": hook_in, "hook_out": hook_out},
        **{"width": width, "d_sae": WIDTHS[width], "nbytes": raw_nbytes(d, d, WIDTHS[width])},
    }
    specs = []
    for l0 in row["embedding"]:
        path = EMBEDDING_PATH.format(width=width, l0=l0)
        specs.append(unchecked({**fields, "sae_id": path, "path": path, "l0": float(l0)}))
    return specs


def build_canonical(release: str, plain: tuple[SaeSpec, ...]) -> tuple[SaeSpec, ...]:
    """The specs of a canonical release, from those of the release whose files it lists again."""
    left_out = _data()[canonical_heads()[release]]["not_in_canonical_release"]
    return tuple(alias(release, s) for s in plain if s.canonical and s.width not in left_out)


def alias(release: str, spec: SaeSpec) -> SaeSpec:
    """The same file under its canonical id."""
    # Neuronpedia has the same file under a second id when it also shows other sparsities.
    page = spec.neuronpedia_id.partition("__l0-")[0] if spec.neuronpedia_id else None
    sae_id = f"{spec.path.rpartition('/')[0]}/canonical"
    values = {"release": release, "sae_id": sae_id, "neuronpedia_id": page}
    return unchecked({**vars(spec), **values})
