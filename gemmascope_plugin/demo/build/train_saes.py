"""Trains, measures, labels and writes the dictionaries of the bundled suite.

1. Plain ones in Gemma Scope's layout: per layer one pass over fresh documents collects the activations
   at its four sites, and each dictionary is trained on them in memory.
2. Matryoshkas of the residual stream and transcoders with affine skip in Gemma Scope 2's layout, all of
   them in one run of ``training.train_many``.
3. Each is written under its L0 on held-out documents, loaded back as a user would, measured on these
   documents, and its features are labelled by the grammar's concepts.
4. The catalog's tables are written, so that ``find(model="gemma-2-tiny")`` knows the files.

Cost: about 1.5 minutes per dictionary on two cores; 4 GB of memory.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool

import gemmascope_plugin.saes as saes
from gemmascope_plugin.catalog import SaeSpec, tables
from gemmascope_plugin.catalog import site_names as sites
from gemmascope_plugin.catalog.site_names import Gain
from gemmascope_plugin.catalog.spec import BUNDLED_PREFIX
from gemmascope_plugin.demo.assets import LABELS_FILE, MODEL_FOLDER, read_json, write_json
from gemmascope_plugin.demo.build.corpus import Corpus, make_corpus
from gemmascope_plugin.demo.build.measure_suite import (
    EXCLUDE,
    Label,
    dictionary_scores,
    label_features,
    labels_to_json,
)
from gemmascope_plugin.loading import load
from gemmascope_plugin.loading.export import export
from gemmascope_plugin.loading.npz import write_npz
from gemmascope_plugin.models import load_model, special_ids
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.models.tokens import kept_positions
from gemmascope_plugin.saes import Weights, weights_of
from gemmascope_plugin.training import (
    Recipe,
    collect_activations,
    preset_spec,
    train_dictionary,
    train_many,
)
from gemmascope_plugin.types import Kind, Site

MODEL = "gemma-2-tiny"
FAMILIES: dict[str, tuple[Kind, Site]] = {
    "gemma-2-tiny-res": ("sae", "res"),
    "gemma-2-tiny-att": ("sae", "att"),
    "gemma-2-tiny-mlp": ("sae", "mlp"),
    "gemma-2-tiny-transcoders": ("transcoder", "mlp"),
}
"""Plain releases to what their dictionaries are."""
MATRYOSHKA, SKIP = "gemma-2-tiny-res-matryoshka", "gemma-2-tiny-skip-transcoders"

TRAIN_SEED, HELD_OUT_SEED = 1000, 2000
HELD_OUT_DOCUMENTS = 1000


@dataclass(frozen=True, kw_only=True)
class SuiteRecipe:
    """All that the dictionaries' numbers depend on."""

    documents: int = 6000
    """Documents whose activations the dictionaries are trained on, 64 tokens each."""
    recipe: Recipe = field(default_factory=Recipe)
    """Of the plain dictionaries."""
    quick: Mapping[str, Any] = field(
        default_factory=lambda: {
            "model": MODEL,
            "target_l0": 10.0,
            "bucket": 1 << 19,
            "layout": "gemma-scope-2",
        }
    )
    """What the two suites in Gemma Scope 2's layout add to the preset ``quick``."""
    further: Mapping[str, Mapping[str, Any]] = field(
        default_factory=lambda: {
            MATRYOSHKA: {
                "architecture": "matryoshka_prefix_batchtopk",
                "levels": [64, 192, 512],
                "dead_after": 100,
                "dead_coefficient": 1.0,
            },
            SKIP: {"architecture": "jumprelu_skip_transcoder", "gain": "with"},
        }
    )
    """Release to the fields of its training specs."""


Trained = tuple[SaeSpec, Any]
"""A spec and its dictionary, loaded back from the file that was written."""


def train_dictionaries(
    out: Path, suite: SuiteRecipe | None = None, *, plain: bool = True
) -> dict[str, Any]:
    """Trains dictionaries of the model in ``out``; returns what ``suite.json`` says of them.

    Args:
        out: Folder of the suite.
        suite: Recipes.
        plain: Whether the plain dictionaries are trained, or those in Gemma Scope 2's layout.
    """
    suite = suite or SuiteRecipe()
    started = time.monotonic()
    model = load_model(out / MODEL_FOLDER)
    train = make_corpus(suite.documents, TRAIN_SEED).tokens
    held_out = make_corpus(HELD_OUT_DOCUMENTS, HELD_OUT_SEED)
    make = _train_plain if plain else _train_further
    specs: dict[str, list[SaeSpec]] = {}
    scores: dict[str, dict[str, float]] = {}
    labels: dict[str, dict[str, list[Any]]] = {}
    for spec, sae in make(model, train, held_out, suite, out):
        specs.setdefault(spec.release, []).append(spec)
        key = f"{spec.release}/{spec.sae_id}"
        scores[key] = dictionary_scores(model, sae, held_out.tokens)
        rows = label_corpus(model, sae, held_out)
        labels[key] = labels_to_json(rows)
        scores[key]["labelled_features"] = len(rows)
        print(key, {name: round(value, 4) for name, value in scores[key].items()}, flush=True)
    for release in specs:
        tables.dump_release(specs[release])
    _add_labels(out / LABELS_FILE, labels)
    return {
        "recipe": asdict(suite),
        "seeds": {"train_documents": TRAIN_SEED, "held_out_documents": HELD_OUT_SEED},
        "held_out_documents": HELD_OUT_DOCUMENTS,
        "minutes": round((time.monotonic() - started) / 60, 1),
        "scores": scores,
    }


