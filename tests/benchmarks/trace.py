"""How fast are attribution graphs, and how much memory do they take?

    python -m tests.benchmarks.trace peer --peer PEER/bin/python [--cases small medium large]
        [--batch-sizes 64 256 512] [--threads 2] [--repeat 3]
    python -m tests.benchmarks.trace bound [--threads 1] [--repeat 3]
    python -m tests.benchmarks.trace long [--pos 2500] [--rows 128] [--threads 2]
    python -m tests.benchmarks.trace --smoke

peer   The same graph, every active feature a row, by this package and by circuit-tracer 0.5.0, whose
       Python is given (``trace_peer.py`` says how to make it). Cases are those of ``trace_models.py``:
       about 3,000, 11,000 and 23,000 active features. Both run in processes of their own, one warm-up
       first, taking turns; circuit-tracer gets the best of the batch sizes (its own default is 512). The
       adjacencies are compared.
bound  A prompt of 16 tokens on 18 layers of Gemma 3 270M's shape with random weights, 60 active features
       a token and layer: CPU seconds of a trace, and those that the products which its definition asks
       for take by themselves, at the rate of a product of this size measured in the same run.
long   A prompt of 2,500 tokens on 4 layers of Gemma 2 2B's width with random weights and transcoders of
       16,384 features: seconds, and the peak of the process.

Ratios above 1 are in our favour. Two threads on cores that others use wait for each other: measure on an
idle machine, or with one thread.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_lens import SAE
from transformer_lens import HookedTransformer, HookedTransformerConfig

import gemmascope_plugin as gs
from tests.benchmarks.trace_models import (
    BOS,
    CASES,
    Case,
    gemma2_config,
    random_case,
    random_state,
    random_tokens,
    random_transcoders,
)

HERE = Path(__file__).parent


def model_of(case: Case) -> Any:
    """The model of a case, frozen."""
    model = HookedTransformer(HookedTransformerConfig(**case.config), move_to_device=False)
    model.load_state_dict(case.state, strict=False)
    return model.eval().requires_grad_(False)


def transcoders_of(case: Case) -> list[Any]:
    """The transcoders of a case as SAELens' own."""
    made = []
    name = "jumprelu_transcoder"
    for layer in range(case.config["n_layers"]):
        prefix = f"{layer}."
        state = {
            k.removeprefix(prefix): v for k, v in case.transcoders.items() if k.startswith(prefix)
        }
        d_in, d_sae = state["W_enc"].shape
        hooks = (f"blocks.{layer}.{hook}" for hook in (case.hook_in, case.hook_out))
        metadata = dict(zip(("hook_name", "hook_name_out"), hooks, strict=True))
        config = {
            "architecture": name,
            "d_in": d_in,
            "d_out": state["W_dec"].shape[1],
            "d_sae": d_sae,
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": False,
            "normalize_activations": "none",
            "reshape_activations": "none",
            "metadata": {**metadata, "model_name": "random-gemma-2"},
        }
        sae_class: Any = SAE.get_sae_class_for_architecture(name)
        sae = sae_class(SAE.get_sae_config_class_for_architecture(name).from_dict(config))
        sae.load_state_dict(state)
        made.append(sae.eval().requires_grad_(False))
    return made


def peak_mb() -> float:
    """Largest memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def ours(folder: Path, repeat: int, adjacency: Path | None) -> dict[str, Any]:
    """Times traces of one case; the first one is the warm-up."""
    case = Case.load(folder)
    model, transcoders, tokens = model_of(case), transcoders_of(case), torch.tensor(case.tokens)
    with torch.no_grad():
        model(tokens[None])
    before, seconds, cpu_seconds, graph = peak_mb(), [], [], None
    for i in range(repeat + 1):
        start, spent = time.perf_counter(), time.process_time()
        graph = gs.trace(model, tokens, transcoders, exclude=(BOS,))
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - spent)
        if i == 0:
            after = peak_mb()
    assert graph is not None
    if adjacency is not None:
        np.save(adjacency, in_their_order(graph, case))
    return {
        "seconds": statistics.median(seconds[1:] or seconds),
        "cpu_seconds": statistics.median(cpu_seconds[1:] or cpu_seconds),
        "peak_mb": after - before,
        "active_features": int(graph.where("feature").sum()),
        "residual": graph.metadata["residual"],
    }


def in_their_order(graph: Any, case: Case) -> np.ndarray:
    """The dense adjacency with circuit-tracer's nodes; errors at the first token are zero there."""
    nodes = graph.nodes.reset_index()
    n_layers, n_pos = case.config["n_layers"], len(case.tokens)
    features = nodes[nodes["kind"] == "feature"].sort_values(["layer", "pos", "index"])
    error_rows = {(r.layer, r.pos): r.Index for r in nodes[nodes["kind"] == "error"].itertuples()}
    errors = [error_rows.get((i, p), -1) for i in range(n_layers) for p in range(n_pos)]
    tokens = nodes[nodes["kind"] == "token"].index
    targets = nodes[nodes["kind"] == "target"].index
    at = np.concatenate([features.index, errors, tokens, targets]).astype(int)
    dense = graph.adjacency.tocsr()[at][:, at].toarray()
    dense[at < 0] = 0
    dense[:, at < 0] = 0
    return dense


