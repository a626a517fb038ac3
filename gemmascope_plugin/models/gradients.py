"""Gradients of a metric with respect to activations, with every parameter frozen.

1. The graph starts at the embedding: its output is detached and made a leaf.
2. Backward hooks collect the gradient at each name. ``HookedTransformer`` calls ``ln1`` three times
   per block, so gradients of one name are summed.

Cost: one forward and one backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int

from gemmascope_plugin.errors import HookNotFiredError


def leaf(activation: torch.Tensor, hook: Any) -> torch.Tensor:
    """Hook that makes an activation the start of the autograd graph."""
    return activation.detach().requires_grad_(True)


def gradients(
    model: Any,
    tokens: Int[torch.Tensor, "batch pos"],
    metric: Callable[[Float[torch.Tensor, "batch pos d_vocab"]], Float[torch.Tensor, ""]],
    names: Sequence[str],
) -> dict[str, torch.Tensor]:
    """``d metric / d activation`` for each hook name.

    Args:
        model: Model with frozen parameters, or a spliced one.
        tokens: Token ids.
        metric: Logits to a scalar.
        names: Hooks whose gradient is wanted.

    Returns:
        Name to gradient, shaped like the activation.

    Raises:
        HookNotFiredError: The metric does not depend on an activation, or its hook never fired.
    """
    collected: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[[torch.Tensor, Any], None]:
        def hook_fn(grad: torch.Tensor, hook: Any) -> None:
            collected[name] = collected.get(name, 0) + grad.detach()

        return hook_fn

    backward_hooks = [(name, keep(name)) for name in names]
    with (
        torch.enable_grad(),
        model.hooks(fwd_hooks=[("hook_embed", leaf)], bwd_hooks=backward_hooks),
    ):
        metric(model(tokens)).backward()
    missing = [name for name in names if name not in collected]
    if missing:
        raise HookNotFiredError(
            f"No gradient reached {', '.join(missing)}",
            fix="check that the metric depends on the logits and that the hooks lie before them",
        )
    return collected
