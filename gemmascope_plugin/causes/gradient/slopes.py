"""Slopes of a task's metric at the nodes of an experiment, for several variants of its run at once.

1. A variant is a copy of all prompts on the batch axis, told apart by hooks: a step of a path, a layer
   whose gradient is dropped.
2. The metrics of all rows are summed before differentiating: rows do not meet, so the slopes of each
   prompt are its own.
3. A patch's first-order effect is the sum of difference times slope over its entries.

4. Where prompts can be run again late (``models/replay.py``), passes may begin at a hook and at a
   position: the value there is the start of the graph, and nothing runs below or before it.

Attribution patching itself (Nanda 2023; Syed et al., arXiv 2310.10348) takes the slopes of the base run.

Cost: one forward and one backward pass over ``copies * prompts`` rows, of what lies behind their start.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float

from gemmascope_plugin.causes.bound_task import BoundTask
from gemmascope_plugin.causes.components import layer_of
from gemmascope_plugin.causes.experiment import Experiment
from gemmascope_plugin.causes.grid import Grid
from gemmascope_plugin.causes.method import Method
from gemmascope_plugin.causes.metrics import KLDivergence
from gemmascope_plugin.causes.replayed import Part, starting_at
from gemmascope_plugin.causes.task import Task
from gemmascope_plugin.errors import HookNotFiredError, TaskError
from gemmascope_plugin.models.gradients import frozen, gradients_of
from gemmascope_plugin.models.protocol import wide
from gemmascope_plugin.models.record import put
from gemmascope_plugin.models.replay_points import Entry
from gemmascope_plugin.models.threads import threads_for_tokens
from gemmascope_plugin.types import Direction

Products = Mapping[str, torch.Tensor]
"""Difference times slope by hook name, ``[copy, prompt, ...]`` in the shape of the activations."""
FwdHooks = Sequence[tuple[str, Callable[..., Any]]]
EMBED = "hook_embed"


@dataclass(frozen=True)
class Estimate:
    """First-order effects of all patches of a grid."""

    by_prompt: Float[torch.Tensor, "patch prompt"]
    ig_residual: Mapping[str, Float[torch.Tensor, " prompt"]] = field(default_factory=dict)
    """By hook: the effects of all its entries, minus the change of the metric that they should sum to."""

    @classmethod
    def joined(cls, parts: Sequence[Estimate]) -> Estimate:
        """That of all prompts, from those of some at a time."""
        ig_residual = {
            name: torch.cat([part.ig_residual[name] for part in parts])
            for name in parts[0].ig_residual
        }
        return cls(torch.cat([part.by_prompt for part in parts], 1), ig_residual)


@dataclass(frozen=True)
class NodeMethod(Method):
    """How the effects of nodes are estimated from a few backward passes."""

    follows_line: ClassVar[bool] = False
    """Whether slopes are taken along a line, and not on the base run alone."""
    by_recorded_parts: ClassVar[bool] = False
    """Whether it goes by the parts that the experiment has recorded."""

    def check(self, task: Task, direction: Direction, replacement: str) -> None:
        """Refuses what would give zeros or nonsense."""
        # A divergence from the clean run is smallest there: its gradient is zero.
        at_minimum = direction == "noising" and isinstance(task.question, KLDivergence)
        if at_minimum and not self.follows_line:
            raise TaskError(
                f"The gradient of {task.question.name} is zero on the clean run, where noising takes it: "
                f"method={self.name!r} would give 0 to every node",
                fix='method="ig", direction="denoising", or metric=logit_diff(answer, wrong)',
            )

    def estimate(self, run: Experiment, max_rows: int) -> Estimate:
        """First-order effects of every patch, with at most so many rows in a pass."""
        raise NotImplementedError

    def details(self, estimate: Estimate, gap: float) -> Mapping[str, Any]:
        """What the result says of the method."""
        return {}


@dataclass(frozen=True)
class AtP(NodeMethod):
    """Attribution patching: difference times slope at the base run."""

    name = "atp"
    title = "attribution"
    paper = "Nanda 2023; Syed et al., arXiv 2310.10348"
    cost = "one forward and one backward pass"

    def estimate(self, run: Experiment, max_rows: int) -> Estimate:
        """One backward pass."""
        return at_base(run)


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
def ignore_bridge_norm_warning() -> Iterator[None]:
    """No warning that the bridge computes a norm step by step where hooks take part in it.

    That is intended, and differs from the norm as a whole by rounding.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*hook_scale/hook_normalized")
        yield


