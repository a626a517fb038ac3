"""Dictionaries of others that follow their own layouts: Matryoshka suites and Tree SAEs.

1. Batch-top-k Matryoshka SAEs of width 32k for Gemma, in SAELens' format, one folder per layer.  Their
   prefix sizes are on the model cards and, for these old checkpoints, in no file.
2. The checkpoints of the Tree SAE paper (arXiv:2605.07922) at the input of block 5 of GPT-2 small: trees
   of two and four layers, and Matryoshka, top-k and matching-pursuit dictionaries to compare with.

``l0`` is what training aimed at: the k of the top-k.  148 specs, well below a millisecond.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gemmascope_plugin.catalog.site_names import raw_nbytes
from gemmascope_plugin.catalog.spec import DEFAULTS, SaeSpec, unchecked

MATRYOSHKA_LEVELS = (128, 512, 2048, 8192, 32768)


@dataclass(frozen=True)
class Matryoshka:
    """One suite."""

    repo_id: str
    model: str
    n_layers: int
    d_model: int
    l0: float
    folder: str = ""
    variant: str | None = None
    pages: range = range(0)
    """Layers that Neuronpedia shows."""


_2B = "chanind/gemma-2-2b-batch-topk-matryoshka-saes-w-32k-l0-40"
_9B = "chanind/gemma-2-9b-batch-topk-matryoshka-saes-w-32k-l0-60"
_3_1B = "chanind/gemma-3-1b-batch-topk-matryoshka-saes-w-32k-l0-40"

MATRYOSHKAS = {
    "gemma-2-2b-res-matryoshka-dc": Matryoshka(
        _2B, "gemma-2-2b", 25, 2304, 40.0, "standard/", pages=range(12, 25)
    ),
    "gemma-2-2b-res-snap-matryoshka-dc": Matryoshka(
        _2B, "gemma-2-2b", 25, 2304, 40.0, "snap/", variant="snap"
    ),
    "gemma-2-9b-res-matryoshka-dc": Matryoshka(
        _9B, "gemma-2-9b", 41, 3584, 60.0, pages=range(20, 21)
    ),
    "gemma-3-1b-res-matryoshka-dc": Matryoshka(_3_1B, "gemma-3-1b-pt", 25, 1152, 40.0),
}

TREE_RELEASE = "tree-sae"
TREE_MODEL = "gpt2-small"
TREE_LEVELS: dict[tuple[str, str], tuple[int, ...]] = {
    ("2", "24k"): (6144, 24576),
    ("4", "24k"): (1536, 4608, 13824, 24576),
    ("2", "6k"): (1536, 6144),
    ("4", "6k"): (768, 1152, 3456, 6144),
    ("2", "49k"): (12288, 49152),
    ("4", "49k"): (6144, 9216, 27648, 49152),
}
"""Number of layers and width to prefix sizes."""
TREE_L0 = (32, 48, 64, 80)
_SCALING = {"6k": 8, "49k": 64}
"""Width to L0 of the scaling experiments."""


def heads() -> dict[str, str]:
    """Release to model."""
    return {**{name: suite.model for name, suite in MATRYOSHKAS.items()}, TREE_RELEASE: TREE_MODEL}


def build(release: str) -> tuple[SaeSpec, ...]:
    """The specs of one release."""
    if release == TREE_RELEASE:
        return tuple(_tree_specs())
    return tuple(_matryoshka_specs(release, MATRYOSHKAS[release]))


def _matryoshka_specs(release: str, suite: Matryoshka) -> Iterator[SaeSpec]:
    d, d_sae = suite.d_model, MATRYOSHKA_LEVELS[-1]
    for layer in range(suite.n_layers):
        hook = f"blocks.{layer}.hook_resid_post"
        page = f"{suite.model}/{layer}-res-matryoshka-dc" if layer in suite.pages else None
        values = {
            "release": release,
            "sae_id": hook,
            "repo_id": suite.repo_id,
            "path": f"{suite.folder}{hook}",
            "model": suite.model,
            "kind": "sae",
            "site": "res",
            "layer": layer,
            "width": "32k",
            "d_in": d,
            "d_out": d,
            "d_sae": d_sae,
            "l0": suite.l0,
            "l0_is": "target",
            "hook_in": hook,
            "hook_out": hook,
            "nbytes": raw_nbytes(d, d, d_sae),
            "neuronpedia_id": page,
            "levels": MATRYOSHKA_LEVELS,
            "variant": suite.variant,
            "format": "sae_lens",
        }
        yield unchecked({**DEFAULTS, **values})


def _tree_names() -> Iterator[tuple[str, str, str, int, tuple[int, ...]]]:
    """Folder, variant, width, L0 and prefix sizes of every checkpoint."""
    for word, variant in (("tree_sae", "tree"), ("matryoshka", "matryoshka")):
        for depth in ("2", "4"):
            name = f"{word}_{depth}layer"
            for l0 in TREE_L0:
                yield f"{name}_l0_{l0}", f"{variant}-{depth}", "24k", l0, TREE_LEVELS[depth, "24k"]
            for width, l0 in _SCALING.items():
                yield f"{name}_{width}", f"{variant}-{depth}", width, l0, TREE_LEVELS[depth, width]
    for l0 in TREE_L0:
        yield f"topk_l0_{l0}", "topk", "24k", l0, ()
        yield f"mp_sae_k_{l0}", "matching-pursuit", "24k", l0, ()


def _tree_specs() -> Iterator[SaeSpec]:
    d, hook = 768, "blocks.5.hook_resid_pre"
    sizes = {width: levels[-1] for (_, width), levels in TREE_LEVELS.items()}
    for name, variant, width, l0, levels in _tree_names():
        values = {
            "release": TREE_RELEASE,
            "sae_id": f"gpt2-small/{name}",
            "repo_id": "tueminh/tree-sae",
            "path": f"gpt2-small/{name}",
            "model": TREE_MODEL,
            "kind": "sae",
            "site": "res",
            "layer": 5,
            "width": width,
            "d_in": d,
            "d_out": d,
            "d_sae": sizes[width],
            "l0": float(l0),
            "l0_is": "target",
            "hook_in": hook,
            "hook_out": hook,
            # Both matrices and one bias; there is no encoder bias and no threshold.
            "nbytes": 4 * (2 * d * sizes[width] + d),
            "levels": levels,
            "variant": variant,
            "format": "tree",
        }
        yield unchecked({**DEFAULTS, **values})
