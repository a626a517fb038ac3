"""Gradients at sites: local ones, and averaged along the way from the clean to the corrupted run.

Features and error of a site write its tensor ``y`` linearly, and move together from their clean to their
corrupted values, so the way they take **is** the straight line from ``y`` to ``y'``, and
``dm/da_f = <W_f, dm/dy>`` everywhere on it. Integrated gradients of features and errors (Marks et al.,
arXiv 2403.19647) are those of the raw tensor, with no dictionary in the loop:

1. ``atp``: ``g = dm/dy`` on the clean run, one backward pass for all sites.
2. ``ig``: ``g = (1/n) sum_k dm/dy`` at ``y + alpha_k (y' - y)``, midpoints ``alpha_k = (k + 1/2)/n``, one
   site at a time and everything downstream recomputed. A pass starts behind the site: at the next
   layer with the points as its stream, where the site is the stream or the MLP, the last that is added
   to it; else at the site's layer. Steps ride on the batch axis.
3. Effect of a feature: ``(a - a') <W_f, g>``, positive where it supports the metric; of the error:
   ``<e - e', g>``. Together ``<y - y', g>``, which tends to ``m(y) - m(y')`` as ``n`` grows; the
   difference is the residual.

An entry that is active in the corrupted run only has ``a = 0`` and slope ``<W_f, g>`` as any other: the
feature is a leaf that writes, whatever the encoder would make of the stream.

Cost: ``atp`` a forward and a backward pass; ``ig`` ``n`` of both per site, of the layers behind it only,
and one forward pass per site for the residual.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float

from gemmascope_plugin.causes.gradient.site_values import Values
from gemmascope_plugin.causes.gradient.task_site import Site
from gemmascope_plugin.causes.method import Method, table_of
from gemmascope_plugin.causes.task import BoundTask
from gemmascope_plugin.errors import TaskError
from gemmascope_plugin.models.gradients import frozen, gradients_of
from gemmascope_plugin.models.module_replay import Restart
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.models.record import put

Hooks = list[tuple[str, Callable[..., Any]]]
Runs = tuple[Mapping[str, Values], Mapping[str, Values]]
"""Values of the clean and of the corrupted run, by hook."""
Slopes = Iterator[tuple[torch.Tensor, torch.Tensor | None]]


@dataclass(frozen=True)
class Ending:
    """The end of a pass from one site on."""

    bound: BoundTask
    end: Restart
    """The clean run's, with the stream before each site's start."""
    site: Site

    def measure(
        self, y: Float[torch.Tensor, "row pos ..."], clean: Float[torch.Tensor, "prompt pos ..."]
    ) -> Float[torch.Tensor, " row"]:
        """The metric with ``y`` at the site, copies of the prompts one after the other."""
        copies, start = len(y) // len(clean), start_of(self.site)
        hooks: Hooks = []
        if self.site.is_stream:
            stream = y
        elif self.site.kind == "mlp" or self.site.hook.endswith("hook_mlp_out"):
            stream = self.end.stream(start, copies) + (y - clean.repeat(copies, 1, 1))
        else:
            stream, hooks = self.end.stream(start, copies), [(self.site.hook, put(y))]
        return self.bound.measure(self.end, stream, fwd_hooks=hooks, start_at_layer=start)


def start_of(site: Site) -> int:
    """The first layer that has to run once the site's tensor is known."""
    after = site.hook.endswith(("hook_resid_post", "hook_mlp_out"))
    return site.layer + 1 if after else site.layer


@dataclass(frozen=True)
class SiteMethod(Method):
    """How slopes at sites are taken."""

    def slopes(self, model: HookedModel, ends: Sequence[Ending], runs: Runs, rows: int) -> Slopes:
        """``dm/dy`` of every prompt, and the metric with ``y'`` there if it is measured, site by site.

        ``runs`` are the values of the clean and of the corrupted run by hook.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class LocalSlopes(SiteMethod):
    """Those of the clean run, of all sites in one backward pass."""

    name = "atp"
    title = "attribution"
    paper = "Nanda 2023; Syed et al., arXiv 2310.10348"
    cost = "one forward and one backward pass"

    def slopes(self, model: HookedModel, ends: Sequence[Ending], runs: Runs, rows: int) -> Slopes:
        """One backward pass."""
        bound = ends[0].bound

        def run() -> Float[torch.Tensor, ""]:
            return _total(bound, bound.measure(model, bound.clean))

        gradients = gradients_of(model, run, [ending.site.hook for ending in ends])
        yield from ((gradients[ending.site.hook], None) for ending in ends)


@dataclass(frozen=True)
class MeanSlopes(SiteMethod):
    """Averaged over midpoints of the way from the clean to the corrupted tensor, one site at a time."""

    name = "ig"
    title = "integrated gradients"
    paper = "Marks et al., arXiv 2403.19647"
    cost = "`steps` forward and backward passes per site, of the layers behind it"

    steps: int = 10

    def slopes(self, model: HookedModel, ends: Sequence[Ending], runs: Runs, rows: int) -> Slopes:
        """Site by site."""
        for ending in ends:
            clean, corrupt = (run[ending.site.hook].y for run in runs)
            slope = mean_slopes(ending, clean, corrupt, self.steps, rows)
            with torch.no_grad():
                yield slope, ending.measure(corrupt, clean)


METHODS = table_of(MeanSlopes, LocalSlopes)
"""All methods by name."""


def mean_slopes(
    ending: Ending,
    clean: Float[torch.Tensor, "prompt pos ..."],
    corrupt: Float[torch.Tensor, "prompt pos ..."],
    steps: int,
    rows: int,
) -> Float[torch.Tensor, "prompt pos ..."]:
    """The mean of ``dm/dy`` at midpoints of the way from one tensor at a site to the other."""
    delta = corrupt - clean
    total = torch.zeros_like(delta)
    alphas = torch.arange(steps, dtype=torch.float64).add(0.5).div(steps).tolist()
    size = max(1, rows // len(clean))
    for first in range(0, steps, size):
        chunk = alphas[first : first + size]
        points = torch.cat([clean + alpha * delta for alpha in chunk]).requires_grad_(True)
        with torch.enable_grad():
            value = _total(ending.bound, ending.measure(points, clean))
            (grad,) = torch.autograd.grad(value, points)
        total += grad.unflatten(0, (len(chunk), -1)).sum(0)
    return total / steps


def frozen_model(model: HookedModel) -> Any:
    """No parameter collects a gradient inside the block."""
    return frozen(model.parameters())


def _total(bound: BoundTask, values: Float[torch.Tensor, " row"]) -> Float[torch.Tensor, ""]:
    if not values.requires_grad:
        raise TaskError(
            f"The metric {bound.metric.metric.name!r} has no gradient with respect to the logits",
            fix='a metric that is a differentiable function of the logits, or nodes="feature"',
        )
    return values.sum()
