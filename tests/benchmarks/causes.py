"""Are exact and first-order causes fast, and are they right?

    python -m tests.benchmarks.causes [--part sweep ig correlation wide tasks] [--threads 2] [--smoke]

sweep        Every head at every position patched alone: ours against TransformerLens' own loop.
ig           EAP-IG at equal accuracy: midpoints and many rows per pass, against left ends and one prompt
             per pass (and all of them); ``causes_ig.py`` says what the peer is.
correlation  First-order scores against exact single edges, random Gemmas, also after ``W_O *= 10``.
wide         A few layers of Gemma 2 2B's shape with random weights: tokens per second (of the clean
             prompts) and memory, each call once after a forward pass. Memory is the peak of this process
             above what it holds before the call, from ``/proc/self``: this part runs on Linux only.
tasks        The bundled suite: the smallest faithful circuit of every task and method, see
             ``causes_tasks.py``.

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
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformer_lens.patching import get_act_patch_attn_head_out_by_pos
from transformers import Gemma2Config, Gemma2ForCausalLM

import gemmascope_plugin as gs
from gemmascope_plugin.causes import Task, activation_patching, logit_diff
from gemmascope_plugin.causes.effects import Effects
from gemmascope_plugin.causes.exact.edge_patching import edge_patching
from gemmascope_plugin.causes.gradient.edge_attribution import edge_attribution
from gemmascope_plugin.causes.replace import DeltaForm
from gemmascope_plugin.circuits.edge_ablation import EdgeAblation
from gemmascope_plugin.models.load_model import bridge_from_hf, hooked_from_hf
from tests import tiny_models
from tests.benchmarks.causes_ig import equal_steps, left_ends, midpoints, split_input_scores
from tests.benchmarks.causes_tasks import table
from tests.factories import tiny_hf, tiny_model, tiny_tokenizer


def medians(*runs: Callable[[], object], seconds: float = 15) -> list[float]:
    """Median seconds of each call, in turns: three rounds, or one if they would take longer than that.

    A round before does not count.
    """
    start = time.perf_counter()
    for run in runs:
        run()
    rounds = 3 if 3 * (time.perf_counter() - start) < seconds else 1
    times = [[once(run) for run in runs] for _ in range(rounds)]
    return [statistics.median(series) for series in zip(*times, strict=True)]


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
def sweep(smoke: bool = False) -> None:
    """Head by position, exactly."""
    suite = gs.tiny()
    for n in (1,) if smoke else (1, 8, 64):
        sweep_pair(f"bundled model, ioi, {n} prompts", suite.model, suite.task("ioi", n=n))
    if smoke:
        return
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
    seconds, our_seconds = medians(theirs, ours)
    first = int((bound.clean != bound.corrupt).any(0).nonzero()[0])
    cells = got.values.numel()
    live = cells * (bound.clean.shape[1] - first) // bound.clean.shape[1]
    print(
        f"{title}: {cells} cells, prompts differ at {live}; TransformerLens {seconds:.2f} s, "
        f"ours {our_seconds:.2f} s: {seconds / our_seconds:.1f}x; largest difference "
        f"{float((got.values - expected).abs().max()):.0e} of {float(expected.abs().max()):.2f}",
        flush=True,
    )


# --- ig ---------------------------------------------------------------------------------------------


def ig(smoke: bool = False) -> None:
    """EAP-IG at the same conservation residual."""
    suite, n = gs.tiny(), 1 if smoke else 16
    for name in list(suite.tasks)[: 1 if smoke else None]:
        task = suite.task(name, split="train", n=n)
        ig_pair(f"bundled model, {name}, {n} prompts", suite.model, task)
    for family in () if smoke else ("gemma2", "gemma3"):
        task = random_task(4, 12, tiny_models.VOCABULARY, changed=4)
        ig_pair(f"random {family}, 4 prompts", tiny_model(family, "hooked"), task)


def ig_pair(title: str, model: Any, task: Task) -> None:
    """Left ends that are as good as 5 to 10 midpoints, and the time of both where that is the median."""
    steps = equal_steps(model, task, range(5, 11))
    pairs = ", ".join(f"{k} ~ {left} ({residual:.4f})" for k, (left, residual) in steps.items())
    n = sorted(steps, key=lambda k: steps[k][0] / k)[(len(steps) - 1) // 2]
    left = steps[n][0]

    def ours(n: int = n) -> Effects:
        return edge_attribution(model, task, method="eap-ig", steps=n)

    equal = ours(3).values
    same = (
        split_input_scores(model, task, midpoints(3), 1) - equal
    ).abs().max() / equal.abs().max()
    (seconds,) = medians(ours)
    single, batched = (
        once(lambda rows=rows: split_input_scores(model, task, left_ends(left), rows))
        for rows in (1, len(task))
    )
    print(
        f"{title}: midpoints ~ left ends (residual of the midpoints): {pairs}\n"
        f"  {n} midpoints {seconds:.2f} s; {left} left ends, one prompt per pass {single:.2f} s: "
        f"{single / seconds:.1f}x; all prompts per pass {batched:.2f} s: {batched / seconds:.1f}x; at "
        f"equal points the scores differ by {float(same):.0e} of the largest",
        flush=True,
    )


# --- correlation ------------------------------------------------------------------------------------


def correlation(smoke: bool = False) -> None:
    """EAP against exact single edges; each run has its own prompts."""
    n_seeds, n, length = (1, 1, 6) if smoke else (4, 4, 12)
    forms: tuple[DeltaForm, ...] = ("exact", "jacobian", "frozen", "naive")
    tasks = [random_task(n, length, tiny_models.VOCABULARY, s, changed=2) for s in range(n_seeds)]
    for family in ("gemma2",) if smoke else ("gemma2", "gemma3"):
        plain, louder = (scaled_model(family, factor) for factor in (1, 10))
        exact = [edge_patching(plain, task) for task in tasks]
        print(
            f"random {family}, Pearson of EAP with exact edges, mean of {n_seeds} sets of prompts:"
        )
        for form in forms:
            scores = {
                model: [edge_attribution(model, t, method="eap", writer_delta=form) for t in tasks]
                for model in (plain, louder)
            }
            means = [
                statistics.mean(a.pearson(b) for a, b in zip(got, exact, strict=True))
                for got in scores.values()
            ]
            moved = max(
                float((a.flat - b.flat).abs().max() / a.flat.abs().max())
                for a, b in zip(*scores.values(), strict=True)
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


def wide(smoke: bool = False) -> None:
    """Tokens per second and memory at Gemma 2 2B's width."""
    n_layers, n, length = (3, 1, 8) if smoke else (4, 4, 64)
    narrow = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16} if smoke else {}
    vocab = 256_000 if available() > 16e9 else 32_000
    cut = "" if vocab == 256_000 else " (of 256,000: there is too little memory)"
    if smoke:
        vocab, cut = 1000, " (smoke case)"
    print(f"{n_layers} layers, vocabulary {vocab:,}{cut}, {n} prompts of {length} tokens")
    task = random_task(n, length, vocab, changed=length - 1)
    for build, n_calls in ((bridge_from_hf, None), (hooked_from_hf, 2)):
        model = build(wide_hf(n_layers, vocab, **narrow), tiny_tokenizer(), "random")
        print(f"{type(model).__name__}, {status('VmRSS') / 1e3:.1f} GB with the model")
        print_costs(wide_runs(model, task), n_calls, n * length)
        del model
        gc.collect()


