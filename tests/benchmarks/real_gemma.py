"""What a real Gemma says: circuits, the usual formulas beside these, heads of two mechanisms.

    python -m tests.benchmarks.real_gemma circuits|formulas|heads|all [--n 16] [--smoke]

Runs on the Gemma 3 270M of the ``[gemma]`` extra, whose weights are dequantised from four bits: figures
of the original weights will differ a little. ``--smoke`` runs the same code on the bundled
model in seconds.

``real_gemma_load.py``, ``real_gemma_logits.py`` and ``real_gemma_sweeps.py`` measure time and memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from typing import Any

import gemmascope_plugin as gs
from tests.benchmarks import (
    real_gemma_circuits,
    real_gemma_formulas,
    real_gemma_gradients,
    real_gemma_heads,
)

PARTS = ("circuits", "formulas", "heads")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the parts that are named."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=(*PARTS, "all"), nargs="?", default="all")
    parser.add_argument("--n", type=int, default=16, help="training prompts, and held-out ones")
    parser.add_argument("--tasks", nargs="*", help="tasks of the part")
    parser.add_argument("--smoke", action="store_true", help="the bundled model, few prompts")
    options = parser.parse_args(argv)
    model = gs.tiny().model if options.smoke else gs.load_model("gemma-3-270m")
    n = 4 if options.smoke else options.n
    parts = PARTS if options.part == "all" else (options.part,)
    for part in parts:
        print(f"\n# {part}: {getattr(model, 'gemmascope_source', 'bundled model')}, {n} prompts")
        {"circuits": circuits, "formulas": formulas, "heads": heads}[part](model, n, options)


def circuits(model: Any, n: int, options: Any) -> None:
    """One block of figures for each task."""
    names = options.tasks or (("ioi",) if options.smoke else real_gemma_circuits.TASKS)
    for name in names:
        for label, value in real_gemma_circuits.figures(model, *splits(model, name, n)):
            print(f"{label:<32} {value}", flush=True)


def formulas(model: Any, n: int, options: Any) -> None:
    """One table for each task."""
    for name in options.tasks or (("ioi",) if options.smoke else ("ioi", "agreement")):
        task, held_out = splits(model, name, n)
        print(f"\n| {name} | usual formula | here | truth |\n|---|---|---|---|")
        show(real_gemma_formulas.table(model, task, held_out))
        show(real_gemma_gradients.table(model, task))


def heads(model: Any, n: int, options: Any) -> None:
    """Induction, indirect objects, two hops."""
    if options.smoke:
        return  # these heads exist in one model only
    task, _ = splits(model, "induction", n)
    show(real_gemma_heads.induction(model, task))
    task, _ = splits(model, "ioi", n)
    show(real_gemma_heads.indirect_objects(model, task))
    show(real_gemma_heads.two_hops(model, n))


def splits(model: Any, name: str, n: int) -> tuple[Any, Any]:
    """Training and held-out prompts of a built-in task."""
    return (
        gs.Task.builtin(name, model, n=n, split="train"),
        gs.Task.builtin(name, model, n=n, split="held_out"),
    )


def show(rows: Iterable[Sequence[str]]) -> None:
    """Prints the rows of a table."""
    for cells in rows:
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
