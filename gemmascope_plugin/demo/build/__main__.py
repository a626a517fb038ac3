"""Rebuilds the bundled suite: ``python -m gemmascope_plugin.demo.build``.

1. ``model``: the corpus, the tokenizer and the model (``train_model``).
2. ``dictionaries``: residual, attention, MLP and transcoder dictionaries of every layer in Gemma Scope's
   layout (``train_dictionaries``), measured on held-out documents and labelled by the grammar's concepts.
3. ``further``: Matryoshkas of the residual stream and transcoders with affine skip in Gemma Scope 2's
   layout, likewise.

Each stage writes its part of ``assets/suite.json``: recipe, random seeds, metrics and this command.

Cost: about 15 minutes for the model and 30 for the dictionaries on two cores.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gemmascope_plugin.causes.builtin import SPLITS
from gemmascope_plugin.demo.assets import (
    ASSETS,
    MODEL_FOLDER,
    SUITE_FILE,
    read_json,
    save_tokenizer,
    write_json,
)
from gemmascope_plugin.demo.build.measure_suite import task_scores
from gemmascope_plugin.demo.build.train_model import ModelRecipe, save_model, train_model
from gemmascope_plugin.demo.build.train_saes import FURTHER, PLAIN, train_dictionaries
from gemmascope_plugin.models import load_model

COMMAND = "python -m gemmascope_plugin.demo.build"


def main() -> None:
    """Runs the stages that are asked for."""
    parser = argparse.ArgumentParser(description="Rebuilds the bundled suite.")
    parser.add_argument("--stage", choices=("all", *STAGES), default="all")
    parser.add_argument("--out", type=Path, default=ASSETS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for stage in STAGES if args.stage == "all" else (args.stage,):
        _record(args.out, stage, STAGES[stage](args.out))


def model_stage(out: Path) -> dict[str, Any]:
    """Trains and saves the model and its tokenizer; returns what ``suite.json`` says of it."""
    folder, recipe = out / MODEL_FOLDER, ModelRecipe()
    started = time.monotonic()
    save_model(train_model(recipe), folder)
    save_tokenizer(folder)
    minutes = (time.monotonic() - started) / 60
    scores = {
        split.replace("_", "-"): task_scores(load_model(folder), split=split)
        for split in SPLITS[::-1]
    }
    return {
        "recipe": asdict(recipe),
        "minutes": round(minutes, 1),
        "threads": torch.get_num_threads(),
        "task_scores": scores,
    }


def _record(out: Path, part: str, content: dict[str, Any]) -> None:
    path = out / SUITE_FILE
    suite = read_json(path) if path.exists() else {"name": "gemma-2-tiny", "command": COMMAND}
    write_json(path, {**suite, part: {"command": f"{COMMAND} --stage {part}", **content}})


STAGES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "model": model_stage,
    "dictionaries": partial(train_dictionaries, releases=PLAIN),
    "further": partial(train_dictionaries, releases=FURTHER),
}
"""Name to what trains it, in the order in which they build on one another."""


if __name__ == "__main__":
    main()
