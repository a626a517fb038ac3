"""Rebuilds the bundled suite: ``python -m gemmascope_plugin.demo.build``.

1. ``model``: the corpus, the tokenizer and the model (``train_model.py``).
2. ``dictionaries``: plain ones in Gemma Scope's layout, at four sites of every layer.
3. ``further``: Matryoshkas of the residual stream and transcoders with affine skip in Gemma Scope 2's
   layout.

The dictionaries of a layer are trained in one run of ``training.train_many``, with the preset ``quick``.
Each is written under its L0 on held-out documents, loaded back as a user would, measured on these
documents (``delta_loss_share`` is the rise of the next-token loss as a share of the rise with zeros at
the site), and its features are labelled by the grammar's concepts. The catalog's tables are written, so
that ``find(model="gemma-2-tiny")`` knows the files. Each stage writes its part of ``assets/suite.json``:
recipe, random seeds, metrics and this command.

The plain ones that ship were trained with another schedule of the learning rate and another order of
the tokens (their recipe is in ``suite.json``): made again, they have other numbers and are as good.

Cost: about 15 minutes for the model and 1.5 for each dictionary on two cores; 4 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int

import gemmascope_plugin.saes as saes
from gemmascope_plugin.catalog import SaeSpec, tables
from gemmascope_plugin.catalog.spec import BUNDLED_PREFIX
from gemmascope_plugin.causes import Task
from gemmascope_plugin.causes.builtin import SPLITS, Split
from gemmascope_plugin.demo.corpus import (
    HELD_OUT_SEED,
    TRAIN_SEED,
    Corpus,
    Label,
    label_features,
    labels_to_json,
    make_corpus,
)
from gemmascope_plugin.demo.tasks import TASK_NAMES, make_task
from gemmascope_plugin.demo.tiny_suite import (
    LABELS_FILE,
    MODEL,
    MODEL_FOLDER,
    SUITE_FILE,
    read_json,
)
from gemmascope_plugin.demo.train_model import ModelRecipe, save_model, save_tokenizer, train_model
from gemmascope_plugin.files.whole import write_text_whole
from gemmascope_plugin.loading import load
from gemmascope_plugin.loading.export import export
from gemmascope_plugin.loading.sources import ASSETS
from gemmascope_plugin.measures import measure
from gemmascope_plugin.models import load_model, special_ids
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.models.tokens import kept_positions
from gemmascope_plugin.saes import weights_of
from gemmascope_plugin.training import collect_activations, preset_spec, train_many
from gemmascope_plugin.types import SAE, Kind, Site

COMMAND = "python -m gemmascope_plugin.demo.build"
EXCLUDE = ("bos", "eos", "pad")
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
    _write_json(path, others | labels)


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


def label_corpus(model: HookedModel, sae: SAE, corpus: Corpus) -> dict[int, Label]:
    """Labels of a dictionary's features on a corpus with known concepts."""
    hook = sae.cfg.metadata.hook_name
    x = collect_activations(model, corpus.tokens, [hook])[hook]
    names, concepts = corpus.concept_matrix()
    return label_features(
        saes.encode(weights_of(sae), x) > 0, _kept(model, corpus, concepts), names
    )


def _kept(
    model: HookedModel, corpus: Corpus, concepts: Bool[torch.Tensor, "document pos concept"]
) -> Bool[torch.Tensor, "token concept"]:
    return concepts[kept_positions(corpus.tokens, special_ids(model, EXCLUDE))]


@torch.no_grad()
def task_score(model: HookedModel, task: Task) -> float:
    """Share of prompts whose most probable next token is right; for years, the greater years' mass."""
    bound = task.bind(model)
    logits = bound.readout(model, bound.clean).all()
    right = bound.metric.right
    assert right is not None, "the tasks of the suite have answers"
    if task.name == "years":
        return float(right.pick(logits.softmax(-1), 0.0).sum(-1).mean())
    return float((logits.argmax(-1) == right.ids[:, 0]).float().mean())


def task_scores(model: HookedModel, *, split: Split = "held_out", n: int = 256) -> dict[str, float]:
    """Every task's score."""
    return {name: task_score(model, make_task(name, split=split, n=n)) for name in TASK_NAMES}


def dictionary_scores(
    model: HookedModel, sae: SAE, tokens: Int[torch.Tensor, "document pos"]
) -> dict[str, float]:
    """L0, FVU, share of the ablation loss, dead share of one dictionary."""
    measures = measure(model, sae, tokens, batch_size=128, n_positions=0)
    return {
        "l0": measures.l0,
        "fvu": measures.fvu,
        "delta_loss_share": measures.losses.share_of_zero,
        "dead_share": measures.dead_share,
        "loss": measures.losses.clean,
        "loss_spliced": measures.losses.spliced,
        "loss_zeroed": measures.losses.zeroed,
    }


def model_stage(out: Path) -> dict[str, Any]:
    """Trains and saves the model and its tokenizer; returns what ``suite.json`` says of it."""
    folder, recipe = out / MODEL_FOLDER, ModelRecipe()
    started = time.monotonic()
    save_model(train_model(recipe), folder)
    save_tokenizer(folder)
    minutes = (time.monotonic() - started) / 60
    scores = {
        split.replace("_", "-"): task_scores(load_model(folder), split=split)
        for split in SPLITS[::-1]
    }
    return {
        "recipe": asdict(recipe),
        "minutes": round(minutes, 1),
        "threads": torch.get_num_threads(),
        "task_scores": scores,
    }


def _write_json(path: Path, content: Any) -> None:
    """Writes JSON, whole or not at all."""
    write_text_whole(path, json.dumps(content, indent=1) + "\n")


def _record(out: Path, part: str, content: dict[str, Any]) -> None:
    path = out / SUITE_FILE
    suite = read_json(path) if path.exists() else {"name": "gemma-2-tiny", "command": COMMAND}
    _write_json(path, {**suite, part: {"command": f"{COMMAND} --stage {part}", **content}})


STAGES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "model": model_stage,
    "dictionaries": partial(train_dictionaries, releases=PLAIN),
    "further": partial(train_dictionaries, releases=FURTHER),
}
"""Name to what trains it, in the order in which they build on one another."""


def main() -> None:
    """Runs the stages that are asked for."""
    parser = argparse.ArgumentParser(description="Rebuilds the bundled suite.")
    parser.add_argument("--stage", choices=("all", *STAGES), default="all")
    parser.add_argument("--out", type=Path, default=ASSETS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for stage in STAGES if args.stage == "all" else (args.stage,):
        _record(args.out, stage, STAGES[stage](args.out))


if __name__ == "__main__":
    main()
