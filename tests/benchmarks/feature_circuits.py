"""What circuits of features cost and find: ``python -m tests.benchmarks.feature_circuits [--smoke]``.

1. **Cost.** A random model in Gemma 2's shape, 6 layers of width 512, with 4,096-feature SAEs at every
   layer's attention, MLP and stream: 18 sites. The time of one midpoint of integrated gradients, of one
   site and of all sites, over that of one bare forward and backward pass on the same prompts; beside it
   the same midpoint with all dictionaries spliced in, as the definition reads. Threads fixed, one
   warm-up, medians, all in one run.
2. **Size.** On the bundled suite, for three tasks and several choices of sites: how many nodes it takes
   for a faithfulness of .8 on held-out prompts, errors kept and ablated.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import pandas as pd
import torch

import gemmascope_plugin as gs
from gemmascope_plugin.causes import Task, logit_diff
from gemmascope_plugin.causes.gradient.site_runs import (
    Ending,
    MeanSlopes,
    frozen_model,
    mean_slopes,
    run_sites,
)
from gemmascope_plugin.causes.gradient.task_site import read_sites, sites_of
from gemmascope_plugin.causes.memory import Limit
from gemmascope_plugin.circuits import discover, evaluate
from gemmascope_plugin.models.gradients import gradients_of
from gemmascope_plugin.models.load_model import hooked_from_hf
from gemmascope_plugin.models.module_replay import Restart
from gemmascope_plugin.splice import splice
from tests import factories, tiny_models

LAYERS, WIDTH, FEATURES = 6, 512, 4096
SIZES = (5, 10, 15, 20, 25, 30, 40, 50, 60, 80, 100, 150, 200, 300)
TASKS = ("ioi", "agreement", "two_hop")


def timed(function: Callable[[], Any], repeats: int) -> float:
    """Median seconds after one warm-up."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return median(times)


def large_model(width: int) -> Any:
    """6 layers of that width."""
    hf = tiny_models.gemma2(
        num_hidden_layers=LAYERS,
        hidden_size=width,
        intermediate_size=4 * width,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=width // 8,
        sliding_window=16,
    )
    return hooked_from_hf(hf, factories.tiny_tokenizer(), "random")


def dictionaries(model: Any, d_sae: int) -> list[Any]:
    """SAEs of every layer and site, each feature active on a few percent of tokens."""
    return [
        factories.dictionary(model, f"blocks.{layer}.{hook}", seed=layer, d_sae=d_sae)
        for layer in range(LAYERS)
        for hook in ("attn.hook_z", "hook_mlp_out", "hook_resid_post")
    ]


def task_of(n_prompts: int, length: int) -> Task:
    """Random tokens, two of which are corrupted."""
    clean = tiny_models.random_tokens(batch_size=n_prompts, length=length, seed=1)
    corrupt = clean.clone()
    corrupt[:, 3:5] = tiny_models.random_tokens(batch_size=n_prompts, length=3, seed=2)[:, 1:]
    return Task(clean, corrupt, logit_diff([10] * n_prompts, [20] * n_prompts), "random")


def cost(n_prompts: int, length: int, *, smoke: bool) -> pd.Series:
    """Ratios of the first table."""
    steps, repeats = (2, 1) if smoke else (10, 3)
    model = large_model(64 if smoke else WIDTH)
    saes = dictionaries(model, 128 if smoke else FEATURES)
    sites = sites_of(model, saes)
    bound = task_of(n_prompts, length).bind(model)

    def bare() -> None:
        last = f"blocks.{LAYERS - 1}.hook_resid_post"
        gradients_of(model, lambda: bound.measure(model, bound.clean).sum(), [last])

    clean, corrupt = (
        read_sites(model, sites, tokens, bound.mask) for tokens in (bound.clean, bound.corrupt)
    )
    end = Restart(model, bound.clean, range(LAYERS + 1))

    def slopes() -> None:
        with frozen_model(model):
            for site in sites:
                ending = Ending(bound, end, site)
                mean_slopes(
                    ending, clean[site.hook].y, corrupt[site.hook].y, steps, steps * n_prompts
                )

    def spliced() -> None:
        hooks = [
            f"{site.hook}.{part}"
            for site in sites
            for part in ("hook_sae_acts_post", "hook_sae_error")
        ]
        with splice(model, saes, error="keep") as runner:
            gradients_of(runner, lambda: bound.measure(runner, bound.clean).sum(), hooks)

    def all_of_it() -> None:
        run_sites(
            model, bound, sites, method=MeanSlopes(steps), limit=Limit(steps * n_prompts, None)
        )

    unit = timed(bare, repeats)
    everything = timed(slopes, repeats)
    return pd.Series(
        {
            "sites": len(sites),
            "steps": steps,
            "bare forward and backward, ms": 1000 * unit,
            "one midpoint at one site / bare": everything / steps / len(sites) / unit,
            "one midpoint at all sites / bare": everything / steps / unit,
            "with both runs, encoding and residuals / bare": timed(all_of_it, repeats)
            / steps
            / unit,
            "one midpoint with all dictionaries spliced in / bare": timed(spliced, repeats) / unit,
        }
    )


