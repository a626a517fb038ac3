"""Logits only where they are asked: what that saves on a vocabulary of 262,144 words.

    python -m tests.benchmarks.real_gemma_logits [--model FOLDER] [--baseline CHECKOUT] [--smoke]

position   One position through the unembedding against TransformerLens' own ``unembed`` on a row-major
           ``W_U``, as it comes from there, and on the layout that ``load_model`` makes.
lens       The matrix products of ``logit_lens`` on 16 positions alone: what it cannot go below.
calls      ``logit_lens`` (16 positions, and the last one alone), ``steer``, ``measure`` (417 tokens),
           ``verify`` (ids [2, 512]) and ``evaluate`` (a circuit of nodes on 8 prompts of 12 tokens
           beside 20 random ones) in a process of their own, in turns with the same calls from another
           checkout of this repository (``git worktree add CHECKOUT 9a878da``): median CPU seconds, peak
           memory above what the model takes.

``--model`` is a Hugging Face folder of Gemma 3 270M; without it, and with ``--smoke``, the bundled model.
Dictionaries are random JumpReLU of width 4096 in the middle layer: what they cost does not depend on what
they have learned. Ratios above 1 are in our favour.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

CALLS = ("logit_lens", "logit_lens_end", "steer", "measure", "verify", "evaluate")
ROUNDS = 3


def main(arguments: Sequence[str] | None = None) -> None:
    """Both parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--baseline", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--calls", nargs="+", default=list(CALLS), choices=CALLS)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.child:
        print(json.dumps(child(options.child, options.model, options.smoke)))
        return
    model = model_of(options.model)
    position(model, 3 if options.smoke else 7)
    lens_products(model)
    del model  # the calls need the memory
    for name in options.calls:
        if options.smoke:  # in this process, which has imported everything
            print(name, child(name, None, True))
        else:
            compare(name, options)


def position(model: Any, rounds: int) -> None:
    """One position, three ways."""
    from gemmascope_plugin.models.unembed import all_logits, unembedding

    def here(x: torch.Tensor) -> torch.Tensor:
        out = unembedding(model)
        return all_logits(out, out.read(x, normed=True))

    x = torch.randn(1, 1, model.cfg.d_model, dtype=next(model.parameters()).dtype)
    layout = model.unembed.W_U.data
    seconds: dict[str, list[float]] = {}
    with torch.no_grad():
        for way in ("warm", *("row-major", "transposed", "here") * rounds):
            model.unembed.W_U.data = layout.contiguous() if way == "row-major" else layout
            run = here if way == "here" else model.unembed
            start = time.perf_counter()
            run(x)
            seconds.setdefault(way, []).append(time.perf_counter() - start)
    model.unembed.W_U.data = layout
    median = {way: statistics.median(times) for way, times in seconds.items()}
    print(
        f"one position: TransformerLens {median['row-major']:.4f} s, on our layout "
        f"{median['transposed']:.4f} s, here {median['here']:.4f} s, ratios "
        f"{median['row-major'] / median['here']:.1f} and {median['transposed'] / median['here']:.1f}"
    )


def lens_products(model: Any) -> None:
    """The products that the lens needs for every layer at 16 positions, in its own tiles."""
    from gemmascope_plugin.models.unembed import unembedding

    out = unembedding(model)
    x = torch.randn(model.cfg.n_layers * 16, model.cfg.d_model)
    seconds = []
    for _ in range(ROUNDS):
        start = time.process_time()
        for _, weight, parts in out.tiles(len(x), x):
            for part in parts:
                _ = x[part] @ weight.T
        seconds.append(time.process_time() - start)
    print(f"logit_lens, products of 16 positions alone: {statistics.median(seconds):.3f} s")


