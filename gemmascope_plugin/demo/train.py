"""Rebuilds the bundled suite: ``python -m gemmascope_plugin.demo.train``.

1. ``model``: the corpus, the tokenizer and the model (``train_model``).
2. ``dictionaries``: for each layer, one pass over fresh documents collects the activations at its four
   sites; residual, attention, MLP and transcoder dictionaries are trained on them, measured on
   held-out documents, labelled by the grammar's concepts and written in Gemma Scope's layout.

Each stage writes its part of ``assets/suite.json``: recipe, random seeds, metrics and this command.

Cost: about 15 minutes for the model and 30 for the dictionaries on two cores.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from gemmascope_plugin.demo.assets import ASSETS, MODEL_FOLDER, SUITE_FILE, read_json, write_json
from gemmascope_plugin.demo.measure import task_scores
from gemmascope_plugin.demo.tokenizer import save_tokenizer
from gemmascope_plugin.demo.train_dictionaries import train_dictionaries
from gemmascope_plugin.demo.train_model import ModelRecipe, save_model, train_model
from gemmascope_plugin.models import load_model

COMMAND = "python -m gemmascope_plugin.demo.train"


def main() -> None:
    """Runs the stages that are asked for."""
    parser = argparse.ArgumentParser(description="Rebuilds the bundled suite.")
    parser.add_argument("--stage", choices=("all", "model", "dictionaries"), default="all")
    parser.add_argument("--out", type=Path, default=ASSETS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.stage != "dictionaries":
        _record(args.out, "model", model_stage(args.out, ModelRecipe()))
    if args.stage != "model":
        _record(args.out, "dictionaries", train_dictionaries(args.out))


def model_stage(out: Path, recipe: ModelRecipe) -> dict[str, Any]:
    """Trains and saves the model and its tokenizer; returns what ``suite.json`` says of it."""
    folder = out / MODEL_FOLDER
    started = time.monotonic()
    save_model(train_model(recipe), folder)
    save_tokenizer(folder)
    minutes = (time.monotonic() - started) / 60
    scores = {
        split: task_scores(load_model(folder), split=split) for split in ("held-out", "train")
    }
    return {
        "command": f"{COMMAND} --stage model",
        "recipe": asdict(recipe),
        "minutes": round(minutes, 1),
        "threads": torch.get_num_threads(),
        "task_scores": scores,
    }


def _record(out: Path, part: str, content: dict[str, Any]) -> None:
    path = out / SUITE_FILE
    suite = read_json(path) if path.exists() else {"name": "gemma-2-tiny", "command": COMMAND}
    write_json(path, {**suite, part: content})


if __name__ == "__main__":
    main()
