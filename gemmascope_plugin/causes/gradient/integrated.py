"""Integrated gradients: the slope averaged along the way from the base run to the other run.

Midpoints ``alpha_k = (k + 1/2) / n``, ``k = 0 .. n - 1``; their error falls as ``1 / n^2``, that of a
left Riemann sum as ``1 / n``.

* ``ig`` (activations; Marks et al., arXiv 2403.19647): one hook at a time, ``a`` its activation in the
  base run and ``a'`` what would be inserted:

      effect = (a' - a) * (1/n) sum_k dm/da  at  a + alpha_k (a' - a),

  everything downstream recomputed.  All nodes at a hook move together.
* ``ig-inputs`` (Hanna et al., arXiv 2403.17806): only the embedding moves, ``e + alpha_k (e' - e)``; the
  slopes at every node are averaged over these runs.

**Conservation.**  The effects of all entries of one hook sum to ``m(a -> a') - m(base)`` as ``n`` grows;
with ``ig-inputs`` this holds at the embedding only.  What is missing is reported as a share of the gap
between clean and corrupted metric.

Cost: of ``ig``, per hook, ``n`` forward and backward passes and one forward pass for the residual, all of
them from that hook up, and from the first position that moves on: ``2 n + 1`` times what one exact patch
at that hook costs.  So a layer of fewer heads than that is answered exactly for less.  ``ig-inputs``
takes ``n`` forward and backward passes from the first position that differs.  Steps ride on the batch
axis.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int

from gemmascope_plugin.causes.components import layer_of
from gemmascope_plugin.causes.experiment import Experiment
from gemmascope_plugin.causes.gradient.slopes import (
    EMBED,
    Estimate,
    NodeMethod,
    by_patch,
    differences,
    differentiable,
    late_slopes,
)
from gemmascope_plugin.causes.replayed import Part, inside, position_axis, starting_at
from gemmascope_plugin.causes.task import Task
from gemmascope_plugin.errors import TaskError
from gemmascope_plugin.models.gradients import frozen, gradients_of
from gemmascope_plugin.models.points import n_layers
from gemmascope_plugin.models.protocol import model_of, wide
from gemmascope_plugin.models.record import put, record
from gemmascope_plugin.models.replay import Replay
from gemmascope_plugin.models.replay_points import Entry
from gemmascope_plugin.models.threads import threads_for_tokens
from gemmascope_plugin.types import Direction

STEPS = 10
"""Midpoints by default."""


def checked_share(share: float) -> float:
    """The share of the whole change that is missing, which is finite: else no number can be trusted."""
    if not math.isfinite(share):
        raise TaskError(
            f"Integrated gradients miss {share} of the change of the metric, which is not finite",
            fix="a metric that is finite on all prompts, and tells clean from corrupted ones",
        )
    return share


@dataclass(frozen=True)
class IntegratedGradients(NodeMethod):
    """``ig``: each hook's activation is moved, one hook at a time."""

    name = "ig"
    title = "integrated gradients"
    paper = "Marks et al., arXiv 2403.19647"
    cost = "per hook, `steps` forward and backward passes from it on, and a forward pass"
    follows_line = True
    by_recorded_parts = True

    steps: int = STEPS

    def estimate(self, run: Experiment, max_rows: int) -> Estimate:
        """The slope averaged along the way of each hook."""
        return integrated_activations(run, self.steps, max_rows)

    def details(self, estimate: Estimate, gap: float) -> Mapping[str, Any]:
        """Steps, and how far the effects of each hook are from their sum."""
        residual = {name: float(x.mean()) / gap for name, x in estimate.ig_residual.items()}
        return {
            "steps": self.steps,
            "residual": residual,
            "residual_max": checked_share(max(abs(share) for share in residual.values())),
        }


