"""Which architecture is good at what, on the bundled model, where all concepts are known?

    python -m tests.benchmarks.architectures [--layer 2] [--seeds 0 1 2] [--only NAME ...] [--out FOLDER]
    python -m tests.benchmarks.architectures --summary FOLDER [FOLDER ...] [--record FILE]
    python -m tests.benchmarks.architectures --smoke

Every architecture is trained on the same activations of one residual layer with ``training.train``, at
equal width and nearly equal L0, once per seed, one thread; then all are measured on held-out documents by
``features.compare`` and by the probes for absorption. The first form writes ``rows.csv`` (one row per
architecture and seed) and prints the summary, mean and spread over seeds; the second puts the rows of
several runs together, later ones in place of earlier ones of the same seed. ``--record`` writes the
summary as JSON, from where docs and notebook quote it.

"Broad" concepts, for absorption, are those that contain at least four other known concepts. Milliseconds
per step are those of the whole run on activations from the disk, divided by its steps.

Cost: about 1.5 minutes per architecture and seed of width 512.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import gemmascope_plugin as gs
from gemmascope_plugin.demo.corpus import make_corpus
from gemmascope_plugin.measures import compare, probe_absorption
from gemmascope_plugin.measures.forest_scores import concept_order
from gemmascope_plugin.training import preset_spec, store_activations, train

BROAD = 4


@dataclass(frozen=True)
class Sizes:
    """How much is trained on and measured on."""

    steps: int
    train_documents: int = 6000
    held_out_documents: int = 400
    tokens: int = 330_000


SMOKE = Sizes(steps=3, train_documents=100, held_out_documents=12, tokens=4096)
SOFT = {
    **{"architecture": "softsae", "target_l0": 10.0, "lr": 3e-3, "subtract_b_dec": True},
    "options": {"final_alpha": 0.02},
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "JumpReLU": {"target_l0": 10.0},
    "JumpReLU, Gemma Scope": {
        **{"architecture": "gemma_scope_jumprelu", "scale": "sqrt_d", "target_l0": 8.7},
        "sparsity_coefficient": 0.6,
    },
    "TopK": {"architecture": "topk", "target_l0": 10},
    "BatchTopK": {"architecture": "batchtopk", "target_l0": 10.0},
    "soft top-k": {
        **{"architecture": "soft_topk", "target_l0": 10, "lr": 3e-3, "subtract_b_dec": True},
    },
    "SoftSAE": SOFT,
    "SoftSAE, standardised": {**SOFT, "scale": "layer_norm"},
    "Matryoshka BatchTopK": {
        **{"architecture": "matryoshka_prefix_batchtopk", "target_l0": 10.0},
        "levels": [64, 192, 512],
    },
    "Matryoshka JumpReLU": {
        **{"architecture": "matryoshka_prefix_jumprelu", "scale": "sqrt_d", "target_l0": 9.6},
        **{"levels": [64, 192, 512], "sparsity_coefficient": 1.5},
    },
    "Tree": {
        **{"architecture": "tree", "target_l0": 12, "levels": [320, 512], "dead_after": 50},
        "options": {"k_per_layer": [9, 3], "aux_layers": [0, 1]},
    },
}
SHOWN = [
    *("l0", "fvu", "share_of_zero", "dead_share", "concept_f1", "splitting", "absorption"),
    *("full_absorption", "absorption_fraction", "coverage", "s_res", "tree_precision"),
    *("tree_recall", "tree_f1", "k_spearman", "k_std", "ms_per_step", "n_parameters"),
]


def trained(name: str, layer: int, seed: int, steps: int, store: Any) -> tuple[Any, float]:
    """The dictionary, and milliseconds per step."""
    fields = {"layer": layer, "seed": seed, "steps": steps, "model": "gemma-2-tiny"}
    spec = preset_spec("quick", {**fields, **ARCHITECTURES[name]})
    start = time.perf_counter()
    sae = train(None, spec, store, progress=False)
    return sae, (time.perf_counter() - start) / steps * 1e3


def measured(model: Any, name: str, sae: Any, documents: int) -> dict[str, Any]:
    """One row of ``compare``, with absorption over broad concepts."""
    held_out = make_corpus(documents, 2000)
    names, concepts = held_out.concept_matrix()
    options: dict[str, Any] = {"concepts": concepts, "names": names, "batch_size": 64}
    frame = compare(
        model, {name: sae}, held_out.tokens, n_positions=0, n_parents=200, cost=True, **options
    )
    order = concept_order(concepts[held_out.tokens > 2], names)
    broad = [order.names[i] for i in (order.above.sum(1) >= BROAD).nonzero()[:, 0].tolist()]
    columns = [names.index(concept) for concept in broad]
    absorbed = probe_absorption(model, sae, held_out.tokens, concepts[..., columns], broad)
    spread = gs.measures.adaptivity(model, sae, held_out.tokens, batch_size=64).std
    means = absorbed[["full_absorption", "absorption_fraction"]].mean().to_dict()
    return {**frame.iloc[0].to_dict(), **means, "k_std": spread}


def run(layer: int, seeds: list[int], only: list[str], sizes: Sizes, out: Path) -> pd.DataFrame:
    """Trains and measures; every row is written as soon as it is there."""
    model, rows = gs.tiny().model, []
    with tempfile.TemporaryDirectory() as folder:
        hook = f"blocks.{layer}.hook_resid_post"
        tokens = make_corpus(sizes.train_documents, 1000).tokens
        amount = {"tokens": sizes.tokens, "shard": 1 << 16, "rows": 128}
        store = store_activations(model, tokens, [hook], Path(folder) / "store", **amount)
        for seed in seeds:
            for name in only:
                sae, milliseconds = trained(name, layer, seed, sizes.steps, store)
                row = {"seed": seed, "ms_per_step": milliseconds}
                row |= measured(model, name, sae, sizes.held_out_documents)
                rows.append(row)
                print(name, seed, {k: round(row[k], 4) for k in SHOWN if k in row}, flush=True)
                pd.DataFrame(rows).to_csv(out / "rows.csv", index=False)
    return pd.DataFrame(rows)


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean and sample deviation over seeds, ``a +- b``, one row per architecture."""
    groups = rows.groupby("name", sort=False)[SHOWN]
    mean, spread = groups.mean(), groups.std()
    text = mean.copy().astype(object)
    for name in mean.index:
        for column in SHOWN:
            a, b = mean.loc[name, column], spread.loc[name, column]
            text.loc[name, column] = f"{a:.3g} +- {b:.1g}" if b == b else f"{a:.3g}"
    text.insert(0, "seeds", groups.size())
    return text


