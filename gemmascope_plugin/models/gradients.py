"""Gradients of a metric with respect to activations, with every parameter frozen.

1. The graph starts at the embedding: its output is made a leaf, unless a dictionary there has already
   started one.
2. Backward hooks collect the gradient at each name. ``HookedTransformer`` calls ``ln1`` three times
   per block, so gradients of one name are summed.

Cost: one forward and one backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from jaxtyping import Float, Int

from gemmascope_plugin.errors import HookNotFiredError
from gemmascope_plugin.models.protocol import HookedModel, Runner, wide
from gemmascope_plugin.models.record import hooking


def leaf(activation: torch.Tensor, hook: object) -> torch.Tensor:
    """Hook that makes an activation the start of the autograd graph, if it is in none yet."""
    return activation if activation.requires_grad else activation.detach().requires_grad_(True)


@contextmanager
def frozen(parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """No parameter collects a gradient inside the block; their flags are put back."""
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def gradients(
    model: Runner,
    tokens: Int[torch.Tensor, "batch pos"],
    metric: Callable[[Float[torch.Tensor, "batch pos d_vocab"]], Float[torch.Tensor, ""]],
    names: Sequence[str],
) -> dict[str, torch.Tensor]:
    """``d metric / d activation`` for each hook name.

    Args:
        model: A model, or a spliced one; its parameters collect nothing.
        tokens: Token ids.
        metric: Logits to a scalar.
        names: Hooks whose gradient is wanted.

    Returns:
        Name to gradient, shaped like the activation.

    Raises:
        HookNotFiredError: The metric does not depend on an activation, or its hook never fired.
    """
    return gradients_of(model, lambda: metric(model(tokens)), names)


def gradients_of(
    model: Runner,
    run: Callable[[], Float[torch.Tensor, ""]],
    names: Sequence[str],
    *,
    fwd_hooks: Sequence[tuple[str, Callable[..., Any]]] = (),
) -> dict[str, torch.Tensor]:
    """``d run() / d activation`` for each hook name; ``fwd_hooks`` come before the start of the graph."""
    collected: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook_fn(grad: torch.Tensor, hook: object = None) -> None:
            part = grad.detach()
            # parts of one gradient are added up in float32; one part alone is what it is
            collected[name] = wide(collected[name]) + part if name in collected else part

        return hook_fn

    def start(activation: torch.Tensor, hook: object) -> torch.Tensor:
        embedding = leaf(activation, hook)
        if "hook_embed" in names:  # a backward hook would warn that its input needs no gradient
            embedding.register_hook(keep("hook_embed"))
        return embedding

    backward_hooks = [(name, keep(name)) for name in names if name != "hook_embed"]
    with (
        torch.enable_grad(),
        frozen(cast("HookedModel", getattr(model, "model", model)).parameters()),
        hooking(model, fwd_hooks=[*fwd_hooks, ("hook_embed", start)], bwd_hooks=backward_hooks),
    ):
        value = run()
        if value.requires_grad:
            value.backward()
    missing = [name for name in names if name not in collected]
    if missing:
        raise HookNotFiredError(
            f"No gradient reached {', '.join(missing)}",
            fix="check that the metric depends on the logits and that the hooks lie before them",
        )
    return collected
