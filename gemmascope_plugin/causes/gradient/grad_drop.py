"""GradDrop: slopes with one layer's gradient dropped at a time, so that direct and indirect effects of
opposite sign do not hide a node (Kramar et al., arXiv 2403.00745, section 3.1.2).

1. One copy of the prompts per layer ``l``; in it the gradients at the layer's ``hook_attn_out`` and
   ``hook_mlp_out`` are zero, while its residual stream passes.
2. ``c(n) = 1/(L-1) sum_l | <z'_n - z_n, dm^(l)/dz_n> |``, the absolute value per prompt, then the
   mean over prompts.  A node's own layer is left out, which is why it is ``L - 1``; nodes of the residual
   stream have none, there it is the mean over all ``L``.

Cost: one forward and one backward pass over ``layers * prompts`` rows, ``max_rows`` at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float

from gemmascope_plugin.causes.experiment import Experiment
from gemmascope_plugin.causes.gradient.slopes import FwdHooks, Products, by_patch, slopes
from gemmascope_plugin.errors import ModelError
from gemmascope_plugin.models.points import n_layers
from gemmascope_plugin.models.protocol import HookedModel

ToProducts = Callable[[dict[str, torch.Tensor]], Products]
"""Gradients by name to differences times slopes, by hook of the grid."""
_DROPPED = ("hook_attn_out", "hook_mlp_out")


def grad_drop(
    run: Experiment,
    model: HookedModel,
    names: Sequence[str],
    products: ToProducts,
    max_rows: int,
) -> Float[torch.Tensor, "patch prompt"]:
    """Mean magnitude of every patch's effect over the dropped layers.

    Args:
        run: The experiment.
        model: Its model.
        names: Hooks whose gradient is needed.
        products: Gradients by name to differences times slopes, by hook of the grid.
        max_rows: Rows in one forward pass.

    Raises:
        ModelError: The model has one layer.
    """
    n, n_prompts = n_layers(model), len(run.base)
    if n < 2:
        raise ModelError(
            "GradDrop drops one layer of several, and this model has one", fix='method="atp"'
        )
    sums = torch.zeros(len(run.grid.patches), n_prompts)
    for layers in torch.arange(n).split(max(1, max_rows // n_prompts)):
        hooks = drop_hooks(layers.tolist(), n_prompts)
        found = products(slopes(run, names, copies=len(layers), fwd_hooks=hooks))
        for name, product in found.items():
            product[layers == own_layer(name)] = 0
        sums = sums + _magnitudes(run, by_patch(run.grid, found)).sum(0)
    in_layer = [any(own_layer(hook) >= 0 for hook in patch.hooks) for patch in run.grid.patches]
    return sums / (n - torch.tensor(in_layer).int())[:, None]


def _magnitudes(
    run: Experiment, effects: Float[torch.Tensor, "copy patch row"]
) -> Float[torch.Tensor, "copy patch row"]:
    """Those of each prompt, in all of its rows."""
    return run.bound.fold(effects).abs().repeat_interleave(run.bound.metric.rows_per_prompt, -1)


def drop_hooks(layers: Sequence[int], n_prompts: int) -> FwdHooks:
    """Hooks that stop, in copy ``i`` of the prompts, the gradient into what layer ``layers[i]`` adds."""

    def stop(copy: int) -> Callable[..., torch.Tensor]:
        def hook_fn(x: torch.Tensor, hook: Any) -> torch.Tensor:
            kept = torch.ones(len(x), *[1] * (x.ndim - 1), dtype=torch.bool, device=x.device)
            kept[copy * n_prompts : (copy + 1) * n_prompts] = False
            return torch.where(kept, x, x.detach())

        return hook_fn

    return [
        (f"blocks.{layer}.{name}", stop(copy))
        for copy, layer in enumerate(layers)
        for name in _DROPPED
    ]


def own_layer(hook: str) -> int:
    """The layer that a node's effect passes through as a whole; -1 for the residual stream."""
    parts = hook.split(".")
    in_layer = parts[0] == "blocks" and not any(part.startswith("hook_resid") for part in parts)
    return int(parts[1]) if in_layer else -1
