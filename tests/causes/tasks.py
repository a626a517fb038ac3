"""A task on random tokens, and the model under one patch, computed slowly."""

from __future__ import annotations

from typing import Any

import torch

from gemmascope_plugin.causes import Task, logit_diff
from gemmascope_plugin.models import flatten_heads, restore_heads
from tests.splice.reference import features
from tests.tiny_models import FIRST_WORD_ID, random_tokens

CLEAN = random_tokens(batch_size=2, length=8, seed=5)
CORRUPT = CLEAN.clone()
CORRUPT[:, 2:4] = random_tokens(batch_size=2, length=3, seed=6)[:, 1:]
RIGHT, WRONG = [10, 20], [30, 40]
TASK = Task(CLEAN, CORRUPT, logit_diff(RIGHT, WRONG), name="random")
_LONG = random_tokens(batch_size=4, length=12, seed=5)
LATE = Task(
    _LONG,
    _LONG.scatter(1, torch.tensor([[2], [7], [2], [5]]), torch.tensor([[40], [50], [60], [70]])),
    logit_diff([10, 20, 30, 40], [11, 21, 31, 41]),
)
"""Prompts that differ at one token each."""


def score(logits: torch.Tensor) -> float:
    """Mean of ``logit(right) - logit(wrong)`` at the last position, one prompt at a time."""
    rows = [float(row[-1, r] - row[-1, w]) for row, r, w in zip(logits, RIGHT, WRONG, strict=True)]
    return sum(rows) / len(rows)


@torch.no_grad()
def metric_under(model: Any, tokens: torch.Tensor, hooks: dict[str, Any]) -> float:
    """The metric with plain hooks on the bare model."""
    fwd_hooks = [(name, lambda x, hook, fn=fn: fn(x)) for name, fn in hooks.items()]
    with model.hooks(fwd_hooks=fwd_hooks):
        return score(model(tokens))


@torch.no_grad()
def values_at(model: Any, tokens: torch.Tensor, name: str) -> torch.Tensor:
    return model.run_with_cache(tokens, names_filter=[name])[1][name].clone()


def with_features(sae: Any, indices: list[int], wanted: torch.Tensor, tokens: torch.Tensor):
    """A hook function that gives some features the wanted activations, whatever they are now."""
    keep = (tokens >= FIRST_WORD_ID)[..., None]

    def change(y: torch.Tensor) -> torch.Tensor:
        flat = flatten_heads(y)
        delta = (wanted - features(sae, flat))[..., indices] @ sae.W_dec[indices]
        return restore_heads(torch.where(keep, flat + delta, flat), y)

    return change
