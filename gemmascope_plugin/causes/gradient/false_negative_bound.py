"""What attribution may have missed: a bound on the effect of every node outside the top ``k``.

Kramar et al., arXiv 2403.00745, section 3.3, with subset sampling:

1. Random subsets of the other nodes, each with probability 1/2, are patched as a whole, exactly.
2. A node's effect is estimated by the mean over subsets with it minus the mean over those without.
3. Welch's one-sided t-test: ``|difference| + t * standard error`` bounds the effect of a node, the
   largest of these bounds that of all.

The effect that is bounded is the mean over prompts, with about half of the other nodes patched beside it.

Cost: ``n_subsets`` forward passes over the prompts, batched, whatever the number of nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from jaxtyping import Bool, Float, Int

from gemmascope_plugin.causes.effects import Effects, check_effects
from gemmascope_plugin.causes.exact.activation_patching import MAX_ROWS
from gemmascope_plugin.causes.experiment import Experiment
from gemmascope_plugin.causes.gradient.slopes import ignore_bridge_norm_warning, parts_of
from gemmascope_plugin.causes.gradient.verify_top import ranking, reopened
from gemmascope_plugin.causes.grid import At
from gemmascope_plugin.causes.task import Task, check_task
from gemmascope_plugin.errors import EmptySelectionError, TaskError
from gemmascope_plugin.models.gate import gate
from gemmascope_plugin.models.protocol import HookedModel, check_model
from gemmascope_plugin.models.record import write
from gemmascope_plugin.splice.hooked_sae import Saes, check_saes


@dataclass(frozen=True)
class FalseNegativeBound:
    """How large an effect outside the top ``k`` can be."""

    bound: float
    """With ``confidence``, no other node has a larger effect, in units of the metric."""
    confidence: float
    k: int
    n_nodes: int
    """Nodes outside the top ``k`` that a patch changes at all."""
    n_subsets: int
    gap: float
    """``metric(clean) - metric(corrupt)``."""

    @property
    def share(self) -> float:
        """The bound as a share of the gap."""
        return self.bound / abs(self.gap)

    def __repr__(self) -> str:
        return (
            f"FalseNegativeBound(below {self.bound:.4g}, {self.share:.1%} of the gap, with "
            f"{self.confidence:.0%} confidence, for {self.n_nodes} nodes outside the top {self.k}; "
            f"{self.n_subsets} random subsets)"
        )


@gate(model=check_model, task=check_task, effects=check_effects, saes=check_saes)
def false_negative_bound(
    model: HookedModel,
    task: Task,
    effects: Effects,
    k: int,
    *,
    n_subsets: int = 200,
    confidence: float = 0.95,
    saes: Saes = None,
    seed: int = 0,
    max_rows: int = MAX_ROWS,
) -> FalseNegativeBound:
    """Bounds the effects of the nodes outside the top ``k``.

    Args:
        model: The model.
        task: The task of the effects.
        effects: Effects that rank the nodes, estimated or verified.
        k: How many of the largest are not asked about.
        n_subsets: Random subsets; the bound shrinks with their square root.
        confidence: Of the bound, between 0.5 and 1.
        saes: The dictionaries of the effects, for features and errors.
        seed: Of the subsets.
        max_rows: Prompt copies per forward pass.

    Raises:
        TaskError: A number out of range, or effects of another task.
        EmptySelectionError: Nothing outside the top ``k`` changes when it is patched.
    """
    if n_subsets < 10 or not 0.5 < confidence < 1:
        raise TaskError(
            f"n_subsets={n_subsets} at confidence={confidence} give no bound",
            fix="n_subsets=200, confidence=0.95",
        )
    others = ranking(effects, k)[k:]
    with ignore_bridge_norm_warning(), reopened(model, task, effects, saes, max_rows) as run:
        live = [i for i in others.tolist() if run.changes(run.grid.patches[i])]
        if not live:
            raise EmptySelectionError(f"No node outside the top {k} changes when it is patched")
        generator = torch.Generator().manual_seed(seed)
        inside = torch.rand(n_subsets, len(live), generator=generator) < 0.5
        values = subset_effects(run, torch.tensor(live), inside)
    bound = float(upper_bounds(inside, values, confidence).max())
    return FalseNegativeBound(bound, confidence, k, len(live), n_subsets, effects.gap)


@torch.no_grad()
def subset_effects(
    run: Experiment,
    places: Int[torch.Tensor, " node"],
    inside: Bool[torch.Tensor, "subset node"],
) -> Float[torch.Tensor, " subset"]:
    """Mean change of the metric with all nodes of a subset patched.

    The columns of ``inside`` stand for the patches at ``places``.
    """
    chosen = torch.zeros(len(inside), len(run.grid.patches) + 1, dtype=torch.bool)
    chosen[:, places] = inside
    owners = {name: _owners(run, name) for name in run.grid.hooks}
    effects = []
    for prompts in parts_of(run, run.rows):
        values = []
        for sets in chosen.split(max(1, run.rows // len(prompts.base))):
            hooks = [
                (name, _insert(sets[:, at], prompts.other[name])) for name, at in owners.items()
            ]
            tokens = prompts.base.repeat(len(sets), 1)
            rows = prompts.bound.measure(run.runner, tokens, fwd_hooks=hooks)
            values.append(rows.reshape(len(sets), -1).cpu())
        effects.append(torch.cat(values) - prompts.base_by_prompt)
    return torch.cat(effects, 1).mean(1)


def upper_bounds(
    inside: Bool[torch.Tensor, "subset node"],
    values: Float[torch.Tensor, " subset"],
    confidence: float,
) -> Float[torch.Tensor, " node"]:
    """The largest effect of each node that Welch's one-sided test does not reject."""
    means, errors, degrees = [], [], []
    for group in (inside.double(), (~inside).double()):
        n = group.sum(0)
        mean = (group * values.double()[:, None]).sum(0) / n
        spread = (group * (values.double()[:, None] - mean).square()).sum(0) / (n - 1)
        means.append(mean)
        errors.append(spread / n)
        degrees.append(n - 1)
    error = errors[0] + errors[1]
    freedom = error.square() / sum(e.square() / d for e, d in zip(errors, degrees, strict=True))
    bounds = (means[0] - means[1]).abs() + _t_quantile(confidence, freedom) * error.sqrt()
    # no spread, no freedom: the difference itself; a node that is in every subset or in none: no bound
    bounds = torch.where(error == 0, (means[0] - means[1]).abs(), bounds)
    return torch.nan_to_num(bounds, nan=torch.inf, posinf=torch.inf)


