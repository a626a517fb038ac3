"""Slopes of a task's metric at the nodes of an experiment, for several variants of its run at once.

1. A variant is a copy of all prompts on the batch axis, told apart by hooks: a step of a path, a layer
   whose gradient is dropped.
2. The metrics of all rows are summed before differentiating: rows do not meet, so the slopes of each
   prompt are its own.
3. A patch's first-order effect is the sum of difference times slope over its entries.

Cost: one forward and one backward pass over ``copies * prompts`` rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float

from gemmascope_plugin.causes.experiment import Experiment
from gemmascope_plugin.causes.nodes import Grid
from gemmascope_plugin.errors import TaskError
from gemmascope_plugin.models.gradients import gradients_of
from gemmascope_plugin.models.precision import wide

Products = Mapping[str, torch.Tensor]
"""Difference times slope by hook name, ``[copy, prompt, ...]`` in the shape of the activations."""
FwdHooks = Sequence[tuple[str, Callable[..., Any]]]


@dataclass(frozen=True)
class Estimate:
    """First-order effects of all patches of a grid."""

    by_prompt: Float[torch.Tensor, "patch prompt"]
    drift: Mapping[str, Float[torch.Tensor, " prompt"]] = field(default_factory=dict)
    """By hook: the effects of all its entries, minus the change of the metric that they should sum to."""

    @classmethod
    def joined(cls, parts: Sequence[Estimate]) -> Estimate:
        """That of all prompts, from those of some at a time."""
        drift = {name: torch.cat([part.drift[name] for part in parts]) for name in parts[0].drift}
        return cls(torch.cat([part.by_prompt for part in parts], 1), drift)


def parts_of(run: Experiment, size: int) -> Iterator[Experiment]:
    """The experiment on at most ``size`` rows at a time, those of a prompt together."""
    whole = run.bound.metric.rows_per_prompt
    size = max(whole, size - size % whole)
    for index in torch.arange(len(run.base), device=run.base.device).split(size):
        yield replace(
            run,
            bound=run.bound.part(index),
            base=run.base[index],
            here={name: x[index] for name, x in run.here.items()},
            other={name: x[index] for name, x in run.other.items()},
            base_by_prompt=run.base_by_prompt[index.cpu()],
            parts=(),
        )


@contextmanager
def norms_by_hand() -> Iterator[None]:
    """No warning that the bridge computes a norm step by step where somebody takes part in it.

    That is what is asked for, and differs from the norm as a whole by rounding.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*hook_scale/hook_normalized")
        yield


def slopes(
    run: Experiment, names: Sequence[str], *, copies: int = 1, fwd_hooks: FwdHooks = ()
) -> dict[str, Float[torch.Tensor, "copy prompt ..."]]:
    """Gradient of each row's metric at each hook, by hook name.

    Args:
        run: The experiment; its base run is differentiated.
        names: Hooks whose gradient is wanted.
        copies: Variants of the run in the batch.
        fwd_hooks: What makes the variants; rows are copy after copy.

    Raises:
        TaskError: The metric has no gradient.
        HookNotFiredError: The metric does not depend on one of the activations.
    """
    found = gradients_of(run.runner, lambda: total(run, copies), names, fwd_hooks=fwd_hooks)
    return {name: grad.unflatten(0, (copies, len(run.base))) for name, grad in found.items()}


def total(run: Experiment, copies: int, fwd_hooks: FwdHooks = ()) -> Float[torch.Tensor, ""]:
    """Sum of the metric over copies of the base run.

    Raises:
        TaskError: It has no gradient.
    """
    tokens = run.base.repeat(copies, 1)
    return differentiable(run.bound.measure(run.runner, tokens, fwd_hooks=fwd_hooks), run).sum()


def differentiable(values: torch.Tensor, run: Experiment) -> torch.Tensor:
    """The values of the metric, which are part of a graph.

    Raises:
        TaskError: They are not.
    """
    if not values.requires_grad:
        raise TaskError(
            f"The metric {run.metadata['metric']!r} has no gradient with respect to the logits",
            fix="a metric that is a differentiable function of the logits, or activation_patching",
        )
    return values


def differences(run: Experiment) -> dict[str, Float[torch.Tensor, "prompt ..."]]:
    """What would be inserted minus what is there, at every hook of the grid, in float32."""
    return {name: wide(run.other[name]) - wide(run.here[name]) for name in run.grid.hooks}


def at_base(run: Experiment) -> Estimate:
    """Difference times slope at the base run, of every patch."""
    found = slopes(run, run.grid.hooks)
    products = {name: found[name] * delta for name, delta in differences(run).items()}
    return Estimate(by_patch(run.grid, products)[0])


def by_patch(grid: Grid, products: Products) -> Float[torch.Tensor, "copy patch prompt"]:
    """Sums the products over the entries of each patch."""
    copies = len(next(iter(products.values())))
    # one more dimension: an entry that a patch picks alone is a number, and sums want a dimension
    rows = {name: product.flatten(0, 1)[..., None] for name, product in products.items()}
    return grid.sums(rows).unflatten(1, (copies, -1)).transpose(0, 1).cpu()


def put(value: torch.Tensor) -> Callable[..., torch.Tensor]:
    """Hook that gives an activation this value, whatever it is."""

    def hook_fn(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        return value

    return hook_fn
