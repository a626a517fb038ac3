"""Trains, measures, labels and writes the dictionaries of the bundled suite.

1. Per layer one pass over fresh documents collects the activations at its sites.
2. Each dictionary is trained (``training``), written in Gemma Scope's layout under the measured L0,
   loaded back as a user would, and measured on held-out documents.
3. Features are labelled by the grammar's concepts on the same held-out documents.
4. The catalog's tables are written, so that ``find(model="gemma-2-tiny")`` knows the files.

Cost: about 1.5 minutes per dictionary on two cores; 2.5 GB of memory.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool

import gemmascope_plugin.saes as saes
from gemmascope_plugin.catalog import SaeSpec, sites, tables
from gemmascope_plugin.demo.assets import LABELS_FILE, MODEL_FOLDER, write_json
from gemmascope_plugin.demo.corpus import Corpus, make_corpus
from gemmascope_plugin.demo.labels import Label, label_features, labels_to_json
from gemmascope_plugin.demo.measure import EXCLUDE, dictionary_scores
from gemmascope_plugin.loading import load
from gemmascope_plugin.loading.npz import write_npz
from gemmascope_plugin.models import load_model, special_ids
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.models.tokens import kept_positions
from gemmascope_plugin.training import Recipe, collect_activations, train_dictionary
from gemmascope_plugin.types import Kind, Site

MODEL = "gemma-2-tiny"
FAMILIES: dict[str, tuple[Kind, Site]] = {
    "gemma-2-tiny-res": ("sae", "res"),
    "gemma-2-tiny-att": ("sae", "att"),
    "gemma-2-tiny-mlp": ("sae", "mlp"),
    "gemma-2-tiny-transcoders": ("transcoder", "mlp"),
}
"""Release to what its dictionaries are."""

TRAIN_SEED, HELD_OUT_SEED = 1000, 2000
HELD_OUT_DOCUMENTS = 1000


@dataclass(frozen=True, kw_only=True)
class SuiteRecipe:
    """All that the dictionaries' numbers depend on."""

    documents: int = 6000
    """Documents whose activations the dictionaries are trained on, 64 tokens each."""
    recipe: Recipe = field(default_factory=Recipe)


def train_dictionaries(out: Path, suite: SuiteRecipe | None = None) -> dict[str, Any]:
    """Trains all dictionaries of the model in ``out``; returns what ``suite.json`` says of them."""
    suite = suite or SuiteRecipe()
    started = time.monotonic()
    model = load_model(out / MODEL_FOLDER)
    train = make_corpus(suite.documents, TRAIN_SEED).tokens
    held_out = make_corpus(HELD_OUT_DOCUMENTS, HELD_OUT_SEED)
    specs: dict[str, list[SaeSpec]] = {release: [] for release in FAMILIES}
    scores: dict[str, dict[str, float]] = {}
    labels: dict[str, dict[str, list[Any]]] = {}
    for spec, sae in _train_each(model, train, held_out, suite.recipe, out):
        specs[spec.release].append(spec)
        key = f"{spec.release}/{spec.sae_id}"
        scores[key] = dictionary_scores(model, sae, held_out.tokens)
        found = label_corpus(model, sae, held_out)
        labels[key] = labels_to_json(found)
        scores[key]["labelled_features"] = len(found)
        print(key, {name: round(value, 4) for name, value in scores[key].items()}, flush=True)
    for release in FAMILIES:
        tables.dump_release(specs[release])
    write_json(out / LABELS_FILE, labels)
    return {
        "command": "python -m gemmascope_plugin.demo.train --stage dictionaries",
        "recipe": asdict(suite),
        "seeds": {"train_documents": TRAIN_SEED, "held_out_documents": HELD_OUT_SEED},
        "held_out_documents": HELD_OUT_DOCUMENTS,
        "minutes": round((time.monotonic() - started) / 60, 1),
        "scores": scores,
    }


def _train_each(
    model: HookedModel, train: torch.Tensor, held_out: Corpus, recipe: Recipe, out: Path
) -> Iterator[tuple[SaeSpec, Any]]:
    """Each spec with its dictionary, loaded back from the file that was written."""
    for layer in range(model.cfg.n_layers):
        routes = {name: sites.hooks(*family, layer) for name, family in FAMILIES.items()}
        needed = sorted({hook for route in routes.values() for hook in route})
        tensors = collect_activations(model, train, needed)
        for release, (read, written) in routes.items():
            target = tensors[written] if read != written else None
            params = train_dictionary(tensors[read], target, recipe)
            l0 = _held_out_l0(model, held_out, params, read)
            spec = make_spec(release, layer, params, l0)
            folder = out / release / spec.path
            folder.mkdir(parents=True, exist_ok=True)
            write_npz(folder / "params.npz", params)
            yield spec, load(spec, local_dir=out / release)


def make_spec(release: str, layer: int, params: dict[str, torch.Tensor], l0: float) -> SaeSpec:
    """The catalog entry of a trained dictionary."""
    kind, site = FAMILIES[release]
    d_in, d_sae = params["W_enc"].shape
    d_out = params["W_dec"].shape[1]
    read, written = sites.hooks(kind, site, layer)
    path = sites.standard_path(layer, str(d_sae), l0)
    return SaeSpec(
        release=release,
        sae_id=path,
        repo_id=f"bundled/{release}",
        path=path,
        model=MODEL,
        kind=kind,
        site=site,
        layer=layer,
        width=str(d_sae),
        d_in=d_in,
        d_out=d_out,
        d_sae=d_sae,
        l0=round(l0, 2),
        hook_in=read,
        hook_out=written,
        nbytes=sites.raw_nbytes(d_in, d_out, d_sae),
        canonical=True,
    )


def _held_out_l0(
    model: HookedModel, held_out: Corpus, params: dict[str, torch.Tensor], hook: str
) -> float:
    x = collect_activations(model, held_out.tokens, [hook])[hook]
    pre = x @ params["W_enc"] + params["b_enc"]
    return float(((pre > params["threshold"]) & (pre > 0)).sum(-1).float().mean())


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
