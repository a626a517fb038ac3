"""Collects activations at hook points over many documents, special tokens left out.

Cost: one forward pass per document batch; memory is ``tokens * width * 4`` bytes per hook.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int

from gemmascope_plugin.models import flatten_heads, hook_point, special_ids
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.models.tokens import kept_positions


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
    for name in hooks:
        hook_point(model, name)
    excluded = special_ids(model, exclude)
    found: dict[str, list[torch.Tensor]] = {name: [] for name in hooks}
    for chunk in tokens.split(batch):
        keep = kept_positions(chunk, excluded)
        _, cache = model.run_with_cache(chunk, names_filter=list(hooks))
        for name in hooks:
            found[name].append(flatten_heads(cache[name])[keep])
    return {name: torch.cat(parts) for name, parts in found.items()}
