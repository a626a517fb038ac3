"""Gemma Scope 2: ten repositories that follow one pattern, so every entry is a rule.

1. A family is a folder of a repository (``resid_post``, ``transcoder_all``, ``clt``...) and a release
   of SAELens (``gemma-scope-2-4b-pt-res``).  Its files are the product of layers, widths, sparsity
   labels and, for transcoders and CLTs, with and without affine skip.
2. ``l0`` is the target of the training: lo + floor((hi - lo) min(n, 3 L) / n) in a model of n layers,
   with (lo, hi) by label.  ``big`` aims at 150 for the four chosen layers and at 120 in the suites of
   all layers.  What crosscoders and CLTs aimed at is not published: their ``l0`` is None.
3. Canonical is the target nearest to 100 among the labels of one layer, width and affine flag.
4. ``provenance`` is "listed" where SAELens names the path.  720 entries of the pattern, all
   crosscoders and all CLTs are named nowhere that could be read: "derived".
5. Crosscoders and CLTs are one entry for all their layers: ``layer`` is the first, ``layers`` all,
   ``d_sae`` and the width label the total over the layers.

Whether a folder exists is settled by ``refresh()``.  Fields that a release has in common are worked out
once, those of a layer once per layer; all 9,616 specs cost about 20 ms, a release at most 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gemmascope_plugin.catalog.site_names import (
    GAINED_HOOK,
    HOOKS,
    WIDTHS,
    Format,
    multi_layer_nbytes,
    raw_nbytes,
)
from gemmascope_plugin.catalog.spec import DEFAULTS, SaeSpec, unchecked
from gemmascope_plugin.types import Kind, Site

PREFIX = "gemma-scope-2-"


@dataclass(frozen=True)
class Size:
    """What the entries of one model depend on."""

    n_layers: int
    d_model: int
    d_heads: int
    """Width of the attention head outputs together."""
    full_layers: tuple[int, ...]
    """The four layers, at 25, 50, 65 and 85 % of the depth, that have all widths."""


SIZES = {
    "270m": Size(18, 640, 1024, (5, 9, 12, 15)),
    "1b": Size(26, 1152, 1024, (7, 13, 17, 22)),
    "4b": Size(34, 2560, 2048, (9, 17, 22, 29)),
    "12b": Size(48, 3840, 4096, (12, 24, 31, 41)),
    "27b": Size(62, 5376, 4096, (16, 31, 40, 53)),
}
TUNINGS = ("pt", "it")
LABELS = ("small", "medium", "big")
TARGETS = {"small": (10, 20), "medium": (30, 60), "big": (60, 150)}
BIG_EVERYWHERE = (60, 120)
CLT_WIDTHS = {"262k": 262_080, "524k": 524_160}
"""Totals over all layers; just below the powers of two, so that 18 and 26 layers divide them."""


@dataclass(frozen=True)
class Family:
    """One folder of a repository and the release that lists it."""

    suffix: str
    """Of the release name."""
    folder: str
    kind: Kind
    site: Site
    format: Format
    widths: tuple[str, ...]
    labels: tuple[str, ...] = LABELS
    every_layer: bool = False


def _families() -> Iterator[Family]:
    singles: tuple[tuple[str, str, Kind, Site], ...] = (
        ("res", "resid_post", "sae", "res"),
        ("att", "attn_out", "sae", "att"),
        ("mlp", "mlp_out", "sae", "mlp"),
        ("transcoders", "transcoder", "transcoder", "mlp"),
    )
    for suffix, folder, kind, site in singles:
        widths = ("16k", "65k", "262k", "1m") if suffix == "res" else ("16k", "65k", "262k")
        yield Family(suffix, folder, kind, site, "gemma-scope-2", widths)
        widths, labels = ("16k", "262k"), ("small", "big")
        name, all_folder = f"{suffix}-all", f"{folder}_all"
        yield Family(name, all_folder, kind, site, "gemma-scope-2", widths, labels, True)
    widths, labels = ("65k", "262k", "524k", "1m"), ("medium", "big")
    yield Family("crosscoders", "crosscoder", "crosscoder", "res", "crosscoder", widths, labels)
    yield Family("clts", "clt", "clt", "mlp", "clt", tuple(CLT_WIDTHS), labels, True)


FAMILIES = {family.suffix: family for family in _families()}
_HAVE_CLTS = ("270m", "1b")

UNLISTED_FAMILIES = {("27b", "pt"): ("att", "mlp", "att-all", "mlp-all", "transcoders")}
LISTED_270M_TRANSCODERS = {(15, "262k", "big", "_affine"), (9, "16k", "small", "_affine")}
"""Layer, width, label and ending of the only two of ``transcoder`` of the pretrained 270M."""

UNLISTED_27B_TRANSCODERS = {(4, "small"), (4, "big"), (5, "small"), (43, "small"), (43, "big")}
"""Layers and labels of ``transcoder_all``, width 16k without affine skip, of both tunings."""

RES_PAGES = {
    **dict.fromkeys(
        ("270m-pt", "1b-pt", "4b-pt", "12b-pt", "27b-it"), ("16k", "65k", "262k", "1m")
    ),
    **dict.fromkeys(("270m-it", "1b-it", "4b-it"), ("16k", "65k", "262k")),
}
"""Widths of ``resid_post`` at medium L0 that Neuronpedia shows."""

TRANSCODER_PAGES: dict[str, dict[str, range | tuple[int, ...]]] = {
    "4b-it": {"262k": range(34), "16k": (0, 1, 2, 3, 4, 6, 7, 9, 10, 12)},
    "27b-it": {"262k": range(62)},
}
"""Layers of ``transcoder_all`` at small L0 with affine skip that Neuronpedia shows."""


def heads() -> dict[str, str]:
    """Release to model."""
    return {
        f"{PREFIX}{size}-{tuning}-{suffix}": model_name(size, tuning)
        for size in SIZES
        for tuning in TUNINGS
        for suffix in FAMILIES
        if suffix != "clts" or size in _HAVE_CLTS
    }


def model_name(size: str, tuning: str) -> str:
    """Model of a repository; the pretrained 270M has no suffix."""
    return "gemma-3-270m" if (size, tuning) == ("270m", "pt") else f"gemma-3-{size}-{tuning}"


def target_l0(label: str, layer: int, n_layers: int, *, every_layer: bool) -> int:
    """What training aimed at: a ramp over the first third of the depth, then constant."""
    low, high = BIG_EVERYWHERE if every_layer and label == "big" else TARGETS[label]
    return low + (high - low) * min(n_layers, 3 * layer) // n_layers


def split_release(release: str) -> tuple[str, str, Family]:
    """Size, tuning and family of a release name."""
    size, tuning, suffix = release.removeprefix(PREFIX).split("-", 2)
    return size, tuning, FAMILIES[suffix]


def is_single_layer_folder(release: str, folder: str) -> bool:
    """Whether this is the folder of a release, one file per dictionary."""
    family = split_release(release)[2]
    return family.folder == folder and family.format == "gemma-scope-2"


def n_layers(release: str) -> int:
    """Layers of the model of a release."""
    return SIZES[split_release(release)[0]].n_layers


def is_listed(release: str, layer: int, width: str, label: str, ending: str) -> bool:
    """Whether SAELens names the path."""
    size, tuning, family = split_release(release)
    if family.suffix in UNLISTED_FAMILIES.get((size, tuning), ()):
        return False
    if (size, tuning, family.suffix) == ("270m", "pt", "transcoders"):
        return (layer, width, label, ending) in LISTED_270M_TRANSCODERS
    if (size, family.suffix) == ("27b", "transcoders-all") and (width, ending) == ("16k", ""):
        return (layer, label) not in UNLISTED_27B_TRANSCODERS
    return True


def all_listed(release: str) -> bool:
    """Whether SAELens names every path of a release."""
    size, tuning, family = split_release(release)
    unlisted = UNLISTED_FAMILIES.get((size, tuning), ())
    partly = {("270m", "pt", "transcoders")} | {("27b", t, "transcoders-all") for t in TUNINGS}
    return family.suffix not in unlisted and (size, tuning, family.suffix) not in partly


def page(release: str, layer: int, width: str, label: str, ending: str) -> str | None:
    """Neuronpedia's id of a file; it shows two families, one L0 of each. Arguments as above."""
    size, tuning, family = split_release(release)
    model = f"{size}-{tuning}"
    name = label + ending
    if family.suffix == "res" and name == "medium" and width in RES_PAGES.get(model, ()):
        word = "res"
    elif (
        family.suffix == "transcoders-all"
        and name == "small_affine"
        and layer in TRANSCODER_PAGES.get(model, {}).get(width, ())
    ):
        word = "transcoder"
    else:
        return None
    return f"gemma-3-{model.removesuffix('-pt')}/{layer}-gemmascope-2-{word}-{width}"