def _add_labels(path: Path, labels: dict[str, dict[str, list[Any]]]) -> None:
    """Puts labels beside those of the releases that were not trained now."""
    releases = {key.partition("/")[0] for key in labels}
    rows_before = read_json(path) if path.exists() else {}
    others = {
        key: rows for key, rows in rows_before.items() if key.partition("/")[0] not in releases
    }
    write_json(path, others | labels)


def _train_plain(
    model: HookedModel, train: torch.Tensor, held_out: Corpus, suite: SuiteRecipe, out: Path
) -> Iterator[Trained]:
    for layer in range(model.cfg.n_layers):
        routes = {name: sites.hooks(*family, layer) for name, family in FAMILIES.items()}
        needed = sorted({hook for route in routes.values() for hook in route})
        tensors = collect_activations(model, train, needed)
        for release, (read, written) in routes.items():
            kind, site = FAMILIES[release]
            target = tensors[written] if read != written else None
            params = train_dictionary(tensors[read], target, suite.recipe)
            l0 = _held_out_l0(model, held_out, Weights(**params), read)
            home = out / release
            folder = home / sites.standard_path(layer, str(params["W_enc"].shape[1]), l0)
            folder.mkdir(parents=True, exist_ok=True)
            write_npz(folder / "params.npz", params)
            spec = bundled_spec(home, folder, l0, site=site, layer=layer, kind=kind)
            yield spec, load(spec, local_dir=home)


def _train_further(
    model: HookedModel, train: torch.Tensor, held_out: Corpus, suite: SuiteRecipe, out: Path
) -> Iterator[Trained]:
    specs = {
        (release, layer): preset_spec("quick", {"layer": layer, **suite.quick, **fields})
        for release, fields in suite.further.items()
        for layer in range(model.cfg.n_layers)
    }
    saes = train_many(model, list(specs.values()), train)
    for ((release, layer), asked), sae in zip(specs.items(), saes.values(), strict=True):
        kind: Kind = "transcoder" if "transcoder" in asked.architecture else "sae"
        site: Site = "mlp" if kind == "transcoder" else "res"
        l0 = _held_out_l0(model, held_out, weights_of(sae), asked.hooks(kind)[0])
        home = out / release
        folder = export(
            sae,
            home,
            layout=asked.layout,
            site=site,
            layer=layer,
            l0=round(l0, 2),
            gain=asked.gain,
        )
        made = bundled_spec(home, folder, l0, site=site, layer=layer, kind=kind, gain=asked.gain)
        variant = "matryoshka" if asked.levels else None
        spec = replace(made, levels=asked.levels, variant=variant)
        yield spec, load(spec, local_dir=home)


def bundled_spec(
    home: Path,
    folder: Path,
    l0: float,
    *,
    site: Site,
    layer: int,
    kind: Kind,
    gain: Gain | None = None,
) -> SaeSpec:
    """The catalog entry of a dictionary in a folder of the suite.

    Args:
        home: The folder of its release, named like it.
        folder: Where its file is.
        l0: As measured.
        site: Where it lives.
        layer: Its layer.
        kind: What it maps.
        gain: Whether a transcoder reads the norm's output with its gain; what the layout says if None.
    """
    local = SaeSpec.from_folder(folder, model=MODEL, site=site, layer=layer, kind=kind, gain=gain)
    path = folder.relative_to(home).as_posix()
    return replace(
        local,
        release=home.name,
        repo_id=f"{BUNDLED_PREFIX}{home.name}",
        sae_id=path,
        path=path,
        l0=round(l0, 2),
        canonical=True,
    )


def _held_out_l0(model: HookedModel, held_out: Corpus, weights: Weights, hook: str) -> float:
    x = collect_activations(model, held_out.tokens, [hook])[hook]
    return float((saes.encode(weights, x) > 0).sum(-1).float().mean())


def label_corpus(model: HookedModel, sae: Any, corpus: Corpus) -> dict[int, Label]:
    """Labels of a dictionary's features on a corpus with known concepts."""
    hook = sae.cfg.metadata.hook_name
    x = collect_activations(model, corpus.tokens, [hook])[hook]
    names, concepts = corpus.concept_matrix()
    return label_features(saes.encode(sae, x) > 0, _kept(model, corpus, concepts), names)


def _kept(
    model: HookedModel, corpus: Corpus, concepts: Bool[torch.Tensor, "document pos concept"]
) -> Bool[torch.Tensor, "token concept"]:
    return concepts[kept_positions(corpus.tokens, special_ids(model, EXCLUDE))]