def print_costs(runs: dict[str, Callable[[], object]], n_calls: int | None, n_tokens: int) -> None:
    """Time and memory of the first calls, the first of which is the measure of the others."""
    forward = next(iter(runs.values()))
    forward()
    unit = once(forward)
    for name, run in list(runs.items())[:n_calls]:
        seconds, memory = costs(run)
        print(
            f"  {name}: {seconds:.1f} s, {n_tokens / seconds:.0f} tokens/s, "
            f"{seconds / unit:.1f} forward passes, peak +{memory:.2f} GB",
            flush=True,
        )


def wide_runs(model: Any, task: Task) -> dict[str, Callable[[], object]]:
    """What is measured."""
    bound = task.bind(model)
    ablation = EdgeAblation(model, bound)
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(20, *ablation.edges.mask.shape, generator=generator) < 0.1
    return {
        "a forward pass": torch.no_grad()(lambda: bound.measure(model, bound.clean)),
        "EAP": lambda: edge_attribution(model, task, method="eap"),
        "EAP-IG, 5 midpoints": lambda: edge_attribution(model, task, method="eap-ig", steps=5),
        "heads of the third layer": lambda: activation_patching(model, task, "z", layers=[2]),
        "20 circuits of a tenth of the edges": lambda: ablation.metric(masks),
    }


def wide_hf(n_layers: int, vocab: int, **sizes: int) -> Any:
    """A random Gemma 2 of 2B's width and few layers."""
    config = Gemma2Config(
        vocab_size=vocab,
        num_hidden_layers=n_layers,
        attn_implementation="eager",
        pad_token_id=tiny_models.PAD_ID,
        eos_token_id=tiny_models.EOS_ID,
        bos_token_id=tiny_models.BOS_ID,
        **sizes,
    )
    config.architectures = ["Gemma2ForCausalLM"]
    torch.manual_seed(0)
    return Gemma2ForCausalLM(config).eval()


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


PARTS: dict[str, Callable[..., None]] = {
    **{"sweep": sweep, "ig": ig, "correlation": correlation, "wide": wide, "tasks": table}
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the figures of each part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="a small case of each part")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.threads = 1
    torch.set_num_threads(options.threads)
    for name in options.part:
        print(f"\n{name}, {options.threads} threads", flush=True)
        print(f"({once(partial(PARTS[name], smoke=options.smoke)):.0f} s)", flush=True)


if __name__ == "__main__":
    main()
