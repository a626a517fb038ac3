"""Specs of Gemma Scope 2, from the facts in ``gemma_scope_2``.

1. Fields that a release has in common are worked out once, those of a layer once per layer; what is
   left per entry is its name, width, label and flags.
2. Crosscoders and CLTs are one entry for all their layers: ``layer`` is the first, ``layers`` all,
   ``d_sae`` and the width label the total over the layers.

All 9,616 specs cost about 20 ms, a release at most 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gemmascope_plugin.catalog.gemma_scope_2 import (
    CLT_WIDTHS,
    PREFIX,
    SIZES,
    Family,
    all_listed,
    has_pages,
    listed,
    model_name,
    page,
    split_release,
    target_l0,
)
from gemmascope_plugin.catalog.site_names import (
    GAINED_HOOK,
    HOOKS,
    WIDTHS,
    multi_layer_nbytes,
    raw_nbytes,
)
from gemmascope_plugin.catalog.spec import DEFAULTS, SaeSpec, unchecked

CANONICAL_L0 = 100


def build(release: str) -> tuple[SaeSpec, ...]:
    """The specs of one release, by layer, width, label and affine flag."""
    size, tuning, family = split_release(release)
    if family.format in ("crosscoder", "clt"):
        return tuple(_multi_layer(release, size, tuning, family))
    return tuple(_single_layer(release, size, tuning, family))


def one(release: str, layer: int, width: str, label: str, ending: str) -> SaeSpec:
    """A single-layer entry that the rules need not have.

    Args:
        release: Release of a single-layer family.
        layer: Zero-based layer.
        width: Width label.
        label: ``small``, ``medium`` or ``big``.
        ending: What follows in the folder's name: empty, ``_affine``, ``_seed_1``...

    Returns:
        The spec, ``provenance="derived"``.
    """
    size, tuning, family = split_release(release)
    here = _at_layer(_shared(release, size, tuning, family), family, layer)
    every = family.every_layer
    target = target_l0(label, layer, SIZES[size].n_layers, every_layer=every)
    fields = _fields(here["d_in"], width, label, ending)
    names = _names(family, layer, width, label, ending)
    return unchecked({**here, **fields, **names, "l0": float(target), "provenance": "derived"})


def _shared(release: str, size: str, tuning: str, family: Family) -> dict[str, Any]:
    """What all specs of a release have in common."""
    gained = family.kind in ("transcoder", "clt")
    d = SIZES[size].d_heads if family.site == "att" else SIZES[size].d_model
    return {
        **DEFAULTS,
        "release": release,
        "repo_id": f"google/{PREFIX}{size}-{tuning}",
        "model": model_name(size, tuning),
        "kind": family.kind,
        "site": family.site,
        "d_in": d,
        "d_out": d,
        "format": family.format,
        "l0_is": "target",
        "gain": "with" if gained else "without",
        "variant": "all" if family.every_layer and family.kind != "clt" else None,
    }


def _at_layer(shared: dict[str, Any], family: Family, layer: int) -> dict[str, Any]:
    """The shared fields and those of a layer."""
    if family.kind in ("transcoder", "clt"):
        read, written = GAINED_HOOK, HOOKS["transcoder", "mlp"][1]
    else:
        read, written = HOOKS["sae", family.site]
    hooks = {"hook_in": read.format(layer=layer), "hook_out": written.format(layer=layer)}
    return {**shared, "layer": layer, **hooks}


def _targets(size: str, family: Family, layer: int) -> dict[str, int]:
    """Label to target L0."""
    n_layers, every = SIZES[size].n_layers, family.every_layer
    return {w: target_l0(w, layer, n_layers, every_layer=every) for w in family.labels}


def _single_layer(release: str, size: str, tuning: str, family: Family) -> Iterator[SaeSpec]:
    shared, facts = _shared(release, size, tuning, family), SIZES[size]
    # The papers give only residual dictionaries this width; the listing has it here too.
    widths = (*family.widths, "1m") if (size, family.suffix) == ("1b", "mlp") else family.widths
    slots = [
        (width, label, ending, _fields(shared["d_in"], width, label, ending))
        for width in widths
        for label, ending in _endings(family, width)
    ]
    known, shown = all_listed(release), has_pages(release)
    for layer in range(facts.n_layers) if family.every_layer else facts.chosen:
        here = _at_layer(shared, family, layer)
        targets = _targets(size, family, layer)
        chosen = min(
            targets, key=lambda label: (abs(targets[label] - CANONICAL_L0), targets[label])
        )
        for width, label, ending, fields in slots:
            values = {**here, **fields, **_names(family, layer, width, label, ending)}
            values["l0"] = float(targets[label])
            values["canonical"] = label == chosen and "seed" not in ending
            if shown:
                values["neuronpedia_id"] = page(release, layer, width, label, ending)
            if not known and not listed(release, layer, width, label, ending):
                values["provenance"] = "derived"
            yield unchecked(values)


def _fields(d: int, width: str, label: str, ending: str) -> dict[str, Any]:
    """Fields that are the same at every layer."""
    affine = ending.startswith("_affine")
    fields = {
        "width": width,
        "d_sae": WIDTHS[width],
        "l0_label": label,
        "affine": affine,
        "nbytes": raw_nbytes(d, d, WIDTHS[width], affine=affine),
    }
    if "_seed_" in ending:
        fields["variant"] = ending[ending.index("seed_") :]
    return fields


def _names(family: Family, layer: int, width: str, label: str, ending: str) -> dict[str, str]:
    """Folder and id."""
    name = f"layer_{layer}_width_{width}_l0_{label}{ending}"
    path = f"{family.folder}/{name}"
    # SAELens' ids of this one family carry the folder.
    return {"sae_id": path if family.suffix == "transcoders" else name, "path": path}


def _endings(family: Family, width: str) -> Iterator[tuple[str, str]]:
    """Labels and what follows them in the names of one width."""
    affine = family.kind in ("transcoder", "clt")
    for label in family.labels:
        yield label, ""
        if affine:
            yield label, "_affine"
    if family.suffix == "res" and width == "262k":
        yield "medium", "_seed_1"


def _multi_layer(release: str, size: str, tuning: str, family: Family) -> Iterator[SaeSpec]:
    facts = SIZES[size]
    layers = tuple(range(facts.n_layers)) if family.every_layer else facts.chosen
    head = "" if family.every_layer else f"layer_{'_'.join(map(str, layers))}_"
    here = _at_layer(_shared(release, size, tuning, family), family, layers[0])
    here |= {"layers": layers, "l0": None, "provenance": "derived"}
    for width in family.widths:
        d_sae = CLT_WIDTHS[width] if family.kind == "clt" else WIDTHS[width]
        for label, ending in _endings(family, width):
            name = f"{head}width_{width}_l0_{label}{ending}"
            affine = ending == "_affine"
            values = {
                "sae_id": name,
                "path": f"{family.folder}/{name}",
                "width": width,
                "d_sae": d_sae,
                "l0_label": label,
                "affine": affine,
                "nbytes": multi_layer_nbytes(here["d_in"], d_sae, len(layers), affine=affine),
            }
            yield unchecked({**here, **values})
