"""Are exact and first-order causes fast, and are they right?

    python tests/benchmarks/causes.py [--part sweep ig correlation wide tasks] [--threads 2]

sweep        Every head at every position patched alone: ours against TransformerLens' own loop.
ig           EAP-IG at equal accuracy: midpoints and many rows per pass against left ends. The peer is
             the algorithm of EAP-IG (arXiv 2403.17806) written down here, since its code needs other
             versions: points k/n from the corrupted end, one point per pass, gradients at
             TransformerLens' split inputs. Heads' differences go through the norm after attention
             as ours do (EAP-IG leaves it out), so that only points and passes differ. It runs one
             prompt per pass, and beside that all of them.
correlation  First-order scores against exact single edges, random Gemmas, also after ``W_O *= 10``.
wide         Layers of Gemma 2 2B's shape with random weights: tokens per second and memory. Memory is
             the peak of this process above what it holds with the model loaded, from ``/proc/self``,
             so this part runs on Linux only.
tasks        The bundled suite: the smallest faithful circuit of every task and method.

Random or bundled weights, float32, fixed threads. What is compared runs once before it is timed and
takes turns; medians. Ratios above 1 are in our favour.
"""

from __future__ import annotations

import argparse
import copy
import gc
import io
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformer_lens.patching import get_act_patch_attn_head_out_by_pos
from transformers import Gemma2Config, Gemma2ForCausalLM

import gemmascope_plugin as gs
from gemmascope_plugin.attribution.edge_attribution import edge_attribution
from gemmascope_plugin.circuits import evaluate
from gemmascope_plugin.circuits.discover import graph_of
from gemmascope_plugin.circuits.edge_ablation import EdgeAblation
from gemmascope_plugin.circuits.evaluate import evaluate_ranking
from gemmascope_plugin.circuits.recovery import auroc, bootstrap_stability
from gemmascope_plugin.circuits.select import top_n
from gemmascope_plugin.models.anatomy import Anatomy
from gemmascope_plugin.models.gradients import gradients_of
from gemmascope_plugin.models.load import hooked_from_hf
from gemmascope_plugin.patching import Task, activation_patching, logit_diff
from gemmascope_plugin.patching.edge_effects import EdgeEffects
from gemmascope_plugin.patching.edge_patching import edge_patching
from gemmascope_plugin.patching.edges import EdgeMap
from gemmascope_plugin.patching.task import BoundTask
from gemmascope_plugin.patching.writes import DeltaForm, Writes, write_deltas
from tests import tiny_models
from tests.factories import tiny_hf, tiny_model, tiny_tokenizer

MOST_LEFT_ENDS = 2000
TASKS = ("ioi", "agreement", "years", "induction", "two_hop")


def medians(*runs: Callable[[], object], seconds: float = 15) -> list[float]:
    """Median seconds of each call, in turns: three rounds, or one if they would take longer than that.

    A round before does not count.
    """
    start = time.perf_counter()
    for run in runs:
        run()
    rounds = 3 if 3 * (time.perf_counter() - start) < seconds else 1
    times = [[once(run) for run in runs] for _ in range(rounds)]
    return [statistics.median(own) for own in zip(*times, strict=True)]