def choices(suite: Any) -> dict[str, tuple[Sequence[Any], tuple[str, ...]]]:
    """Sites by name: dictionaries, and raw components beside them."""

    def of(*kinds: str, layers: Sequence[int] = range(4)) -> list[Any]:
        return [suite.load(kind, layer) for kind in kinds for layer in layers]

    raw = ("head", "mlp")
    return {
        "stream, attention, MLP": (of("res", "att", "mlp"), ()),
        "stream": (of("res"), ()),
        "attention, MLP": (of("att", "mlp"), ()),
        "attention": (of("att"), ()),
        "attention, transcoders": (of("att", "transcoder"), ()),
        "transcoders, heads": (of("transcoder"), ("head",)),
        "attention 2, heads, MLPs": (of("att", layers=[2]), raw),
        "stream 1, heads, MLPs": (of("res", layers=[1]), raw),
        "stream 1": (of("res", layers=[1]), ()),
        "stream 2": (of("res", layers=[2]), ()),
    }


def table(
    tasks: Sequence[str], names: Sequence[str], n: int, per_position: Sequence[bool]
) -> pd.DataFrame:
    """Nodes for a faithfulness of .8, and the faithfulness of 60."""
    suite, rows = gs.tiny(), []
    for task in tasks:
        train, held_out = suite.task(task, split="train", n=n), suite.task(task, n=n)
        for name, (saes, raw) in choices(suite).items():
            if name not in names:
                continue
            for placed in per_position:
                circuit = discover(
                    suite.model,
                    train,
                    nodes=("features", *raw),
                    saes=saes,
                    per_position=placed,
                    errors=False,
                    edges=False,
                )
                rows.append(
                    {"task": task, "sites": name, "per position": placed, "nodes": circuit.n_units}
                )
                sizes = [size for size in SIZES if size <= circuit.n_units]
                for errors in ("kept", "ablated"):
                    scores = evaluate(
                        suite.model,
                        circuit,
                        held_out,
                        saes=saes,
                        sizes=sizes,
                        n_random=0,
                        errors=errors,
                    )
                    rows[-1] |= {
                        f".8 at, {errors}": scores.smallest(0.8),
                        f"of 60, {errors}": scores.faithfulness,
                        f"empty, {errors}": scores.metric_empty,
                    }
    frame = pd.DataFrame(rows)
    return frame.astype({name: "Int64" for name in frame.columns if name.startswith(".8")})


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="few prompts and a narrow model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--part", choices=("cost", "size", "both"), default="both")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    smoke = options.smoke
    parts = ((2, 8),) if smoke else ((4, 16), (2, 96))
    for n_prompts, length in () if options.part == "size" else parts:
        print(f"\n{n_prompts} prompts of {length} tokens, {options.threads} threads")
        print(cost(n_prompts, length, smoke=smoke).round(2).to_string())
    if options.part == "cost":
        return
    names = ["attention"] if smoke else list(choices(gs.tiny()))
    frame = table(
        TASKS[: 1 if smoke else None],
        names,
        4 if smoke else 64,
        (False,) if smoke else (False, True),
    )
    print("\n" + frame.round(3).to_string(index=False))


if __name__ == "__main__":
    main()
