"""Small runs on the random model: one corpus, one spec, comparisons bit by bit."""

from __future__ import annotations

from typing import Any

import torch

from gemmascope_plugin.training import TrainSpec, train
from tests.tiny_models import BOS_ID, EOS_ID, PAD_ID, random_tokens

CORPUS_ROWS = 24


def corpus(seed: int = 0) -> torch.Tensor:
    return random_tokens(CORPUS_ROWS, 17, seed)


def spec(**changes: Any) -> TrainSpec:
    """Two buckets per epoch, several epochs, a schedule that still moves at every step."""
    values: dict[str, Any] = {
        "layer": 1,
        "d_sae": 24,
        "target_l0": 4.0,
        "steps": 24,
        "batch_size": 32,
    }
    values |= {"bucket": 224, "rows": 5, "lr_warm_up": 6, "lr_end": 1e-4, "sparsity_warm_up": 0}
    values |= {"dead_after": 3, "seed": 7, "lr": 5e-3}
    values |= {"exclude": [BOS_ID, EOS_ID, PAD_ID]}
    if "hook_in" in changes:
        del values["layer"]
    return TrainSpec.from_dict(values | changes)


def run(model: Any, recipe: TrainSpec | None = None, text: Any = None, **options: Any) -> Any:
    text = corpus() if text is None else text
    return train(model, recipe or spec(), text, progress=False, **options)


def same(a: Any, b: Any) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return set(first) == set(second) and all(
        torch.equal(first[name], second[name]) for name in first
    )