def once(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def random_task(n: int, length: int, vocab: int, seed: int = 0, *, changed: int) -> Task:
    """Random prompts, of which ``changed`` tokens from the second on differ."""
    generator = torch.Generator().manual_seed(seed)
    first = tiny_models.FIRST_WORD_ID
    clean, corrupt = torch.randint(first, vocab, (2, n, length), generator=generator)
    corrupt[:, 1 + changed :] = clean[:, 1 + changed :]
    clean[:, 0] = corrupt[:, 0] = tiny_models.BOS_ID
    right, wrong = torch.randint(first, vocab, (2, n), generator=generator).tolist()
    return Task(clean, corrupt, logit_diff(right, wrong), name="random")


# --- sweep ------------------------------------------------------------------------------------------


@torch.no_grad()
def sweep() -> None:
    """Head by position, exactly."""
    suite = gs.tiny()
    for n in (1, 8, 64):
        sweep_pair(f"bundled model, ioi, {n} prompts", suite.model, suite.task("ioi", n=n))
    config = {
        **{"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128},
        **{"query_pre_attn_scalar": 128, "vocab_size": 4096},
    }
    wide = hooked_from_hf(tiny_models.gemma2(**config), tiny_tokenizer(), "random")
    for n in (1, 4):
        task = random_task(n, 8, 256, changed=7)
        sweep_pair(f"6 layers of width 512, {n} random prompts of 8 tokens", wide, task)


def sweep_pair(title: str, model: Any, task: Task) -> None:
    names = [f"blocks.{layer}.attn.hook_z" for layer in range(model.cfg.n_layers)]

    def theirs() -> torch.Tensor:
        bound = task.bind(model)
        _, cache = model.run_with_cache(bound.clean, names_filter=names)
        with redirect_stderr(io.StringIO()):  # its progress bar
            return get_act_patch_attn_head_out_by_pos(
                model, bound.corrupt, cache, lambda logits: bound.metric(logits).mean()
            )

    def ours() -> Any:
        return activation_patching(model, task, "z", axes=("layer", "pos", "head"))

    got, bound = ours(), task.bind(model)
    expected = theirs() - got.metadata["metric_corrupt"]
    seconds, own = medians(theirs, ours)
    first = int((bound.clean != bound.corrupt).any(0).nonzero()[0])
    cells = got.values.numel()
    live = cells * (bound.clean.shape[1] - first) // bound.clean.shape[1]
    print(
        f"{title}: {cells} cells, prompts differ at {live}; TransformerLens {seconds:.2f} s, "
        f"ours {own:.2f} s: {seconds / own:.1f}x; largest difference "
        f"{float((got.values - expected).abs().max()):.0e} of {float(expected.abs().max()):.2f}",
        flush=True,
    )


# --- ig ---------------------------------------------------------------------------------------------


def ig() -> None:
    """EAP-IG at the same conservation residual."""
    suite = gs.tiny()
    for name in TASKS:
        task = suite.task(name, split="train", n=16)
        ig_pair(f"bundled model, {name}, 16 prompts", suite.model, task)
    for family in ("gemma2", "gemma3"):
        task = random_task(4, 12, tiny_models.VOCABULARY, changed=4)
        ig_pair(f"random {family}, 4 prompts", tiny_model(family, "hooked"), task)


def ig_pair(title: str, model: Any, task: Task, n: int = 10) -> None:
    """Left ends that are as good as 5 to 10 midpoints, and the time of both for ``n``."""
    steps = equal_steps(model, task)
    found = ", ".join(f"{k} ~ {left} ({target:.4f})" for k, (left, target) in steps.items())
    print(f"{title}: midpoints ~ left ends (residual of the midpoints): {found}")

    def ours(n: int = n) -> EdgeEffects:
        return edge_attribution(model, task, method="eap-ig", steps=n)

    def theirs(alphas: np.ndarray, rows: int) -> torch.Tensor:
        return split_input_scores(model, task, alphas.tolist(), rows)

    same = float(
        (theirs(midpoints(3), 1) - ours(3).values).abs().max() / ours(3).values.abs().max()
    )
    left = steps[n][0]
    (own,) = medians(ours)
    single, batched = (once(lambda r=r: theirs(left_ends(left), r)) for r in (1, len(task)))
    print(
        f"  {n} midpoints {own:.2f} s; {left} left ends, one prompt per pass {single:.2f} s: "
        f"{single / own:.1f}x; all prompts per pass {batched:.2f} s: {batched / own:.1f}x; at equal "
        f"points the scores differ by {same:.0e} of the largest"
    )


def midpoints(n: int) -> np.ndarray:
    return (np.arange(n) + 0.5) / n


def left_ends(n: int) -> np.ndarray:
    """Points on the line from clean (0) to corrupted (1), counted from the corrupted end."""
    return 1 - np.arange(n) / n


def equal_steps(model: Any, task: Task) -> dict[int, tuple[int, float]]:
    """Midpoints to the left ends from which on the residual stays as small, and that residual.

    Scores out of the embedding sum to the metric's slope along the line. It is read at 97 places; the
    polynomial through them stands for it, so that thousands of rules cost nothing.
    """
    bound = task.bind(model)
    ends = bound.ends(model)
    whole = ends["metric_corrupt"] - ends["metric_clean"]
    slope = np.polynomial.Chebyshev.interpolate(
        lambda alphas: slopes(model, bound, alphas), 96, domain=[0, 1]
    )

    def residual(alphas: np.ndarray) -> float:
        return abs(float(slope(alphas).mean()) / whole - 1)

    lefts = [residual(left_ends(m)) for m in range(1, MOST_LEFT_ENDS)]
    targets = {n: residual(midpoints(n)) for n in range(5, 11)}
    return {
        n: (1 + max((m for m, found in enumerate(lefts, 1) if found > target), default=0), target)
        for n, target in targets.items()
    }


def slopes(model: Any, bound: BoundTask, alphas: np.ndarray) -> np.ndarray:
    """Derivative of the mean metric along the line at each point."""
    clean, corrupt = (Writes.read(model, t, 1).embed for t in (bound.clean, bound.corrupt))
    found = []
    for alpha in alphas.tolist():
        slope = slopes_at(model, bound, torch.lerp(clean, corrupt, alpha), ["hook_embed"])
        found.append(float((slope["hook_embed"] * (corrupt - clean)).sum()) / len(bound))
    return np.array(found)


def slopes_at(
    model: Any, bound: BoundTask, embed: torch.Tensor, names: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Gradients of the clean prompts' metric with other embeddings."""
    return gradients_of(
        model,
        lambda: bound.measure(model, bound.clean).sum(),
        names,
        fwd_hooks=[("hook_embed", lambda x, hook: embed)],
    )


def split_input_scores(model: Any, task: Task, alphas: Sequence[float], rows: int) -> torch.Tensor:
    """The peer: scores ``[writer, reader]``, gradients read at TransformerLens' split inputs."""
    anatomy, bound = Anatomy(model), task.bind(model)
    edges, layers = EdgeMap.of(anatomy), range(anatomy.n_layers)
    ports = ("hook_q_input", "hook_k_input", "hook_v_input", "hook_mlp_in")
    names = [f"blocks.{layer}.{port}" for layer in layers for port in ports]
    names.append(f"blocks.{len(layers) - 1}.hook_resid_post")
    total = torch.zeros(edges.mask.shape)
    model.set_use_split_qkv_input(True)
    model.set_use_hook_mlp_in(True)
    try:
        for part in bound.parts(rows):
            runs = [
                Writes.read(model, tokens, len(layers)) for tokens in (part.clean, part.corrupt)
            ]
            deltas = write_deltas(anatomy, *runs)
            for alpha in alphas:
                embed = torch.lerp(runs[0].embed, runs[1].embed, alpha)
                found = slopes_at(model, part, embed, names)
                readers = [g if g.ndim == 4 else g[:, :, None] for g in map(found.get, names)]
                total += torch.einsum("bpwm,bprm->wr", deltas, torch.cat(readers, 2))
    finally:
        model.set_use_split_qkv_input(False)
        model.set_use_hook_mlp_in(False)
    return (total / (len(bound) * len(alphas))).masked_fill(~edges.mask, 0)


# --- correlation ------------------------------------------------------------------------------------


def correlation(n_seeds: int = 4) -> None:
    """EAP against exact single edges; each run has its own prompts."""
    forms: tuple[DeltaForm, ...] = ("exact", "jacobian", "frozen", "naive")
    tasks = [random_task(4, 12, tiny_models.VOCABULARY, s, changed=2) for s in range(n_seeds)]
    for family in ("gemma2", "gemma3"):
        plain, louder = (scaled_model(family, factor) for factor in (1, 10))
        exact = [edge_patching(plain, task) for task in tasks]
        print(
            f"random {family}, Pearson of EAP with exact edges, mean of {n_seeds} sets of prompts:"
        )
        for form in forms:
            found = {
                model: [edge_attribution(model, t, method="eap", writer_delta=form) for t in tasks]
                for model in (plain, louder)
            }
            means = [
                statistics.mean(a.pearson(b) for a, b in zip(got, exact, strict=True))
                for got in found.values()
            ]
            moved = max(
                float((a.flat - b.flat).abs().max() / a.flat.abs().max())
                for a, b in zip(*found.values(), strict=True)
            )
            print(
                f"  {form:>8}: {means[0]:.3f}; after W_O *= 10 {means[1]:.3f}, scores moved by up to "
                f"{moved:.0e} of the largest"
            )
        again = max(
            float((edge_patching(louder, t).flat - e.flat).abs().max() / e.flat.abs().max())
            for t, e in zip(tasks[:1], exact, strict=False)
        )
        print(f"  exact edges moved by {again:.0e} of the largest")


def scaled_model(family: str, factor: float) -> Any:
    """The tests' tiny model, the output projections of its attention multiplied by ``factor``."""
    hf = copy.deepcopy(tiny_hf(family))
    for layer in hf.model.layers:
        layer.self_attn.o_proj.weight.mul_(factor)
    return hooked_from_hf(hf, tiny_tokenizer(), f"tiny-{family}")


# --- wide -------------------------------------------------------------------------------------------


def wide(n_layers: int = 4, n: int = 4, length: int = 64) -> None:
    """Tokens per second and memory at Gemma 2 2B's width."""
    vocab = 256_000 if available() > 16e9 else 32_000
    model = wide_model(n_layers, vocab)
    weights = sum(p.nbytes for p in model.parameters()) / 1e9
    task = random_task(n, length, vocab, changed=length - 1)
    cut = "" if vocab == 256_000 else ", of 256,000: there is too little memory"
    print(
        f"{n_layers} layers of Gemma 2 2B's shape, random weights, vocabulary {vocab:,}{cut}: "
        f"{weights:.1f} GB; {n} prompts of {length} tokens"
    )
    ablation = EdgeAblation(model, task.bind(model))
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(20, *ablation.edges.mask.shape, generator=generator) < 0.1
    layer = n_layers // 2
    runs = {
        "EAP": lambda: edge_attribution(model, task, method="eap"),
        "EAP-IG, 5 midpoints": lambda: edge_attribution(model, task, method="eap-ig", steps=5),
        f"sweep of the heads of layer {layer}": lambda: activation_patching(
            model, task, "z", layers=[layer]
        ),
        "20 circuits of a tenth of the edges": lambda: ablation.metric(kept),
    }
    with torch.no_grad():
        model(task.bind(model).clean[:1])
    for name, run in runs.items():
        seconds, memory = costs(run)
        print(
            f"  {name}: {seconds:.1f} s, {n * length / seconds:.1f} tokens/s, peak +{memory:.2f} GB "
            f"on {status('VmRSS') / 1e3:.1f} GB"
        )


def wide_model(n_layers: int, vocab: int) -> Any:
    """A random Gemma 2 of few layers."""
    config = Gemma2Config(
        vocab_size=vocab,
        num_hidden_layers=n_layers,
        attn_implementation="eager",
        pad_token_id=tiny_models.PAD_ID,
        eos_token_id=tiny_models.EOS_ID,
        bos_token_id=tiny_models.BOS_ID,
    )
    config.architectures = ["Gemma2ForCausalLM"]
    torch.manual_seed(0)
    return hooked_from_hf(Gemma2ForCausalLM(config).eval(), tiny_tokenizer(), "random")


def available() -> float:
    """Bytes of memory that are free on this machine."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(float(line.split()[1]) * 1e3 for line in lines if line.startswith("MemAvailable"))


def status(key: str) -> float:
    """A size of this process in MB: ``VmRSS`` now, ``VmHWM`` at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1e3 for line in lines if line.startswith(key))


def costs(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds of one call, and by how many GB it raises the memory of the process at its peak."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    seconds = once(run)
    return seconds, (status("VmHWM") - before) / 1e3


# --- tasks ------------------------------------------------------------------------------------------


def tasks(n: int = 64) -> None:
    """The smallest faithful circuits of the bundled suite."""
    suite = gs.tiny()
    print(
        f"{n} training prompts for scores, {n} held-out ones for faithfulness; smallest circuit from "
        "which on faithfulness stays at .9 or above; AUROC with the tenth of the edges with the largest "
        "exact effects as the truth; overlap of the best 20 edges between resamples of the prompts"
    )
    for name in TASKS:
        train, held_out = suite.task(name, split="train", n=n), suite.task(name, n=n)
        exact = edge_patching(suite.model, train)
        print(f"{name}: {exact.edges.n_edges} edges")
        for label, options in METHODS.items():
            effects = exact
            if options:
                effects = edge_attribution(suite.model, train, by_prompt=True, **options)
            print(f"  {label:<22}: {row(suite.model, held_out, effects, exact)}", flush=True)


METHODS: dict[str, dict[str, Any]] = {
    "eap": {"method": "eap"},
    "eap, naive": {"method": "eap", "writer_delta": "naive"},
    "eap-ig, 10": {"method": "eap-ig", "steps": 10},
    "eap-ig-activations, 5": {"method": "eap-ig-activations", "steps": 5},
    "exact": {},
}


def row(model: Any, held_out: Task, effects: EdgeEffects, exact: EdgeEffects) -> str:
    graph, large = graph_of(effects), exact.flat.abs()
    n_edges = graph.n_edges
    circuit = top_n(graph, n_edges)
    sizes = [*range(61), *range(64, n_edges, 4), n_edges]
    smallest = evaluate(circuit, model, held_out, sizes=sizes, n_random=0).smallest(0.9)
    assert smallest is not None, "all edges together are the model"
    random = evaluate(circuit.top(smallest), model, held_out, sizes=[], n_random=20).random
    curve = evaluate_ranking(graph, model, held_out)
    embed = float(effects.total[0].sum()) / -effects.gap - 1
    return (
        f"{smallest:>3} edges, {smallest / n_edges:.1%} (best of 20 random {max(random):.2f}); AUROC "
        f"{auroc(effects.flat, large >= large.quantile(0.9)):.3f}, Pearson {effects.pearson(exact):.3f}, "
        f"out of the embedding {embed:+.4f}, overlap {bootstrap_stability(effects, 20)[0]:.2f}, "
        f"CPR {curve.cpr:.2f}, CMD {curve.cmd:.3f}"
    )


PARTS = {"sweep": sweep, "ig": ig, "correlation": correlation, "wide": wide, "tasks": tasks}


def main() -> None:
    """Print the figures of each part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for name in given.part:
        print(f"\n{name}, {given.threads} threads", flush=True)
        print(f"({once(PARTS[name]):.0f} s)", flush=True)


if __name__ == "__main__":
    main()
