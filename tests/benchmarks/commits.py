"""Has this checkout become slower than another one? The same calls in both, in turns.

    python -m tests.benchmarks.commits CHECKOUT [--rounds 7] [--calls NAME ...] [--smoke]

1. Each checkout has a process of its own, with one thread, that makes the same models and dictionaries
   and answers with the CPU seconds of a call.
2. Both make every call once, which does not count. Then they take turns, in alternating order.
3. Printed are the medians, and the median of the ratios of the rounds, this checkout over the other one:
   below 1 this one is faster.

``CHECKOUT`` is a folder that ``git worktree add CHECKOUT COMMIT`` makes. Calls use public names that both
have. With ``--smoke`` the other checkout is this one, and two calls are made once.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

HERE = Path(__file__).resolve()
PROMPT = "the capital of the state containing dallas is"
SMOKE = ("load", "splice")
Calls = dict[str, Callable[[], object]]


def calls() -> Calls:
    """What is timed, by name; made in the process of a checkout."""
    import gemmascope_plugin as gs

    suite = gs.tiny()
    model, task = suite.model, suite.task("ioi", n=16)
    stream = suite.load("res", 1)
    dictionaries = [stream, *(suite.load("transcoder", layer) for layer in range(4))]
    transcoders = dictionaries[1:]
    tokens = task.bind(model).clean

    def splice() -> None:
        with gs.splice(model, dictionaries) as spliced:
            spliced.run_with_cache(tokens)

    def edited() -> None:
        with gs.splice(model, stream, edits=gs.Clamp(features=3, value=4.0)) as spliced:
            spliced(tokens)

    def gradients() -> None:
        with gs.splice(model, dictionaries, error="drop") as spliced, torch.enable_grad():
            embedding = model.embed(tokens).requires_grad_(True)
            hook = lambda value, hook: embedding  # noqa: E731
            spliced.run_with_hooks(tokens, fwd_hooks=[("hook_embed", hook)]).sum().backward()

    def load() -> None:
        for spec in suite.specs:
            gs.load(spec)

    return {
        "load": load,
        "splice": splice,
        "splice, edited": edited,
        "splice, backward": gradients,
        **_wide(),
        "trace": lambda: gs.trace(model, PROMPT, transcoders),
        **_traced(),
        "activation_patching": lambda: gs.activation_patching(model, task, "z"),
        "activation_patching, features": lambda: gs.activation_patching(
            model, task.first(2), "feature", saes=stream
        ),
        "attribution_patching, ig": lambda: gs.attribution_patching(
            model, task, "feature", saes=stream, method="ig", steps=4
        ),
        "edge_attribution, eap-ig": lambda: gs.edge_attribution(
            model, task, method="eap-ig", steps=4
        ),
        "edge_patching": lambda: gs.edge_patching(model, task.first(4), edges=[("L0H1", "L2H1.q")]),
        "discover, exact": lambda: gs.discover(model, task.first(4), method="exact", size=6),
    }


def _wide() -> Calls:
    """A splice at a real width: 512 tokens through 2304 x 16384."""
    import gemmascope_plugin as gs
    from tests.benchmarks.splice import Sizes, dictionary

    sae = dictionary(Sizes())
    x = torch.randn(512, sae.cfg.d_in)
    hooked = gs.HookedSAE(sae)
    return {"encode, wide": lambda: hooked.sae.encode(x)}


def _traced() -> Calls:
    """A trace of 100 random tokens with some 11,000 active features."""
    import gemmascope_plugin as gs
    from tests.benchmarks.trace import model_of, transcoders_of
    from tests.benchmarks.trace_models import BOS, random_case

    case = random_case("medium")
    model, saes, tokens = model_of(case), transcoders_of(case), torch.tensor(case.tokens)
    return {"trace, 11,000 features": lambda: gs.trace(model, tokens, saes, exclude=(BOS,))}


def serve() -> None:
    """Reads names from stdin, answers with the CPU seconds of the call."""
    torch.set_num_threads(1)
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a call prints is not an answer
    named = calls()
    print(*named, sep="\t", file=answer, flush=True)
    for line in sys.stdin:
        start = time.process_time()
        named[line.strip()]()
        print(time.process_time() - start, file=answer, flush=True)


class Checkout:
    """The process of a checkout."""

    def __init__(self, folder: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(HERE), "--serve"],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.calls = self._answer().split("\t")

    def seconds(self, call: str) -> float:
        """CPU seconds of a call."""
        assert self._process.stdin is not None
        print(call, file=self._process.stdin, flush=True)
        return float(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the process of a checkout ended"
        return line.strip()


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a line for each call."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, nargs="?", default=HERE.parents[2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calls", nargs="*", help="only these")
    parser.add_argument("--smoke", action="store_true", help="this checkout twice, two calls, once")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        serve()
        return
    rounds = 1 if options.smoke else options.rounds
    here, other = Checkout(HERE.parents[2]), Checkout(options.checkout.resolve())
    for call in SMOKE if options.smoke else options.calls or here.calls:
        here.seconds(call), other.seconds(call)
        pairs = []
        for n in range(rounds):
            order = (here, other) if n % 2 else (other, here)
            seconds = {checkout: checkout.seconds(call) for checkout in order}
            pairs.append((seconds[here], seconds[other]))
        ratio = statistics.median(a / b for a, b in pairs)
        new, old = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"{call:32} {1e3 * new:9.1f} ms against {1e3 * old:9.1f} ms: {ratio:.3f}", flush=True)


if __name__ == "__main__":
    main()
