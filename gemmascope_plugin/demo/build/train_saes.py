"""Trains, measures, labels and writes the dictionaries of the bundled suite.

1. Plain ones in Gemma Scope's layout, at four sites of every layer; Matryoshkas of the residual stream
   and transcoders with affine skip in Gemma Scope 2's layout. Those of a layer are trained in one run of
   ``training.train_many``, with the preset ``quick``.
2. Each is written under its L0 on held-out documents, loaded back as a user would, measured on these
   documents, and its features are labelled by the grammar's concepts.
3. The catalog's tables are written, so that ``find(model="gemma-2-tiny")`` knows the files.

The plain ones that ship were trained with another schedule of the learning rate and another order of
the tokens (their recipe is in ``suite.json``): made again, they have other numbers and are as good.

Cost: about 1.5 minutes per dictionary on two cores; 4 GB of memory.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool

import gemmascope_plugin.saes as saes
from gemmascope_plugin.catalog import SaeSpec, tables
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
from gemmascope_plugin.models import load_model, special_ids
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.models.tokens import kept_positions
from gemmascope_plugin.saes import weights_of
from gemmascope_plugin.training import collect_activations, preset_spec, train_many
from gemmascope_plugin.types import SAE, Kind, Site

MODEL = "gemma-2-tiny"
PLAIN: dict[str, dict[str, Any]] = {
    "gemma-2-tiny-res": {"site": "res"},
    "gemma-2-tiny-att": {"site": "att"},
    "gemma-2-tiny-mlp": {"site": "mlp"},
    "gemma-2-tiny-transcoders": {"architecture": "jumprelu_transcoder"},
}
FURTHER: dict[str, dict[str, Any]] = {
    "gemma-2-tiny-res-matryoshka": {
        "architecture": "matryoshka_prefix_batchtopk",
        "levels": [64, 192, 512],
        "dead_coefficient": 1.0,
        "layout": "gemma-scope-2",
    },
    "gemma-2-tiny-skip-transcoders": {
        "architecture": "jumprelu_skip_transcoder",
        "gain": "with",
        "layout": "gemma-scope-2",
    },
}
"""Release to what the training specs of its layers add to ``COMMON``."""
COMMON = {"model": MODEL, "target_l0": 10.0, "bucket": 1 << 19}
"""What all specs add to the preset ``quick``."""

DOCUMENTS = 6000
"""Documents whose activations the dictionaries are trained on, 64 tokens each."""
TRAIN_SEED, HELD_OUT_SEED = 1000, 2000
HELD_OUT_DOCUMENTS = 1000


def train_dictionaries(out: Path, releases: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Trains releases of the model in ``out``; returns what ``suite.json`` says of them."""
    started = time.monotonic()
    model = load_model(out / MODEL_FOLDER)
    train = make_corpus(DOCUMENTS, TRAIN_SEED).tokens
    held_out = make_corpus(HELD_OUT_DOCUMENTS, HELD_OUT_SEED)
    specs: dict[str, list[SaeSpec]] = {}
    scores: dict[str, dict[str, float]] = {}
    labels: dict[str, dict[str, list[Any]]] = {}
    for layer in range(model.cfg.n_layers):
        for spec, sae in _train_layer(model, train, held_out, releases, layer, out):
            specs.setdefault(spec.release, []).append(spec)
            key = f"{spec.release}/{spec.sae_id}"
            scores[key] = dictionary_scores(model, sae, held_out.tokens)
            rows = label_corpus(model, sae, held_out)
            labels[key] = labels_to_json(rows)
            scores[key]["labelled_features"] = len(rows)
            rounded = {name: round(value, 4) for name, value in scores[key].items()}
            print(key, rounded, flush=True)
    for release in specs:
        tables.dump_release(specs[release])
    _add_labels(out / LABELS_FILE, labels)
    return {
        "recipe": {"documents": DOCUMENTS, "quick": COMMON, "releases": releases},
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


def _train_layer(
    model: HookedModel,
    train: torch.Tensor,
    held_out: Corpus,
    releases: Mapping[str, Mapping[str, Any]],
    layer: int,
    out: Path,
) -> Iterator[tuple[SaeSpec, SAE]]:
    """The dictionaries of a layer, loaded back from the files that were written."""
    specs = [preset_spec("quick", {"layer": layer, **COMMON, **f}) for f in releases.values()]
    trained = train_many(model, specs, train)
    for release, spec, sae in zip(releases, specs, trained.values(), strict=True):
        kind: Kind = "transcoder" if "transcoder" in spec.architecture else "sae"
        site: Site = "mlp" if kind == "transcoder" else spec.site
        x = collect_activations(model, held_out.tokens, spec.hooks(kind))[spec.hooks(kind)[0]]
        l0 = round(float((saes.encode(weights_of(sae), x) > 0).sum(-1).float().mean()), 2)
        home, layout, gain = out / release, spec.layout, spec.gain
        folder = export(sae, home, layout=layout, site=site, layer=layer, l0=l0, gain=gain)
        local = SaeSpec.from_folder(
            folder,
            model=MODEL,
            site=site,
            layer=layer,
            kind=kind,
            gain=gain if layout == "gemma-scope-2" else None,
        )
        path = folder.relative_to(home).as_posix()
        entry = replace(
            local,
            release=release,
            repo_id=f"{BUNDLED_PREFIX}{release}",
            sae_id=path,
            path=path,
            l0=l0,
            canonical=True,
            levels=spec.levels,
            variant="matryoshka" if spec.levels else None,
        )
        yield entry, load(entry, local_dir=home)


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
