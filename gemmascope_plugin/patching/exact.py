"""Exact activation patching: replace, recompute everything downstream, read the metric.

1. Run clean and corrupted prompts once and keep the activations at the patched hooks.
2. The base run is the corrupted one (denoising, clean values are inserted) or the clean one (noising).
3. Patches ride on the batch axis: one forward pass carries as many copies of the prompts, each with
   its own patch, as the memory budget allows (Heimersheim & Nanda, arXiv 2404.15255, for the method).

Cost: ``patches / copies`` forward passes of ``copies * prompts`` rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int

from gemmascope_plugin.models import token_strings
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.patching.effects import Effects, FeatureId
from gemmascope_plugin.patching.nodes import (
    Grid,
    Patch,
    active_features,
    check_component,
    component_grid,
    feature_grid,
    patchable,
    read,
)
from gemmascope_plugin.patching.task import BoundTask, Task
from gemmascope_plugin.types import Direction

MAX_ROWS = 512
"""Prompt copies in one forward pass by default."""


def activation_patching(
    model: HookedModel,
    task: Task,
    component: str,
    *,
    mode: Direction = "denoising",
    saes: Any = None,
    features: Sequence[FeatureId] | None = None,
    per_position: bool = True,
    max_rows: int = MAX_ROWS,
    progress: bool = False,
) -> Effects:
    """The exact effect on the metric of patching each node alone.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``.
        task: Clean and corrupted prompts and a metric.
        component: ``resid_pre``, ``attn_out``, ``mlp_out`` (layer by position), ``z`` (layer by head,
            all positions) or ``feature`` (all positions, reconstruction error kept).
        mode: ``denoising`` puts clean values into the corrupted run, ``noising`` the reverse.
        saes: Dictionaries, for ``feature``.
        features: Which features; None for all whose activation differs between the prompts.
        per_position: One patch per position, or one per layer that covers all positions
            (``resid_pre``, ``attn_out``, ``mlp_out``).
        max_rows: Prompt copies per forward pass.
        progress: Show a progress bar.

    Returns:
        Effects with ``values[axes] = metric(patched) - metric(base)``, averaged over prompts.

    Raises:
        TaskError: Prompts that cannot be compared, or a metric that does not tell them apart.
        UnknownNameError: An unknown component or mode, or features without dictionaries.
    """
    check_component(component)
    bound = task.bind(model)
    with patchable(model, component, saes) as runner:
        grid = make_grid(model, runner, component, bound, features, per_position)
        base, other, ends = both_runs(runner, bound, grid, mode)
        values = sweep(runner, bound, grid, base, other, max_rows, progress)
        base_metric = ends["metric_corrupt" if mode == "denoising" else "metric_clean"]
    shape = [len(grid.labels[axis]) for axis in grid.axes]
    meta = {"method": "exact patching", "mode": mode, **describe(model, runner, bound, component), **ends}
    return Effects((values - base_metric).reshape(shape), grid.axes, grid.labels, meta)


def make_grid(
    model: HookedModel,
    runner: Any,
    component: str,
    bound: BoundTask,
    features: Sequence[FeatureId] | None,
    per_position: bool,
) -> Grid:
    """The interventions of a component for these prompts."""
    if component != "feature":
        n_pos = bound.clean.shape[1]
        return component_grid(model, component, n_pos, per_position=per_position)
    if features is None:
        features = active_features(runner, bound.clean, bound.corrupt)
    return feature_grid(features)


def both_runs(
    runner: Any, bound: BoundTask, grid: Grid, mode: Direction
) -> tuple[Int[torch.Tensor, "prompt pos"], dict[str, torch.Tensor], dict[str, float]]:
    """Tokens of the base run, activations to insert, and the metric at both ends."""
    clean_logits, clean = read(runner, bound.clean, grid.hooks)
    corrupt_logits, corrupt = read(runner, bound.corrupt, grid.hooks)
    ends = bound.metric_values(
        float(bound.metric(clean_logits).mean()), float(bound.metric(corrupt_logits).mean())
    )
    return (bound.corrupt, clean, ends) if mode == "denoising" else (bound.clean, corrupt, ends)


def describe(model: HookedModel, runner: Any, bound: BoundTask, component: str) -> dict[str, Any]:
    """Metadata that every result carries."""
    spliced = component == "feature"
    return {
        "component": component,
        "task": bound.name,
        "metric": bound.metric.metric.name,
        "logits": "after the final soft-cap",
        "sign": "positive = patching raises the metric",
        "n_prompts": len(bound.clean),
        "tokens": token_strings(model, bound.clean[0]),
        "exclude": runner.saes[0].exclude if spliced else (),
        "error": "keep" if spliced else None,
    }


@torch.no_grad()
def sweep(
    runner: Any,
    bound: BoundTask,
    grid: Grid,
    base: Int[torch.Tensor, "prompt pos"],
    other: dict[str, torch.Tensor],
    max_rows: int,
    progress: bool,
) -> Float[torch.Tensor, " patch"]:
    """Mean metric under each patch alone."""
    from tqdm.auto import tqdm

    copies = max(1, max_rows // len(base))
    chunks = [grid.patches[i : i + copies] for i in range(0, len(grid.patches), copies)]
    means = []
    for chunk in tqdm(chunks, desc=f"patching {grid.component}", disable=not progress):
        hooks = [
            (name, _insert(name, chunk, other[name], len(base)))
            for name in dict.fromkeys(patch.hook for patch in chunk)
        ]
        with runner.hooks(fwd_hooks=hooks):
            logits = runner(base.repeat(len(chunk), 1))
        means.append(bound.metric(logits).reshape(len(chunk), len(base)).mean(1))
    return torch.cat(means)


def _insert(
    name: str, chunk: Sequence[Patch], other: torch.Tensor, n_prompts: int
) -> Callable[..., torch.Tensor]:
    """Hook that gives copy ``j`` of the prompts the patch ``chunk[j]``, if it is at this hook."""

    def hook_fn(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        patched = activation.clone()
        for j, patch in enumerate(chunk):
            if patch.hook == name:
                rows = slice(j * n_prompts, (j + 1) * n_prompts)
                patched[(rows, *patch.index)] = other[(slice(None), *patch.index)]
        return patched

    return hook_fn