def has_pages(release: str) -> bool:
    """Whether Neuronpedia shows anything of a release."""
    size, tuning, family = split_release(release)
    shown = {"res": RES_PAGES, "transcoders-all": TRANSCODER_PAGES}.get(family.suffix, {})
    return f"{size}-{tuning}" in shown


CANONICAL_L0 = 100


def build(release: str) -> tuple[SaeSpec, ...]:
    """The specs of one release, by layer, width, label and affine flag."""
    size, tuning, family = split_release(release)
    if family.format in ("crosscoder", "clt"):
        return tuple(_multi_layer(release, size, tuning, family))
    return tuple(_single_layer(release, size, tuning, family))


def unlisted_spec(release: str, layer: int, width: str, label: str, ending: str) -> SaeSpec:
    """A single-layer entry that the rules need not have, ``provenance="derived"``.

    ``ending`` follows in the folder's name: empty, ``_affine``, ``_seed_1``...
    """
    size, tuning, family = split_release(release)
    at_layer = _at_layer(_shared(release, size, tuning, family), family, layer)
    every = family.every_layer
    target = target_l0(label, layer, SIZES[size].n_layers, every_layer=every)
    fields = _fields(at_layer["d_in"], width, label, ending)
    names = _names(family, layer, width, label, ending)
    return unchecked({**at_layer, **fields, **names, "l0": float(target), "provenance": "derived"})


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
        read, write = GAINED_HOOK, HOOKS["transcoder", "mlp"][1]
    else:
        read, write = HOOKS["sae", family.site]
    hooks = {"hook_in": read.format(layer=layer), "hook_out": write.format(layer=layer)}
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
    all_are_listed, has_any_page = all_listed(release), has_pages(release)
    for layer in range(facts.n_layers) if family.every_layer else facts.full_layers:
        at_layer = _at_layer(shared, family, layer)
        targets = _targets(size, family, layer)
        canonical_label = min(
            targets, key=lambda label: (abs(targets[label] - CANONICAL_L0), targets[label])
        )
        for width, label, ending, fields in slots:
            values = {**at_layer, **fields, **_names(family, layer, width, label, ending)}
            values["l0"] = float(targets[label])
            values["canonical"] = label == canonical_label and "seed" not in ending
            if has_any_page:
                values["neuronpedia_id"] = page(release, layer, width, label, ending)
            if not all_are_listed and not is_listed(release, layer, width, label, ending):
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
    layers = tuple(range(facts.n_layers)) if family.every_layer else facts.full_layers
    head = "" if family.every_layer else f"layer_{'_'.join(map(str, layers))}_"
    at_layer = _at_layer(_shared(release, size, tuning, family), family, layers[0])
    at_layer |= {"layers": layers, "l0": None, "provenance": "derived"}
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
                "nbytes": multi_layer_nbytes(at_layer["d_in"], d_sae, len(layers), affine=affine),
            }
            yield unchecked({**at_layer, **values})
