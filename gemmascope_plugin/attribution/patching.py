"""Attribution patching: the first-order estimate of every patch from one backward pass.

1. Run clean and corrupted prompts and keep the activations at the nodes.
2. One backward pass through the base run gives ``dm/dz`` at every node.
3. Effect of node ``n``: ``sum (z_other - z_base) * dm/dz`` over its entries (Nanda 2023; Syed et al.,
   arXiv 2310.10348).

With dictionaries spliced in, the gradient at the features is that of the real model, however many
there are (see :class:`gemmascope_plugin.HookedSAE`).

Cost: three forward passes and one backward pass, whatever the number of nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gemmascope_plugin.models.gradients import gradients
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.patching.effects import Effects, FeatureId
from gemmascope_plugin.patching.experiment import experiment
from gemmascope_plugin.patching.nodes import Grid
from gemmascope_plugin.patching.task import Task
from gemmascope_plugin.types import Direction


def attribution_patching(
    model: HookedModel,
    task: Task,
    component: str,
    *,
    mode: Direction = "denoising",
    saes: Any = None,
    features: Sequence[FeatureId] | None = None,
    per_position: bool = True,
) -> Effects:
    """First-order estimate of :func:`gemmascope_plugin.activation_patching`, same axes and sign.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``.
        task: Clean and corrupted prompts and a metric.
        component: ``resid_pre``, ``attn_out``, ``mlp_out``, ``z`` or ``feature``.
        mode: ``denoising`` takes the gradient on the corrupted run, ``noising`` on the clean one.
        saes: Dictionaries, for ``feature``.
        features: Which features; None for all whose activation differs between the prompts.
        per_position: One patch per position, or one per layer that covers all positions
            (``resid_pre``, ``attn_out``, ``mlp_out``).

    Returns:
        Effects; ``metadata["method"]`` says that they are estimates.

    Raises:
        TaskError: Prompts that cannot be compared, or a metric that does not tell them apart.
        UnknownNameError: An unknown component, or features without dictionaries.
    """
    with experiment(
        model,
        task,
        component,
        mode=mode,
        saes=saes,
        features=features,
        per_position=per_position,
    ) as run:
        slopes = gradients(
            run.runner, run.base, lambda logits: run.bound.metric(logits).mean(), run.grid.hooks
        )
        products = {name: slopes[name] * (run.other[name] - run.here[name]) for name in slopes}
        return run.effects(_per_patch(run.grid, products), "attribution")


def _per_patch(grid: Grid, products: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sums the products over the entries of each patch; the metric is already a mean."""
    return torch.stack(
        [products[patch.hook][(slice(None), *patch.index)].sum() for patch in grid.patches]
    )
