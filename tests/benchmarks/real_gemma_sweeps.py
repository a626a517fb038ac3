"""Causes on the real Gemma 3 270M: how far from what they need at least, and from the usual loop?

    python -m tests.benchmarks.real_gemma_sweeps [--prompts 8 16] [--part heads ig edges threads]
                                                 [--backend hooked] [--dtype float32] [--smoke]

heads    Exact patching of every head, against the loop of TransformerLens' ``patching`` module (one whole
         pass per head, logits of every position), of which a few heads are timed: each costs the same.
         *Floor*: the matrix products alone that positions behind the first difference need in the layers
         above each patch, at this machine's rate for those shapes, and one pass over the base prompts.
         *Floor with steps between*: the same and what lies between products, in as few readings of memory
         as torch can do it: four norms and two sums of the stream, norms and rotation of queries and
         keys, the gated product. Not in either: scores, softmax, copies, the metric, Python.
ig       Integrated gradients over heads: time by ``2 steps + 1`` patches of every layer, which is what
         their definition needs.
edges    Exact edges: time of one, by that of a whole pass over the prompts.
threads  A circuit of edges on one thread and on two while another process keeps a core busy, with threads
         by the size of the work and with both for everything.

CPU seconds of one thread, but for ``threads``, which are seconds of the clock. Everything runs once
before it is timed; medians of three.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch

import gemmascope_plugin as gs
from gemmascope_plugin.causes.bound_task import BoundTask
from gemmascope_plugin.causes.exact.edge_patching import edge_patching
from gemmascope_plugin.causes.replayed import replayed
from gemmascope_plugin.circuits.edge_ablation import EdgeAblation
from gemmascope_plugin.graphs.edge_map import EdgeMap
from gemmascope_plugin.models.anatomy import Anatomy
from gemmascope_plugin.models.block import gelu_times
from gemmascope_plugin.models.protocol import dtype_of
from gemmascope_plugin.models.threads import SHARE

AT_ONCE = 1024
"""Positions whose steps between products are timed together."""
Clock = Callable[[], float]


def median(run: Callable[[], object], rounds: int = 3, clock: Clock = time.process_time) -> float:
    """Seconds of a call, once before not counted."""
    run()
    times = []
    for _ in range(rounds):
        start = clock()
        run()
        times.append(clock() - start)
    return statistics.median(times)


def heads(model: Any, task: Any, rounds: int) -> None:
    """The sweep over all heads."""
    bound, anatomy = task.bind(model), Anatomy(model)
    swept = gs.activation_patching(model, task, "z")
    seconds = median(lambda: gs.activation_patching(model, task, "z"), rounds)
    sample = [(0, 0), (anatomy.n_layers // 2, 1), (anatomy.n_layers - 1, anatomy.n_heads - 1)]
    effects: list[torch.Tensor] = []
    # the loop begins with a pass for each run
    each = median(lambda: effects.append(loop(model, bound, sample)), 1) / (len(sample) + 2)
    n_heads = anatomy.n_layers * anatomy.n_heads
    values = torch.stack([swept.values[place] for place in sample])
    off = float((effects[-1] - values).abs().max() / abs(swept.gap))
    least, between = floor(anatomy, bound)
    usual = each * (n_heads + 2)
    print(
        f"  heads: {seconds:.2f} s; the usual loop {usual:.1f} s ({usual / seconds:.1f}x); products "
        f"alone {least:.2f} s ({seconds / least:.2f} of them), with steps between "
        f"{least + between:.2f} s ({seconds / (least + between):.2f}); difference {off:.0e} of the gap",
        flush=True,
    )


@torch.no_grad()
def loop(model: Any, bound: BoundTask, places: Sequence[tuple[int, int]]) -> torch.Tensor:
    """What ``transformer_lens.patching`` does for each head: a hooked pass, its logits, the metric."""
    rows = torch.arange(len(bound))
    _, cache = model.run_with_cache(bound.clean, names_filter=lambda name: name.endswith("hook_z"))

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return bound.metric.of_rows(logits[rows, bound.metric.at]).mean()

    base, values = metric(model(bound.corrupt)), []
    for layer, head in places:
        name = f"blocks.{layer}.attn.hook_z"

        def insert(z: torch.Tensor, hook: Any, name: str = name, head: int = head) -> torch.Tensor:
            z[:, :, head] = cache[name][:, :, head]
            return z

        values.append(
            metric(model.run_with_hooks(bound.corrupt, fwd_hooks=[(name, insert)])) - base
        )
    return torch.stack(values)


def floor(anatomy: Anatomy, bound: BoundTask) -> tuple[float, float]:
    """CPU seconds of the products that the sweep cannot do without, and of the steps between them."""
    d, z, kv = anatomy.d_model, anatomy.n_heads * anatomy.d_head, anatomy.n_kv * anatomy.d_head
    d_mlp = int(anatomy.model.cfg.d_mlp)
    after_z = [(z, d), (d, d_mlp), (d, d_mlp), (d_mlp, d)]
    block = [(d, z), (d, kv), (d, kv), *after_z]
    random = functools.partial(torch.randn, dtype=dtype_of(anatomy.model))
    weights = {shape: random(shape) for shape in block}
    stream, heads, gate = (random(AT_ONCE, width) for width in (d, z + kv, d_mlp))
    out = torch.empty_like(stream), torch.empty_like(heads)

    def products(n_rows: int, shapes: Sequence[tuple[int, int]]) -> float:
        inputs = {i: random(n_rows, i) for i in {i for i, _ in shapes}}
        return median(lambda: [inputs[i] @ weights[i, o] for i, o in shapes], 1)

    def steps() -> None:
        for _ in range(6):
            torch.mul(stream, stream, out=out[0])
        for _ in range(2):
            torch.mul(heads, heads, out=out[1])
        gelu_times(gate, gate)

    total, rows = 0.0, 0
    for part in replayed(anatomy.model, bound, bound.corrupt, bound.clean, rows=len(bound)):
        window = part.replay.window(part.start)
        tokens = len(part.index) * (window.stop - window.start)
        entering = anatomy.n_heads * tokens
        total += anatomy.n_layers * products(part.replay.tokens.numel(), block)
        total += anatomy.n_layers * products(tokens, block)  # the other run
        rows += anatomy.n_layers * (part.replay.tokens.numel() + tokens)
        for layer in range(anatomy.n_layers):
            total += products(entering, after_z)
            total += products(layer * entering, block) if layer else 0.0
            rows += (layer + 1) * entering
    return total, median(steps, 9) * rows / AT_ONCE


def ig(model: Any, task: Any, rounds: int) -> None:
    """Integrated gradients of all heads."""
    steps = 5

    def estimated(**options: Any) -> Any:
        return gs.attribution_patching(model, task, "z", method="ig", steps=steps, **options)

    calls: dict[str, Callable[[], Any]] = {
        "ig": estimated,
        "layers": lambda: gs.activation_patching(model, task, "z", axes=("layer",)),
        "top ig": lambda: estimated(layers=top(model)),
        "top exact": lambda: gs.activation_patching(model, task, "z", layers=top(model)),
    }
    seconds = {name: median(run, rounds) for name, run in calls.items()}
    result, needed = estimated(), (2 * steps + 1) * seconds["layers"]
    print(
        f"  ig, {steps} steps: {seconds['ig']:.2f} s, {seconds['ig'] / needed:.2f} of {2 * steps + 1} "
        f"exact patches of every layer; two top layers {seconds['top ig']:.2f} s, exact heads "
        f"{seconds['top exact']:.2f} s; residual {result.metadata['residual_max']:.1e}",
        flush=True,
    )


def top(model: Any) -> list[int]:
    """The last two layers."""
    n = int(model.cfg.n_layers)
    return [n - 2, n - 1]


def edges(model: Any, task: Any, rounds: int) -> None:
    """Some exact edges."""
    edge_map, bound = EdgeMap.of(Anatomy(model)), task.bind(model)
    places = edge_map.mask.nonzero()
    generator = torch.Generator().manual_seed(0)
    chosen = places[torch.randperm(len(places), generator=generator)[:96]].tolist()
    named = [(edge_map.writers[w], edge_map.readers[r]) for w, r in chosen]
    seconds = median(lambda: edge_patching(model, task, edges=named), rounds)
    none = median(lambda: edge_patching(model, task, edges=named[:1]), rounds)
    per_edge = (seconds - none) / (len(named) - 1)
    with torch.no_grad():
        whole = median(lambda: bound.measure(model, bound.clean), rounds)
    print(
        f"  edges: {1000 * per_edge:.1f} ms each, a whole pass {1000 * whole:.0f} ms "
        f"({whole / per_edge:.1f}x)",
        flush=True,
    )


def threads(model: Any, task: Any, rounds: int) -> None:
    """A circuit of edges beside a busy process."""
    ablation = EdgeAblation(model, task.bind(model))
    mask = ablation.edges.mask.clone()
    mask[:, ::2] = False
    before, times = torch.get_num_threads(), []
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        for count, by_size in ((1, True), (2, True), (2, False)):
            torch.set_num_threads(count)
            share = (
                nullcontext() if by_size else patch("gemmascope_plugin.models.threads.SHARE", 1.0)
            )
            with share:
                run = lambda: ablation.metric(mask[None])  # noqa: E731
                times.append(median(run, rounds, time.perf_counter))
    finally:
        busy.kill()
        busy.wait()
        torch.set_num_threads(before)
    single, sized, split = times
    print(
        f"  threads: one {single:.2f} s, two by size ({SHARE:.1e} operations each) {sized:.2f} s, "
        f"two for everything {split:.2f} s",
        flush=True,
    )


PARTS = {"heads": heads, "ig": ig, "edges": edges, "threads": threads}


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--backend", choices=("hooked", "bridge"), default="hooked")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="the bundled model, in seconds")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.smoke:
        model: Any = gs.tiny(backend=options.backend).model
        options.prompts, options.rounds = [4], 1
    else:
        model = gs.load_model(options.model, backend=options.backend, dtype=options.dtype)
    for n in options.prompts:
        task = gs.Task.builtin("ioi", model, n=n)
        bound = task.bind(model)
        lengths = bound.lengths
        print(f"{n} prompts of {int(lengths.min())} to {int(lengths.max())} tokens", flush=True)
        for name in options.part:
            PARTS[name](model, task, options.rounds)


if __name__ == "__main__":
    main()
