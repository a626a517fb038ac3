"""Both runs of a task at all sites, with slopes: what nodes and edges are scored from.

1. Prompts are taken in parts that fit into the memory; each part is run clean and corrupted once.
2. Slopes as in ``site_slopes.py``. What stays is, per site and prompt, two tensors, their active
   features and the slope.

Cost: see ``site_slopes.py``; ``3 * width`` numbers per site and token are kept until the circuit is
found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float

from gemmascope_plugin.causes.gradient.site_slopes import Ending, SiteMethod, frozen_model, start_of
from gemmascope_plugin.causes.gradient.site_values import Values, kept_tokens, read_sites
from gemmascope_plugin.causes.gradient.slopes import ignore_bridge_norm_warning
from gemmascope_plugin.causes.gradient.task_site import Site, check_restartable
from gemmascope_plugin.causes.memory import (
    HEADS,
    MLP,
    SCORES,
    STREAM,
    Footprint,
    Limit,
    logits_held,
)
from gemmascope_plugin.causes.task import BoundTask
from gemmascope_plugin.models import flatten_heads
from gemmascope_plugin.models.finite import wide
from gemmascope_plugin.models.module_replay import Restart
from gemmascope_plugin.models.points import can_restart, n_heads, n_layers
from gemmascope_plugin.models.protocol import HookedModel

if TYPE_CHECKING:
    from tqdm.auto import tqdm


@dataclass(frozen=True, eq=False)
class SiteRun:
    """One site in both runs of some prompts."""

    site: Site
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
    sites: Sequence[Site],
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
    sites: Sequence[Site],
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


def site_footprint(model: HookedModel, bound: BoundTask, sites: Sequence[Site]) -> Footprint:
    """Bytes of what is kept, and per row of a pass whose graph is kept for its backward pass."""
    cfg, (n_prompts, n_pos) = model.cfg, bound.clean.shape
    d, d_mlp = int(cfg.d_model), int(getattr(cfg, "d_mlp", None) or 4 * int(cfg.d_model))
    heads = n_heads(model)
    layer = n_pos * (STREAM * d + HEADS * heads * int(cfg.d_head) + MLP * d_mlp)
    layer += SCORES * n_pos * n_pos * (heads + 1)
    longest = max(n_layers(model) - min(start_of(site) for site in sites), 1)
    row = longest * layer + logits_held(model, bound)
    held = n_pos * (3 * sum(site.width for site in sites) + (n_layers(model) + 1) * d)
    return Footprint(4 * n_prompts * held, 4 * row)