def slopes(
    run: Experiment, names: Sequence[str], *, copies: int = 1, fwd_hooks: FwdHooks = ()
) -> dict[str, Float[torch.Tensor, "copy prompt ..."]]:
    """Gradient of each row's metric at each hook, by hook name.

    ``fwd_hooks`` make the variants; rows are copy after copy.
    """
    gradients = gradients_of(run.runner, lambda: total(run, copies), names, fwd_hooks=fwd_hooks)
    return {name: grad.unflatten(0, (copies, len(run.base))) for name, grad in gradients.items()}


def total(run: Experiment, copies: int) -> Float[torch.Tensor, ""]:
    """Sum of the metric over copies of the base run."""
    tokens = run.base.repeat(copies, 1)
    return differentiable(run.bound.measure(run.runner, tokens), run.bound).sum()


def differentiable(
    values: torch.Tensor, bound: BoundTask, instead: str = "activation_patching"
) -> torch.Tensor:
    """The values of the metric, if they are part of a graph; ``instead`` needs no gradient."""
    if not values.requires_grad:
        raise TaskError(
            f"The metric {bound.metric.metric.name!r} has no gradient with respect to the logits",
            fix=f"a metric that is a differentiable function of the logits, or {instead}",
        )
    return values


def differences(run: Experiment) -> dict[str, Float[torch.Tensor, "prompt ..."]]:
    """What would be inserted minus what is there, at every hook of the grid, in float32."""
    return {name: wide(run.other[name]) - wide(run.here[name]) for name in run.grid.hooks}


def at_base(run: Experiment) -> Estimate:
    """Difference times slope at the base run, of every patch."""
    gradients = slopes(run, run.grid.hooks)
    products = {name: gradients[name] * delta for name, delta in differences(run).items()}
    return Estimate(by_patch(run.grid, products)[0])


def by_patch(grid: Grid, products: Products) -> Float[torch.Tensor, "copy patch prompt"]:
    """Sums the products over the entries of each patch."""
    copies = len(next(iter(products.values())))
    # one more dimension: an entry that a patch picks alone is a number, and sums want a dimension
    rows = {name: product.flatten(0, 1)[..., None] for name, product in products.items()}
    return grid.sums(rows).unflatten(1, (copies, -1)).transpose(0, 1).cpu()


def late_slopes(
    part: Part,
    window: slice,
    hook: str,
    start: Float[torch.Tensor, "row pos ..."],
    names: Sequence[str],
    acts: Sequence[str] = (),
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Activations at ``acts`` and gradients at ``names``, ``[row, pos, ...]``, of a late pass.

    The pass runs the positions of a window, of copies of the prompts, from ``start`` at a hook on. Only
    for prompts whose replay knows the model as functions of its weights.
    """
    points: dict[str, torch.Tensor] = {}

    def keep(name: str) -> tuple[str, Callable[..., torch.Tensor]]:
        def hook_fn(x: torch.Tensor, hook: object) -> torch.Tensor:
            # what passes this point alone: the stream goes past it too where a half layer reads it
            points[name] = x.view_as(x)
            return points[name]

        return name, hook_fn

    leaf = start.detach().requires_grad_(True)
    hooks = [keep(name) for name in dict.fromkeys([*names, *acts])]
    model = part.replay.model
    threads = threads_for_tokens(model, len(leaf) * (window.stop - window.start))
    with threads, torch.enable_grad(), frozen(model.parameters()):
        value = _late_metric(part, window, hook, leaf, hooks).sum()
        tensors = [points[name] for name in names]
        depends = value.requires_grad
        gradients = torch.autograd.grad(value, tensors, allow_unused=True) if depends else [None]
    missing = [name for name, x in zip(names, gradients, strict=False) if x is None]
    if missing:
        raise HookNotFiredError(
            f"No gradient reached {', '.join(missing)}",
            fix="check that the metric depends on the logits and that the hooks lie before them",
        )
    slopes = {name: x for name, x in zip(names, gradients, strict=True) if x is not None}
    return {name: points[name].detach() for name in acts}, slopes


def _late_metric(
    part: Part, window: slice, hook: str, leaf: torch.Tensor, hooks: FwdHooks
) -> Float[torch.Tensor, "copy part"]:
    copies = len(leaf) // len(part.index)
    if hook == EMBED:
        return part.metric(
            part.replay.run(Entry(0, copies=copies, hooks=hooks, stream=leaf), window)
        )
    layer = layer_of(hook)
    stage, spares = starting_at(layer, {hook})
    values = {hook: leaf} if spares else {}
    entry = Entry(layer, stage, copies, [(hook, put(leaf)), *hooks], values)
    return part.metric(part.replay.run(entry, window))
