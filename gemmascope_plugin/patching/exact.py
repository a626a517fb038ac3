"""Exact activation patching: replace, recompute everything downstream, read the metric.

1. Run clean and corrupted prompts once and keep the activations at the patched hooks.
2. The base run is the corrupted one (denoising, clean values are inserted) or the clean one (noising).
3. Patches that insert what is there already have no effect. The others ride on the batch axis: one
   forward pass carries as many copies of the prompts, each with its own patch, as ``max_rows`` allows
   (Heimersheim & Nanda, arXiv 2404.15255, for the method).

Cost: ``patches / copies`` forward passes of ``copies * prompts`` rows, and two for the base runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float

from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.patching.effects import Effects, FeatureId
from gemmascope_plugin.patching.experiment import Experiment, experiment
from gemmascope_plugin.patching.nodes import Patch
from gemmascope_plugin.patching.task import Task
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
    with experiment(
        model,
        task,
        component,
        mode=mode,
        saes=saes,
        features=features,
        per_position=per_position,
    ) as run:
        return run.effects(sweep(run, max_rows, progress) - run.base_metric, "exact patching")


@torch.no_grad()
def sweep(run: Experiment, max_rows: int, progress: bool) -> Float[torch.Tensor, " patch"]:
    """Mean metric under each patch alone, on the CPU."""
    from tqdm.auto import tqdm

    # A patch that inserts what is there already has no effect; running it would only add rounding.
    live = [i for i, patch in enumerate(run.grid.patches) if run.changes(patch)]
    patches = [run.grid.patches[i] for i in live]
    n_prompts = len(run.base)
    copies = max(1, max_rows // n_prompts)
    chunks = [patches[i : i + copies] for i in range(0, len(patches), copies)]
    metric = torch.full((len(run.grid.patches),), run.base_metric)
    means = [metric[:0]]
    for chunk in tqdm(chunks, desc=f"patching {run.grid.component}", disable=not progress):
        hooks = [
            (name, _insert(name, chunk, run.other[name], n_prompts))
            for name in dict.fromkeys(patch.hook for patch in chunk)
        ]
        with run.runner.hooks(fwd_hooks=hooks):
            logits = run.runner(run.base.repeat(len(chunk), 1))
        means.append(run.bound.metric(logits).reshape(len(chunk), n_prompts).mean(1))
    metric[live] = torch.cat(means).to(metric)
    return metric


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