@dataclass(frozen=True)
class IntegratedInputs(IntegratedGradients):
    """``ig-inputs``: the embedding is moved, and nothing else is held."""

    name = "ig-inputs"
    title = "integrated gradients of inputs"
    paper = "Hanna et al., arXiv 2403.17806"
    cost = "`steps` forward and backward passes"

    def check(self, task: Task, direction: Direction, replacement: str) -> None:
        """Refuses another end of the way than the other prompt."""
        if replacement != "other":
            raise TaskError(
                f"ig-inputs moves the embedding towards the other prompt, and "
                f"replacement={replacement!r} is something else",
                fix='method="ig", or replacement="other"',
            )

    def estimate(self, run: Experiment, max_rows: int) -> Estimate:
        """The slope averaged along the way of the embedding."""
        return integrated_inputs(run, self.steps, max_rows)


def integrated_activations(run: Experiment, steps: int, max_rows: int) -> Estimate:
    """Effects by integrated gradients of activations."""
    moved = differences(run)
    products = {name: torch.zeros_like(delta) for name, delta in moved.items()}
    residual = {name: torch.zeros(len(delta)) for name, delta in moved.items()}
    for part in run.parts:
        for name, delta in moved.items():
            line = _Line.of(run, part, name, delta)
            if line is None:
                continue
            product = line.slope(steps, max_rows) / steps * line.delta
            whole = products[name][part.index]
            products[name][part.index] = _placed(whole, name, line.window, product)
            residual[name][part.index.cpu()] = (_sums(product) - line.change()).to(residual[name])
    by_hook = {name: product[None] for name, product in products.items()}
    return Estimate(by_patch(run.grid, by_hook)[0], residual)