def child(command: list[str]) -> dict[str, Any]:
    """What a process prints last, as JSON."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def peer_command(peer: Path | None, folder: Path, size: int) -> list[str]:
    """How the peer's half is measured; without a peer our own half stands for it."""
    if peer is None:
        return own_command(folder)
    return [str(peer), str(HERE / "trace_peer.py"), str(folder), "--batch-size", str(size)]


def own_command(folder: Path) -> list[str]:
    """How our half is measured."""
    return [sys.executable, "-m", "tests.benchmarks.trace", "child", str(folder)]


def compare(options: argparse.Namespace, name: str, root: Path) -> None:
    """One case by both, taking turns."""
    folder = root / name
    random_case(name).save(folder)
    common = ["--threads", str(options.threads), "--repeat", str(options.repeat), "--adjacency"]
    files = {who: str(root / f"{name}-{who}.npy") for who in ("ours", "peer")}
    peers, owns = [], []
    for size in options.batch_sizes:
        command = peer_command(options.peer, folder, size)
        peers.append({"batch_size": size, **child([*command, *common, files["peer"]])})
        owns.append(child([*own_command(folder), *common, files["ours"]]))
        sides = {"circuit-tracer": peers[-1], "ours": owns[-1]}
        print(f"  batch {size}: {', '.join(map(timed, sides, sides.values()))}", flush=True)
    times = ("seconds", "cpu_seconds")
    our_run = {**owns[-1], **{name: statistics.median(run[name] for run in owns) for name in times}}
    best, least = (min(peers, key=lambda peer: peer[name]) for name in times)
    got, expected = (np.load(files[who]) for who in ("ours", "peer"))
    gap = np.abs(got - expected).max() / np.abs(expected).max()
    ratio, cpu_ratio = (
        peer[unit] / our_run[unit] for peer, unit in zip((best, least), times, strict=True)
    )
    print(
        f"{name}: {our_run['active_features']} active features; {ratio:.1f}x, of CPU {cpu_ratio:.1f}x: "
        f"{timed('circuit-tracer', {**best, 'cpu_seconds': least['cpu_seconds']})} (batch "
        f"{best['batch_size']}, of CPU {least['batch_size']}; +{best['peak_mb']:.0f} MB), "
        f"{timed('ours', our_run)} (+{our_run['peak_mb']:.0f} MB); largest difference {gap:.1e} "
        f"of the largest entry; rows sum to pre-activations to {our_run['residual']:.1e}"
    )


def timed(name: str, run: dict[str, Any]) -> str:
    """How long a run took."""
    return f"{name} {run['seconds']:.2f} s ({run['cpu_seconds']:.2f} s of CPU)"


