"""Attribute, then verify: exact effects in the place of the largest estimates.

1. The nodes are ranked by the magnitude of their estimate.
2. The first ``k`` are patched exactly, batched as in :func:`gemmascope_plugin.activation_patching`.
3. The result has exact numbers there and estimates elsewhere, and says how well both agree in rank.

What an estimate may have missed outside the first ``k`` is bounded by ``false_negative_bound.py``.

Cost: ``k`` exact patches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int

from gemmascope_plugin.causes.effects import Effects, check_effects
from gemmascope_plugin.causes.exact.activation_patching import MAX_ROWS, sweep
from gemmascope_plugin.causes.experiment import Experiment, experiment
from gemmascope_plugin.causes.grid import Choice, Grid
from gemmascope_plugin.causes.memory import Limit
from gemmascope_plugin.causes.task import Task, check_task
from gemmascope_plugin.errors import TaskError
from gemmascope_plugin.models.gate import gate
from gemmascope_plugin.models.protocol import HookedModel, check_model, dtype_of
from gemmascope_plugin.splice.hooked_sae import Saes, check_saes

_CHOICES = {
    "layer": "layers",
    "head": "heads",
    "pos": "positions",
    "neuron": "neurons",
    "feature": "features",
}
"""Axis to the option that chooses coordinates along it."""


@gate(model=check_model, task=check_task, effects=check_effects, saes=check_saes)
def verify_top(
    model: HookedModel,
    task: Task,
    effects: Effects,
    k: int,
    *,
    saes: Saes = None,
    max_rows: int = MAX_ROWS,
) -> Effects:
    """Replaces the ``k`` largest estimates by exact effects.

    Args:
        model: The model.
        task: The task of the estimates.
        effects: Estimates, from :func:`gemmascope_plugin.attribution_patching`.
        k: How many nodes are patched exactly.
        saes: The dictionaries of the estimates, for features and errors.
        max_rows: Prompt copies per forward pass.

    Returns:
        Effects of the same nodes. ``metadata["n_exact"]`` is ``k``, ``"exact_at"`` has their places among
        the flattened values, ``"estimates"`` what they were estimated at, ``"rank_correlation"``
        Spearman's between both (of magnitudes for AtP*; None for a single node). Where estimates are
        magnitudes, all numbers outside ``"exact_at"`` still are.

    Raises:
        TaskError: ``k`` is not a number of nodes, or the effects are not those of this task.
    """
    top = ranking(effects, k)[:k]
    with reopened(model, task, effects, saes, max_rows) as run:
        exact = exact_effects(run, top)
    estimates = effects.values.flatten()[top.to(effects.values.device)].cpu()
    values = effects.values.flatten().clone()
    values[top.to(values.device)] = exact.mean(1).to(values)
    metadata = {
        **effects.metadata,
        "method": f"{effects.metadata['method']}, top {k} exact",
        "n_exact": k,
        "exact_at": tuple(top.tolist()),
        "estimates": tuple(estimates.tolist()),
        "rank_correlation": _agreement(estimates, exact.mean(1), effects),
    }
    return replace(
        effects,
        values=values.reshape(effects.values.shape),
        metadata=metadata,
        values_by_prompt=_with_exact(effects, top, exact),
    )


def ranking(effects: Effects, k: int) -> Int[torch.Tensor, " node"]:
    """Places among the flattened values, largest magnitude first."""
    n = effects.values.numel()
    if not 0 < k <= n:
        raise TaskError(f"k={k} nodes cannot be taken of {n}", fix=f"k from 1 to {n}")
    return effects.values.flatten().abs().cpu().argsort(descending=True, stable=True)


@contextmanager
def reopened(
    model: HookedModel, task: Task, effects: Effects, saes: Saes, max_rows: int
) -> Iterator[Experiment]:
    """The experiment that effects come from."""
    metadata = effects.metadata
    if "at" in metadata:
        raise TaskError(
            f"{effects!r} is a part of a result, its nodes are not known", fix="the whole result"
        )
    options = dict(metadata.get("options", {}))
    patched = {name: options.pop(name) for name in ("replacement", "seed") if name in options}
    options |= {_CHOICES[axis]: effects.labels[axis] for axis in effects.axes if axis in _CHOICES}
    with experiment(
        model,
        task,
        metadata["component"],
        Choice(axes=effects.axes, **options),
        direction=metadata["direction"],
        saes=saes,
        limit=Limit(max_rows),
        **patched,
    ) as run:
        same = _agree(run.metadata, metadata, dtype_of(model))
        if not same or run.grid.labels != effects.labels:
            raise TaskError(
                f"{effects!r} does not come from task {task.name!r} with these dictionaries",
                fix="the model, task and dictionaries that the effects were estimated with",
            )
        yield run


def _agree(ends: Mapping[str, Any], other: Mapping[str, Any], dtype: torch.dtype) -> bool:
    """Whether the metric at both ends is the same to half of the digits that the model computes with.

    Threads and the size of a pass change the order of sums, hence the last digits.
    """
    names = ("metric", "metric_clean", "metric_corrupt")
    if ends["metric"] != other["metric"]:
        return False
    tolerance = torch.finfo(dtype).eps ** 0.5
    return all(
        math.isclose(ends[name], other[name], rel_tol=tolerance, abs_tol=tolerance)
        for name in names[1:]
    )


def exact_effects(
    run: Experiment, places: Int[torch.Tensor, " node"]
) -> Float[torch.Tensor, "node prompt"]:
    """Exact effects of some patches of an experiment."""
    patches = tuple(run.grid.patches[place] for place in places.tolist())
    chosen = Grid(run.grid.component, ("node",), {"node": tuple(places.tolist())}, patches)
    return run.bound.fold(sweep(replace(run, grid=chosen)) - run.base_by_prompt)


def _agreement(
    estimates: Float[torch.Tensor, " node"], exact: Float[torch.Tensor, " node"], effects: Effects
) -> float | None:
    """Rank correlation of estimates and exact effects."""
    if len(exact) < 2:
        return None
    magnitudes = effects.metadata.get("magnitudes", False)
    labels = {"node": tuple(range(len(exact)))}
    first, second = (
        Effects(x, ("node",), labels) for x in (estimates, exact.abs() if magnitudes else exact)
    )
    return first.spearman(second)


def _with_exact(
    effects: Effects, top: Int[torch.Tensor, " node"], exact: Float[torch.Tensor, "node prompt"]
) -> torch.Tensor | None:
    each = effects.values_by_prompt
    if each is None:
        return None
    flat = each.flatten(0, -2).clone()
    flat[top.to(flat.device)] = exact.to(flat)
    return flat.reshape(each.shape)