def _number(value: Any) -> float | None:
    """A number as JSON has it: no NaN."""
    return None if pd.isna(value) else float(value)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layer", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--only", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--out", type=Path, default=Path("architectures"))
    parser.add_argument("--summary", type=Path, nargs="+")
    parser.add_argument("--record", type=Path)
    parser.add_argument("--smoke", action="store_true", help="3 steps of two architectures")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.smoke:
        with tempfile.TemporaryDirectory() as out:
            rows = run(options.layer, [0], ["JumpReLU", "Tree"], SMOKE, Path(out))
    elif options.summary:
        rows = pd.concat([pd.read_csv(folder / "rows.csv") for folder in options.summary])
        rows = rows.drop_duplicates(["name", "seed"], keep="last")
        rows = rows.set_index("name").loc[[n for n in ARCHITECTURES if n in set(rows["name"])]]
        rows = rows.reset_index()
    else:
        options.out.mkdir(parents=True, exist_ok=True)
        rows = run(options.layer, options.seeds, options.only, Sizes(options.steps), options.out)
    with pd.option_context("display.width", 250, "display.max_columns", None):
        print(summary(rows).T.to_string())
    if options.record:
        groups = rows.groupby("name", sort=False)[SHOWN]
        mean, spread = groups.mean().round(5), groups.std().round(5)
        content = {
            "command": "python -m tests.benchmarks.architectures",
            "layer": options.layer,
            "steps": options.steps,
            "seeds": int(groups.size().min()),
            "rows": {
                name: {c: [_number(mean.loc[name, c]), _number(spread.loc[name, c])] for c in SHOWN}
                for name in mean.index
            },
        }
        options.record.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