def long_prompt(n_pos: int, rows: int, *, small: bool = False) -> None:
    """A long prompt on a few wide layers."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"n_layers": 4, "d_model": 2304, "d_head": 256, "n_heads": 8, "n_key_value_heads": 4}
    sizes |= {"d_mlp": 9216, "d_vocab": 4096, "n_ctx": 8192, "window_size": 4096}
    d_sae = 256 if small else 16384
    config = gemma2_config() if small else gemma2_config(**sizes)
    weights = random_transcoders(config, d_sae, 20 / d_sae, generator)
    case = Case(config, random_state(config, generator), weights, [])
    model, transcoders = model_of(case), transcoders_of(case)
    case.state.clear()
    case.transcoders.clear()
    tokens = torch.randint(4, config["d_vocab"], (n_pos,), generator=generator)
    tokens[0] = BOS
    print(f"weights: peak {peak_mb():.0f} MB", flush=True)
    start = time.perf_counter()
    graph = gs.trace(
        model,
        tokens,
        transcoders,
        exclude=(BOS,),
        max_feature_nodes=rows,
        memory_budget="2.5 GB",
        progress=True,
    )
    print(
        f"{n_pos} tokens, {int(graph.where('feature').sum())} active features, {len(graph.rows.nodes)} "
        f"rows, {graph.n_edges} edges: {time.perf_counter() - start:.0f} s, peak of the process "
        f"{peak_mb():.0f} MB, rows sum to pre-activations to {graph.metadata['residual']:.1e}"
    )


def bound(repeat: int, *, small: bool = False) -> None:
    """A short prompt on many layers against the products that it cannot do without."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"n_layers": 18, "d_model": 640, "d_head": 256, "n_heads": 4, "n_key_value_heads": 1}
    sizes |= {"d_mlp": 2048, "d_vocab": 4096, "n_ctx": 512, "window_size": 512}
    config, d_sae, l0 = (gemma2_config(), 64, 6) if small else (gemma2_config(**sizes), 4096, 60)
    state = random_state(config, generator)
    weights = random_transcoders(config, d_sae, l0 / d_sae, generator)
    tokens = random_tokens(config, 16, generator)
    case = Case(config, state, weights, tokens)
    model, transcoders = model_of(case), transcoders_of(case)
    cpu_seconds, graph = [], None
    for _ in range(repeat + 1):
        graph = None
        spent = time.process_time()
        graph = gs.trace(model, torch.tensor(tokens), transcoders, exclude=(BOS,))
        cpu_seconds.append(time.process_time() - spent)
    assert graph is not None
    operations, speed = needed(graph, config), rate(config)
    seconds = statistics.median(cpu_seconds[1:])
    print(
        f"{int(graph.where('feature').sum())} active features, {graph.n_edges} edges "
        f"({8e-6 * graph.n_edges:.0f} MB): {seconds:.2f} s of CPU; {operations / 1e9:.0f} billion "
        f"operations at {speed / 1e9:.0f} billion a second: {operations / speed:.2f} s, "
        f"{seconds * speed / operations:.2f}x; rows sum to pre-activations to "
        f"{graph.metadata['residual']:.1e}"
    )


def needed(graph: Any, config: dict[str, Any]) -> float:
    """Operations of the products of all rows: through attention at every token and layer below a target,
    but for the first layer, and one product of the model's width for every edge."""
    nodes = graph.nodes[graph.nodes["kind"].isin(("feature", "target"))]
    layers, tokens = nodes["layer"].to_numpy().clip(max=config["n_layers"] - 1), nodes["pos"] + 1
    heads, values = (config["d_head"] * config[n] for n in ("n_heads", "n_key_value_heads"))
    passed = (layers - 1).clip(min=0)
    through = (passed * tokens + (layers > 0)) * heads + layers * tokens * values
    mixed = passed * tokens * (tokens + 1) / 2 * heads / config["d_model"]
    return 2.0 * config["d_model"] * float((through + mixed).sum() + graph.n_edges)


def rate(config: dict[str, Any]) -> float:
    """Operations a second of CPU of a product like those of the sweep."""
    heads = config["n_heads"] * config["d_head"]
    gradients, weights = torch.randn(512, config["d_model"]), torch.randn(config["d_model"], heads)
    seconds = []
    for _ in range(20):
        spent = time.process_time()
        gradients @ weights
        seconds.append(time.process_time() - spent)
    return 2 * gradients.numel() * heads / statistics.median(seconds)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="?", choices=("peer", "bound", "long", "child"))
    parser.add_argument("folder", nargs="?", type=Path, help="for a child")
    parser.add_argument("--peer", type=Path, help="circuit-tracer's Python")
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--batch-sizes", nargs="*", type=int, default=[64, 256, 512])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--adjacency", type=Path)
    parser.add_argument("--pos", type=int, default=2500)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="a small case of every part, our own half in place of the peer's",
    )
    options = parser.parse_args(arguments)
    if options.smoke:
        options.part, options.peer, options.threads, options.repeat = "peer", None, 1, 1
        CASES["smoke"], options.cases, options.batch_sizes = (8, 64, 40), ["smoke"], [64]
        long_prompt(n_pos=12, rows=4, small=True)
        bound(1, small=True)
    elif options.part is None or (options.part == "peer" and options.peer is None):
        parser.error("peer --peer PYTHON, bound, long or --smoke?")
    torch.set_num_threads(options.threads)
    if options.part == "child":
        print(json.dumps(ours(options.folder, options.repeat, options.adjacency)))
    elif options.part == "bound":
        bound(options.repeat)
    elif options.part == "long":
        long_prompt(options.pos, options.rows)
    else:
        with tempfile.TemporaryDirectory() as root:
            for name in options.cases:
                compare(options, name, Path(root))


if __name__ == "__main__":
    main()