def _t_quantile(
    probability: float, freedom: Float[torch.Tensor, " node"]
) -> Float[torch.Tensor, " node"]:
    """Quantile of Student's t, by its expansion around the normal one (error < 1e-3 from 5 on)."""
    z = NormalDist().inv_cdf(probability)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def _owners(run: Experiment, name: str) -> Int[torch.Tensor, "*dims"]:
    """The patch that each entry of an activation belongs to; the last number stands for none."""
    patches = run.grid.patches
    shape = run.here[name].shape[1 : 1 + len(patches[0].index)]
    owner = torch.full(shape, len(patches))
    for i, patch in enumerate(patches):
        if name in patch.hooks:
            owner[_open_mesh(patch.index, shape)] = i
    return owner


def _open_mesh(index: tuple[At, ...], shape: torch.Size) -> tuple[torch.Tensor, ...]:
    """An index that picks the product of what is named along each dimension."""
    chosen = []
    for at, size in zip(index, shape, strict=True):
        numbers = torch.arange(size)
        chosen.append(numbers[list(at) if isinstance(at, tuple) else at].reshape(-1))
    return tuple(torch.meshgrid(*chosen, indexing="ij"))


def _insert(chosen: Bool[torch.Tensor, "subset ..."], other: torch.Tensor) -> Callable[..., Any]:
    """Hook that gives copy ``j`` of the prompts the entries that are chosen in it."""

    def replace(activation: torch.Tensor) -> torch.Tensor:
        mask = chosen.to(activation.device).repeat_interleave(len(other), 0)
        mask = mask.reshape(*mask.shape, *[1] * (activation.ndim - mask.ndim))
        return torch.where(mask, other.repeat(len(chosen), *[1] * (other.ndim - 1)), activation)

    return write(replace)
