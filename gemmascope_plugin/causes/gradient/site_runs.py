"""Both runs of a task at all sites, with slopes: what nodes and edges are scored from.

Features and error of a site write its tensor ``y`` linearly, and move together from their clean to their
corrupted values, so the way they take **is** the straight line from ``y`` to ``y'``, and
``dm/da_f = <W_f, dm/dy>`` everywhere on it. Integrated gradients of features and errors (Marks et al.,
arXiv 2403.19647) are those of the raw tensor, with no dictionary in the loop:

1. Prompts are taken in parts that fit into the memory; each part is run clean and corrupted once.
2. ``atp``: ``g = dm/dy`` on the clean run, one backward pass for all sites.
3. ``ig``: ``g = (1/n) sum_k dm/dy`` at ``y + alpha_k (y' - y)``, midpoints ``alpha_k = (k + 1/2)/n``, one
   site at a time and everything downstream recomputed. A pass starts behind the site: at the next
   layer with the points as its stream, where the site is the stream or the MLP, the last that is added
   to it; else at the site's layer. Steps ride on the batch axis.
4. Effect of a feature: ``(a - a') <W_f, g>``, positive where it supports the metric; of the error:
   ``<e - e', g>``. Together ``<y - y', g>``, which tends to ``m(y) - m(y')`` as ``n`` grows; the
   difference is the residual.

An entry that is active in the corrupted run only has ``a = 0`` and slope ``<W_f, g>`` as any other: the
feature is a leaf that writes, whatever the encoder would make of the stream.

Cost: ``atp`` a forward and a backward pass; ``ig`` ``n`` of both per site, of the layers behind it only,
and one forward pass per site for the residual. ``3 * width`` numbers per site and token are kept until
the circuit is complete.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float

from gemmascope_plugin.causes.bound_task import BoundTask
from gemmascope_plugin.causes.gradient.slopes import differentiable, ignore_bridge_norm_warning
from gemmascope_plugin.causes.gradient.task_site import (
    TaskSite,
    Values,
    check_restartable,
    kept_tokens,
    read_sites,
)
from gemmascope_plugin.causes.memory import (
    HEADS,
    MLP,
    SCORES,
    STREAM,
    Footprint,
    Limit,
    logits_held,
)
from gemmascope_plugin.causes.method import Method, table_of
from gemmascope_plugin.models import flatten_heads
from gemmascope_plugin.models.gradients import frozen, gradients_of
from gemmascope_plugin.models.module_replay import Restart
from gemmascope_plugin.models.points import can_restart, n_heads, n_layers
from gemmascope_plugin.models.protocol import HookedModel, wide
from gemmascope_plugin.models.record import put

if TYPE_CHECKING:
    from tqdm.auto import tqdm


@dataclass(frozen=True, eq=False)
class SiteRun:
    """One site in both runs of some prompts."""

    site: TaskSite
    clean: Values
    corrupt: Values
    slope: Float[torch.Tensor, "prompt pos width"]
    """``dm/dy``, heads flattened, zero at padding."""
    keep: Bool[torch.Tensor, "prompt pos"]
    """False at padding and where the dictionary leaves tokens alone."""
    whole: Float[torch.Tensor, " prompt"] | None = None
    """``m(clean) - m(y')``, where it was measured."""

    @property
    def moved(self) -> Float[torch.Tensor, "prompt pos width"]:
        """``y - y'``."""
        return self.clean.flat - self.corrupt.flat

    @property
    def error_moved(self) -> Float[torch.Tensor, "prompt pos width"]:
        """``e - e'``."""
        return self.clean.error(self.site) - self.corrupt.error(self.site)


@dataclass(frozen=True, eq=False)
class PartRun:
    """All sites in both runs of some prompts."""

    bound: BoundTask
    end: Restart
    """The clean run's streams and what its blocks were given."""
    sites: tuple[SiteRun, ...]
    metric_clean: Float[torch.Tensor, " prompt"]
    metric_corrupt: Float[torch.Tensor, " prompt"]


def run_sites(
    model: HookedModel,
    bound: BoundTask,
    sites: Sequence[TaskSite],
    *,
    method: SiteMethod,
    limit: Limit,
    progress: bool = False,
) -> list[PartRun]:
    """Runs a task and takes slopes at all sites."""
    from tqdm.auto import tqdm

    check_restartable(model, can_restart(model))
    rows = limit.rows(site_footprint(model, bound, sites))
    parts = list(bound.parts(min(rows, len(bound))))
    with (
        ignore_bridge_norm_warning(),
        frozen_model(model),
        tqdm(total=len(parts) * len(sites), desc="sites", disable=not progress) as bar,
    ):
        return [_run_part(model, part, sites, method, rows, bar) for part in parts]


def _run_part(
    model: HookedModel,
    bound: BoundTask,
    sites: Sequence[TaskSite],
    method: SiteMethod,
    rows: int,
    bar: tqdm,
) -> PartRun:
    clean, corrupt = (
        read_sites(model, sites, tokens, bound.mask) for tokens in (bound.clean, bound.corrupt)
    )
    # the streams from which edges start are among these
    end = Restart(model, bound.clean, range(n_layers(model) + 1))
    with torch.no_grad():
        ends = [bound.measure(model, tokens) for tokens in (bound.clean, bound.corrupt)]
    endings = [Ending(bound, end, site) for site in sites]
    slopes = method.slopes(model, endings, (clean, corrupt), rows)
    runs = []
    for site, (slope, replaced) in zip(sites, slopes, strict=True):
        flat = wide(flatten_heads(slope)) * bound.mask[..., None]
        keep = kept_tokens(site, bound.clean, bound.mask)
        whole = None if replaced is None else ends[0] - replaced
        runs.append(SiteRun(site, clean[site.hook], corrupt[site.hook], flat, keep, whole))
        bar.update()
    return PartRun(bound, end, tuple(runs), *ends)


def site_footprint(model: HookedModel, bound: BoundTask, sites: Sequence[TaskSite]) -> Footprint:
    """Bytes of what is kept, and per row of a pass whose graph is kept for its backward pass."""
    cfg, (n_prompts, n_pos) = model.cfg, bound.clean.shape
    d, d_mlp = int(cfg.d_model), int(getattr(cfg, "d_mlp", None) or 4 * int(cfg.d_model))
    heads = n_heads(model)
    layer = n_pos * (STREAM * d + HEADS * heads * int(cfg.d_head) + MLP * d_mlp)
    layer += SCORES * n_pos * n_pos * (heads + 1)
    longest = max(n_layers(model) - min(start_of(site) for site in sites), 1)
    row = longest * layer + logits_held(model, bound)
    fixed = n_pos * (3 * sum(site.width for site in sites) + (n_layers(model) + 1) * d)
    return Footprint(4 * n_prompts * fixed, 4 * row)


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
    site: TaskSite

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


def start_of(site: TaskSite) -> int:
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
        """TaskSite by site."""
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
    return differentiable(values, bound, 'nodes="feature"').sum()
