"""Path patching by brute force: everything recomputed with plain and gated hooks, one path at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from gemmascope_plugin.causes import Task, logit_diff
from tests.causes.tasks import CLEAN, RIGHT, WRONG, metric_under
from tests.tiny_models import random_tokens

CORRUPT = CLEAN.clone()
# the last token too: what reaches the logits directly is there
CORRUPT[:, [2, 3, -1]] = random_tokens(batch_size=2, length=4, seed=6)[:, 1:]
TASK = Task(CLEAN, CORRUPT, logit_diff(RIGHT, WRONG), name="random")
N_LAYERS = 3
Sent = Mapping[str, Any]
"""Hook to the heads that take their clean value, to None for the whole tensor, or to a tensor that is
added."""
_FROZEN = {"direct": ("attn.hook_z", "hook_mlp_out"), "mlps": ("attn.hook_z",), "total": ()}


@cache
@torch.no_grad()
def both_runs(model: Any) -> tuple[Any, Any]:
    """Clean and corrupted activations by hook name."""
    clean, corrupt = (model.run_with_cache(tokens)[1] for tokens in (CLEAN, CORRUPT))
    return clean, corrupt


@cache
def base_metric(model: Any) -> float:
    """The metric of the corrupted run."""
    return metric_under(model, CORRUPT, {})


@torch.no_grad()
def difference(model: Any, sent: Sent, stream: str, paths: str = "direct") -> torch.Tensor:
    """How the stream at a hook differs when senders change and what ``paths`` excludes is frozen."""
    names = [f"blocks.{layer}.{part}" for layer in range(N_LAYERS) for part in _FROZEN[paths]]
    clean, base = both_runs(model)

    def edited(x: torch.Tensor, name: str) -> torch.Tensor:
        x = (base[name] if name in names else x).clone()
        change = sent.get(name, [])
        if isinstance(change, torch.Tensor):
            return x + change
        if change is None:
            return clean[name]
        for head in change:
            x[:, :, head] = clean[name][:, :, head]
        return x

    seen: list[torch.Tensor] = []
    hooks = [
        (name, lambda x, hook, name=name: edited(x, name))
        for name in dict.fromkeys([*names, *sent])
    ]
    with model.hooks(fwd_hooks=[*hooks, (stream, lambda x, hook: seen.append(x.clone()))]):
        model(CORRUPT)
    return seen[0] - base[stream]


@contextmanager
def gated(model: Any) -> Iterator[None]:
    """The hooks on the inputs of queries, keys, values and MLPs fire."""
    try:
        model.set_use_split_qkv_input(True)
        model.set_use_hook_mlp_in(True)
        yield
    finally:
        model.set_use_split_qkv_input(False)
        model.set_use_hook_mlp_in(False)


def delivered(model: Any, received: Mapping[str, tuple[int | None, torch.Tensor]]) -> float:
    """How the metric changes when a difference is added to what readers see.

    Args:
        model: The model.
        received: Hook of an input to the head there, None without heads, and the difference.
    """

    def add(head: int | None, d: torch.Tensor) -> Any:
        def change(x: torch.Tensor) -> torch.Tensor:
            x = x.clone()
            if head is None:
                return x + d
            x[:, :, head] += d
            return x

        return change

    with gated(model):
        changes = {name: add(*pair) for name, pair in received.items()}
        return metric_under(model, CORRUPT, changes) - base_metric(model)


def copied(model: Any, layer: int, head: int, port: str, d: torch.Tensor) -> float:
    """How it changes when one query head's copy of its group's key or value sees a difference.

    What such a head puts out depends on its own query, key and value alone, so it is read in a run in
    which the whole group sees the difference.
    """
    kv, z = head // 2, f"blocks.{layer}.attn.hook_z"
    seen: list[torch.Tensor] = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(x[:, :, head].clone())
        return x

    def whole(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[:, :, kv] += d
        return x

    with gated(model):
        metric_under(model, CORRUPT, {f"blocks.{layer}.hook_{port}_input": whole, z: look})

    def only(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[:, :, head] = seen[0]
        return x

    return metric_under(model, CORRUPT, {z: only}) - base_metric(model)
