"""A small case of every benchmark, so that none rots: ``python -m tests.benchmarks.smoke [NAME ...]``.

The frame that every script here has, and that a new one gets:

1. ``def main(arguments: Sequence[str] | None = None) -> None`` reads its options from ``arguments``
   (``parser.parse_args(arguments)``, so that None means the command line) and prints its figures; the
   file ends with ``if __name__ == "__main__": main()``.
2. One of its options is ``--smoke``: the same code from the first line to the last, at sizes that take
   a few seconds on one thread and little memory. Fewer prompts, repeats, layers and features; no figure
   of it means anything. Whatever the benchmark asserts, it asserts there too.
3. No network, no file outside a temporary folder, no model but ``gs.tiny()`` and random ones:
   ``real_gemma_*.py`` run their smoke case on ``gs.tiny()``, with the tasks of the same names.
4. A script that sets environment variables before its imports says ``OWN_PROCESS = True``.

Files without ``main`` are parts of other scripts. ``ELSEWHERE`` names the scripts that need packages of
an environment of their own.

All others run one after another in this process, since importing torch, TransformerLens and SAELens takes
longer than most of them. Every one runs even when an earlier one fails; the exit status says whether all
passed.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

ELSEWHERE = {
    "circuit_tracer_golden": "circuit-tracer",
    "real_gemma_token_columns": "circuit-tracer",
    "trace_peer": "circuit-tracer",
    "trace_models": "a folder to write to; trace runs its code",
}
"""Scripts that cannot run here, and what they need."""


def names() -> list[str]:
    """Scripts that run here, by name."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    scripts = [f.stem for f in files if 'if __name__ == "__main__":' in f.read_text("utf-8")]
    return [name for name in scripts if name != Path(__file__).stem and name not in ELSEWHERE]


def run(name: str) -> bool:
    """Whether the small case of a script runs to its end."""
    module = importlib.import_module(f"tests.benchmarks.{name}")
    if getattr(module, "OWN_PROCESS", False):
        command = [sys.executable, "-m", module.__name__, "--smoke"]
        return subprocess.run(command, check=False).returncode == 0
    module.main(["--smoke"])
    return True


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs them all, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names())}")
    options = parser.parse_args(arguments)
    failed = []
    for name in options.names or names():
        print(f"\n== {name} --smoke", flush=True)
        start = time.perf_counter()
        try:
            passed = run(name)
        except (Exception, SystemExit):  # noqa: BLE001 - the next one runs all the same
            traceback.print_exc()
            passed = False
        if not passed:
            failed.append(name)
        print(
            f"== {name}: {'ran' if passed else 'FAILED'}, {time.perf_counter() - start:.0f} s",
            flush=True,
        )
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
