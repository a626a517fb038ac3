"""Collects activations at hook points over many documents, special tokens left out.

1. ``models/points.py`` says what the tensor called by a name is in this model; heads are flattened.
2. The pass ends after the last layer that is read.

Cost: one partial forward pass per document batch; memory is ``tokens * width * 4`` bytes per hook.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int

from gemmascope_plugin.models import flatten_heads, special_ids, to_tokens
from gemmascope_plugin.models.check_model import check_model
from gemmascope_plugin.models.gate import gate
from gemmascope_plugin.models.points import Reading, reading
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.models.record import record
from gemmascope_plugin.models.tokens import kept_positions


@gate(model=check_model)
@torch.no_grad()
def collect_activations(
    model: HookedModel,
    tokens: Int[torch.Tensor, "document pos"],
    hooks: Sequence[str],
    *,
    exclude: Sequence[str | int] = ("bos", "eos", "pad"),
    batch: int = 128,
) -> dict[str, Float[torch.Tensor, "token width"]]:
    """Activations of every token that is not excluded, heads flattened.

    Args:
        model: Any supported model.
        tokens: Token ids.
        hooks: Hook names.
        exclude: Special tokens to leave out.
        batch: Documents per forward pass.

    Raises:
        MissingHookError: The model has no such hook.
    """
    points = model.hook_dict
    readings = [reading(model, name, points) for name in hooks]
    excluded = special_ids(model, exclude)
    parts = [
        read_activations(model, readings, chunk, kept_positions(chunk, excluded))
        for chunk in to_tokens(model, tokens).split(batch)
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in hooks}


@torch.no_grad()
def read_activations(
    model: HookedModel,
    readings: Sequence[Reading],
    tokens: Int[torch.Tensor, "row pos"],
    keep: Bool[torch.Tensor, "row pos"],
) -> dict[str, Float[torch.Tensor, "token width"]]:
    """Activations of some tokens of one forward pass.

    Args:
        model: Any supported model.
        readings: What to read.
        tokens: Token ids.
        keep: Which of them.
    """
    hooks = [one.hook for one in readings]
    cache = record(model, tokens, hooks)
    return {one.name: flatten_heads(one(cache[one.hook]))[keep] for one in readings}