def compare(name: str, options: argparse.Namespace) -> None:
    """One call here and in the other checkout, in turns."""
    here = Path(__file__).resolve().parents[2]
    folders = {"here": here} | ({"there": options.baseline} if options.baseline else {})
    results: dict[str, list[dict[str, float]]] = {}
    for _ in range(ROUNDS):
        for label, folder in folders.items():
            results.setdefault(label, []).append(in_process(name, folder, options))
    medians = {
        label: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for label, runs in results.items()
    }
    print(f"{name}: {medians}", end="")
    if "there" in medians:
        print(f", ratio {medians['there']['seconds'] / medians['here']['seconds']:.1f}", end="")
    print(flush=True)


def in_process(name: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """The call in a process that imports the package from ``folder``."""
    command = [sys.executable, __file__, "--child", name, "--threads", str(options.threads)]
    command += ["--model", options.model] if options.model else []
    command += ["--smoke"] if options.smoke else []
    environment = os.environ | {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def child(name: str, folder: str | None, smoke: bool) -> dict[str, float]:
    """Seconds and memory of one call."""
    model = model_of(folder)
    run = prepared(name, model, smoke)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "seconds": time.process_time() - cpu,
        "wall": time.perf_counter() - wall,
        "MB": (after - before) / 1024,
    }


def model_of(folder: str | None) -> Any:
    """The real model, or the bundled one."""
    import gemmascope_plugin as gs

    return gs.load_model(folder) if folder else gs.tiny().model


def prepared(name: str, model: Any, smoke: bool) -> Callable[[], object]:
    """A call whose arguments are there; names that both checkouts have."""
    import gemmascope_plugin as gs

    torch.manual_seed(0)
    words = int(model.cfg.d_vocab)
    length, documents = (32, 2) if smoke else (512, 2)
    ids = torch.randint(5, words, (documents, length))
    ids[:, 0] = model.tokenizer.bos_token_id
    sae = dictionary(model, 256 if smoke else 4096)
    if name == "logit_lens":
        return lambda: gs.logit_lens(model, ids[:1, :16])
    if name == "logit_lens_end":
        return lambda: gs.logit_lens(model, ids[:1, :16], positions=[-1])
    if name == "steer":
        return lambda: gs.steer(model, sae, 3, 4.0, PROMPT, max_new_tokens=8)
    if name == "measure":
        return lambda: gs.measure(model, sae, ids[:1, : 32 if smoke else 417])
    if name == "verify":
        return lambda: gs.verify(model, sae, ids)
    clean = torch.randint(5, words, (2 if smoke else 8, 12))
    clean[:, 0] = model.tokenizer.bos_token_id
    corrupt = clean.clone()
    corrupt[:, 4] = clean[:, 4].flip(0)
    answers = torch.arange(7, 7 + 2 * len(clean)).view(2, -1).tolist()
    task = gs.Task(clean, corrupt, gs.logit_diff(*answers))
    circuit = gs.discover(model, task)
    return lambda: gs.evaluate(model, circuit, task, n_random=2 if smoke else 20)


PROMPT = "when anna went to the store"
"""Words of the bundled model too, which knows few."""


def dictionary(model: Any, d_sae: int) -> Any:
    """A random JumpReLU SAE that is active on a few percent of the middle layer."""
    from sae_lens import SAE

    layer, d = model.cfg.n_layers // 2, int(model.cfg.d_model)
    hook = f"blocks.{layer}.hook_resid_post"
    config = {
        "architecture": "jumprelu",
        "d_in": d,
        "d_sae": d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"hook_name": hook, "model_name": "benchmark"},
    }
    sae: Any = SAE.get_sae_class_for_architecture("jumprelu")(
        SAE.get_sae_config_class_for_architecture("jumprelu").from_dict(config)
    )
    for parameter in (sae.W_enc, sae.W_dec):
        parameter.data = torch.randn(parameter.shape) * d**-0.5
    tokens = torch.randint(5, int(model.cfg.d_vocab), (1, 64))
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=[hook])
    pre = (cache[hook][0].float() @ sae.W_enc).flatten()
    level = float(pre.detach().sort().values[int(0.98 * len(pre))])
    sae.threshold.data = torch.full((d_sae,), level)
    return sae


if __name__ == "__main__":
    main()
