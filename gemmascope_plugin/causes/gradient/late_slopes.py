"""Slopes of a part's metric in passes that begin at a hook and at a position.

1. The value at the hook, of copies of the prompts, is the start of the graph; below the hook and before
   the position nothing runs (``models/replay.py``).
2. Activations and gradients are taken at further points behind it. The metrics of all rows are summed
   before differentiating: rows do not meet, so the slopes of each prompt are its own.

Only for prompts whose replay knows the model as functions of its weights; ``slopes.py`` is for others.

Cost: a forward and a backward pass of the layers behind the hook, of the positions that run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float

from gemmascope_plugin.causes.components import layer_of
from gemmascope_plugin.causes.exact.patch_sweep import starting_at
from gemmascope_plugin.causes.replayed import Part
from gemmascope_plugin.errors import HookNotFiredError
from gemmascope_plugin.models.gradients import frozen
from gemmascope_plugin.models.threads import threads_for_tokens

Tensors = dict[str, torch.Tensor]
"""By hook name."""
_EMBED = "hook_embed"


def late_slopes(
    part: Part,
    window: slice,
    hook: str,
    start: Float[torch.Tensor, "row pos ..."],
    wanted: Sequence[str],
    kept: Sequence[str] = (),
) -> tuple[Tensors, Tensors]:
    """Activations and gradients at points of a pass.

    Args:
        part: The prompts.
        window: The positions that run.
        hook: Where the pass begins.
        start: What is there, of copies of the prompts, copy after copy.
        wanted: Points whose gradient is taken.
        kept: Points whose activation is kept.

    Returns:
        Activations at ``kept`` and gradients at ``wanted``, ``[row, pos, ...]``.

    Raises:
        HookNotFiredError: The metric does not depend on what is wanted.
    """
    seen: Tensors = {}

    def see(name: str) -> tuple[str, Callable[..., torch.Tensor]]:
        def hook_fn(x: torch.Tensor, hook: Any) -> torch.Tensor:
            # what passes this point alone: the stream goes past it too where a half layer reads it
            seen[name] = x.view_as(x)
            return seen[name]

        return name, hook_fn

    leaf = start.detach().requires_grad_(True)
    hooks = [see(name) for name in dict.fromkeys([*wanted, *kept])]
    model = part.replay.model
    threads = threads_for_tokens(model, len(leaf) * (window.stop - window.start))
    with threads, torch.enable_grad(), frozen(model.parameters()):
        value = _metric(part, window, hook, leaf, hooks).sum()
        tensors = [seen[name] for name in wanted]
        depends = value.requires_grad
        found = torch.autograd.grad(value, tensors, allow_unused=True) if depends else [None]
    missing = [name for name, x in zip(wanted, found, strict=False) if x is None]
    if missing:
        raise HookNotFiredError(
            f"No gradient reached {', '.join(missing)}",
            fix="check that the metric depends on the logits and that the hooks lie before them",
        )
    slopes = {name: x for name, x in zip(wanted, found, strict=True) if x is not None}
    return {name: seen[name].detach() for name in kept}, slopes


def _metric(
    part: Part, window: slice, hook: str, leaf: torch.Tensor, hooks: list[Any]
) -> Float[torch.Tensor, "copy part"]:
    copies = len(leaf) // len(part.index)
    if hook == _EMBED:
        return part.metric(0, window, copies=copies, hooks=hooks, stream=leaf)
    layer = layer_of(hook)
    stage, spares = starting_at(layer, {hook})

    def put(x: torch.Tensor, hook: Any) -> torch.Tensor:
        return leaf

    known = {hook: leaf} if spares else {}
    return part.metric(
        layer, window, stage=stage, copies=copies, hooks=[(hook, put), *hooks], known=known
    )