@dataclass(frozen=True, eq=False)
class _Line:
    """The way of one hook's activation from the base run to what is inserted, on some prompts."""

    run: Experiment
    part: Part
    name: str
    window: slice
    """From the first position that moves to the last that is asked; others have no effect."""
    here: Float[torch.Tensor, "part ..."]
    delta: Float[torch.Tensor, "part ..."]

    @classmethod
    def of(
        cls, run: Experiment, part: Part, name: str, delta: Float[torch.Tensor, "prompt ..."]
    ) -> _Line | None:
        """None where nothing moves that is asked about."""
        axis = position_axis(name)
        is_asked = part.before_asked()
        delta = delta[part.index].narrow(axis, 0, is_asked.shape[1])
        shape = [1] * delta.ndim
        shape[0], shape[axis] = is_asked.shape
        delta = delta * is_asked.reshape(shape).to(delta)
        moves = (delta != 0).movedim(axis, 0).flatten(1).any(1)
        if not bool(moves.any()):
            return None
        window = part.replay.window(int(moves.int().argmax()))
        here = inside(run.here[name][part.index], name, window)
        return cls(run, part, name, window, here, inside(delta, name, window))

    def slope(self, steps: int, max_rows: int) -> Float[torch.Tensor, "part ..."]:
        """Gradients at the midpoints, summed."""
        total = torch.zeros_like(self.delta)
        model = model_of(self.run.runner)
        for alphas in _chunks(steps, max_rows // len(self.part.index)):
            start = _way(self.here, self.delta, alphas).requires_grad_(True)
            n_tokens = len(start) * (self.window.stop - self.window.start)
            threads = threads_for_tokens(model, n_tokens)
            with threads, torch.enable_grad(), frozen(model.parameters()):
                value = differentiable(self._metric(start), self.part.bound).sum()
                (grad,) = torch.autograd.grad(value, start)
            total += grad.to(total).unflatten(0, (len(alphas), -1)).sum(0)
        return total

    @torch.no_grad()
    def change(self) -> Float[torch.Tensor, " part"]:
        """How the metric changes if everything at the hook is replaced."""
        after = self._metric((self.here + self.delta).to(self.here))[0].cpu()
        moves = (self.delta != 0).flatten(1).any(1).cpu()
        return torch.where(moves, after - self.part.base, 0.0)

    def _metric(self, points: Float[torch.Tensor, "row ..."]) -> Float[torch.Tensor, "copy part"]:
        """With these values at the hook; the graph starts there."""
        last = n_layers(self.run.model)
        layer = 0 if self.part.replay.runs_whole else min(max(layer_of(self.name), 0), last)
        stage, spares = starting_at(layer, {self.name})
        entry = Entry(
            layer,
            stage,
            copies=len(points) // len(self.part.index),
            hooks=[(self.name, put(points))],
            values={self.name: points} if spares else {},
        )
        return self.part.metric(self.part.replay.run(entry, self.window))


def integrated_inputs(run: Experiment, steps: int, max_rows: int) -> Estimate:
    """Effects by integrated gradients of the embedding."""
    parts = [_part_inputs(run, part, steps, max_rows) for part in run.parts]
    moved = differences(run)
    products = {name: torch.zeros_like(delta) for name, delta in moved.items()}
    residual = torch.zeros(len(run.base))
    for part, (window, mean, change) in zip(run.parts, parts, strict=True):
        index = part.index
        for name, delta in moved.items():
            some = inside(delta[index], name, window) * mean[name]
            products[name][index] = _placed(products[name][index], name, window, some)
        residual[index.cpu()] = (change - (part.other - part.base)).to(residual)
    by_hook = {name: product[None] for name, product in products.items()}
    return Estimate(by_patch(run.grid, by_hook)[0], {EMBED: residual})


def _part_inputs(
    run: Experiment, part: Part, steps: int, max_rows: int
) -> tuple[slice, dict[str, torch.Tensor], Float[torch.Tensor, " part"]]:
    """Mean slopes at the nodes of some prompts, in a window, and what they say of the embedding."""
    window, names = part.replay.window(part.start), list(dict.fromkeys([*run.grid.hooks, EMBED]))
    away = part.bound.runs(run.metadata["direction"])[1]
    base, other = _embeddings(run, part, away, window)
    mean: dict[str, torch.Tensor] = {}
    for alphas in _chunks(steps, max_rows // len(part.index)):
        points = _way(base, other - base, alphas)
        for name, slope in _slopes(run, part, window, points, names).items():
            by_step = slope.unflatten(0, (len(alphas), -1))
            mean[name] = mean.get(name, 0) + wide(by_step).sum(0) / steps
    return window, mean, _sums(mean[EMBED] * (wide(other) - wide(base)))


def _embeddings(
    run: Experiment, part: Part, away: Int[torch.Tensor, "part pos"], window: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of both runs."""
    replay = part.replay
    if isinstance(replay, Replay):
        return replay.pre[0][:, window], replay.arithmetic.embedded(away[:, window])
    base, other = (record(run.runner, tokens, [EMBED])[EMBED] for tokens in (replay.tokens, away))
    return base, other


def _slopes(
    run: Experiment, part: Part, window: slice, points: torch.Tensor, names: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Slopes at hooks, with these embeddings of copies of the prompts."""
    if isinstance(part.replay, Replay):
        return late_slopes(part, window, EMBED, points, names)[1]
    tokens = part.replay.tokens.repeat(len(points) // len(part.index), 1)

    def total() -> torch.Tensor:
        return differentiable(part.bound.measure(run.runner, tokens), part.bound).sum()

    return gradients_of(run.runner, total, names, fwd_hooks=[(EMBED, put(points))])


def _placed(
    whole: Float[torch.Tensor, "part ..."], name: str, window: slice, some: torch.Tensor
) -> torch.Tensor:
    """All positions of a point's tensor, with those of a window put there."""
    index = torch.arange(window.start, window.stop, device=whole.device)
    last = slice(None) if some.shape[-1] == whole.shape[-1] else slice(window.stop)
    whole[..., last].index_copy_(position_axis(name), index, some.to(whole))
    return whole


def _chunks(steps: int, size: int) -> Iterator[list[float]]:
    """Midpoints, as many at a time as fit."""
    alphas = [(k + 0.5) / steps for k in range(steps)]
    for start in range(0, steps, max(1, size)):
        yield alphas[start : start + max(1, size)]


def _way(
    here: Float[torch.Tensor, "prompt ..."],
    delta: Float[torch.Tensor, "prompt ..."],
    alphas: list[float],
) -> Float[torch.Tensor, "row ..."]:
    """Points on the way, copy after copy, in the model's own type."""
    return torch.cat([(here + alpha * delta).to(here.dtype) for alpha in alphas])


def _sums(product: Float[torch.Tensor, "prompt ..."]) -> Float[torch.Tensor, " prompt"]:
    return product.flatten(1).sum(1).cpu()
