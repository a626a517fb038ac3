"""CPR and CMD: how faithful a ranking's circuits are at all sizes, as MIB defines them and beside it.

MIB's circuit track (Mueller et al., arXiv 2504.13151): for ``k`` in ``.001, .002, .005, .01, .02, .05,
.1, .2, .5, 1`` the best ``int(k N)`` of ``N`` edges are kept and ``f(k)`` is their faithfulness;

* ``CPR = integral of f(k) dk``, from the **signed** ranking: how much of the behaviour comes back,
  which may be more than all of it;
* ``CMD = integral of |1 - f(k)| dk``, from the ranking by size: how far circuits are from the model.

Trapezoids over the nominal ``k``, from .001 on: a perfect ranking has CPR .999 and CMD 0, and half of
the weight lies between .5 and 1.  ``log_cpr`` and ``log_cmd`` are the same on a logarithmic axis,
divided by its length, with the **true** shares of edges that are left once dead ends are gone.

Cost: one row per size, ranking and prompt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

import torch

import gemmascope_plugin.figures as figures
from gemmascope_plugin.causes import Task
from gemmascope_plugin.causes.exact.activation_patching import MAX_ROWS
from gemmascope_plugin.causes.memory import Limit
from gemmascope_plugin.causes.replace import Replacement
from gemmascope_plugin.causes.task import check_task
from gemmascope_plugin.circuits.ablator import ablator, metric_ends
from gemmascope_plugin.circuits.select import top_n
from gemmascope_plugin.graphs.graph import Graph
from gemmascope_plugin.graphs.graph_arrays import Rank, check_ranking
from gemmascope_plugin.graphs.pruning import without_dead_ends
from gemmascope_plugin.models.gate import gate
from gemmascope_plugin.models.protocol import HookedModel, check_model
from gemmascope_plugin.splice.hooked_sae import Saes, check_saes

if TYPE_CHECKING:
    from pandas import DataFrame

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""``k`` of MIB."""
_BOTH: tuple[Rank, ...] = ("positive", "absolute")
"""Rankings of MIB, the one of CPR first."""


@dataclass(frozen=True)
class Curve:
    """Faithfulness by size of one ranking."""

    sizes: tuple[int, ...]
    """Edges (or nodes) that were kept."""
    true_sizes: tuple[int, ...]
    """Those that are left once dead ends are gone."""
    faithfulness: tuple[float, ...]
    n_units: int

    def area(self, *, distance: bool) -> float:
        """MIB's integral of ``f``, or of ``|1 - f|``."""
        return trapezoid(SHARES, self._heights(distance))

    def log_area(self, *, distance: bool) -> float:
        """The same over the logarithm of the true shares, divided by its length; NaN for one point."""
        heights = {
            math.log(size / self.n_units): height
            for size, height in zip(self.true_sizes, self._heights(distance), strict=True)
            if size
        }
        x = sorted(heights)
        length = x[-1] - x[0] if x else 0.0
        return trapezoid(x, [heights[log] for log in x]) / length if length else math.nan

    def _heights(self, distance: bool) -> list[float]:
        return [abs(1 - f) if distance else f for f in self.faithfulness]


@dataclass(frozen=True)
class MibScores:
    """CPR and CMD of a graph's rankings."""

    signed: Curve
    """Of the units with the largest scores."""
    by_size: Curve
    """Of the units with the largest absolute scores."""
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def cpr(self) -> float:
        """Integrated circuit performance ratio; unbounded above, look at ``cmd`` beside it."""
        return self.signed.area(distance=False)

    @property
    def cmd(self) -> float:
        """Integrated circuit-model distance; 0 is perfect."""
        return self.by_size.area(distance=True)

    @property
    def log_cpr(self) -> float:
        """``cpr`` on a logarithmic axis of true shares."""
        return self.signed.log_area(distance=False)

    @property
    def log_cmd(self) -> float:
        """``cmd`` on a logarithmic axis of true shares."""
        return self.by_size.log_area(distance=True)

    def to_frame(self) -> DataFrame:
        """A DataFrame, one row per nominal share."""
        import pandas as pd

        return pd.DataFrame(
            {
                "share": SHARES,
                "units": self.by_size.sizes,
                "units_left": self.by_size.true_sizes,
                "faithfulness": self.by_size.faithfulness,
                "faithfulness_signed": self.signed.faithfulness,
            }
        )

    def plot(self) -> Any:
        """A plotly figure: faithfulness by nominal share."""
        return figures.curves(
            [math.log10(share) for share in SHARES],
            {
                "by size": list(self.by_size.faithfulness),
                "signed": list(self.signed.faithfulness),
            },
            title=f"CPR {self.cpr:.3f}, CMD {self.cmd:.3f}",
            x_title="log10 of the share kept",
            y_title="faithfulness",
            hline=1.0,
        )

    def __repr__(self) -> str:
        return (
            f"MibScores({self.metadata.get('task')}, CPR {self.cpr:.3f}, CMD {self.cmd:.3f}, on a "
            f"logarithmic axis {self.log_cpr:.3f} and {self.log_cmd:.3f}, {self.by_size.n_units} units)"
        )

    def _repr_html_(self) -> str:
        return f"<p>{escape(repr(self))}</p>{figures.frame_html(self.to_frame())}"


@gate(model=check_model, graph=check_ranking, task=check_task, saes=check_saes)
def evaluate_ranking(
    model: HookedModel,
    graph: Graph,
    task: Task,
    *,
    saes: Saes = None,
    replacement: Replacement = "other",
    max_rows: int = MAX_ROWS,
    memory_budget: int | str = "2 GB",
    progress: bool = False,
) -> MibScores:
    """CPR and CMD of a graph's ranking, exactly as MIB defines them, and on a logarithmic axis.

    Args:
        model: The model.
        graph: Scored edges, or nodes.
        task: Held-out prompts.
        saes: The dictionaries that features belong to.
        replacement: What stands in for what is not kept.
        max_rows: Prompt copies per forward pass at most.
        memory_budget: Bytes, or ``"2 GB"``.
        progress: Show a progress bar.

    Raises:
        TaskError: The metric with everything replaced hardly differs from the full model's.
    """
    bound, n = task.bind(model), len(graph.unit_scores)
    masks = [top_n(graph, size, rank=rank).is_kept for rank in _BOTH for size in sizes_of(n)]
    full_mask = torch.ones_like(masks[0])
    limit = Limit(max_rows, memory_budget)
    with ablator(
        graph, model, saes, replacement=replacement, limit=limit, progress=progress
    ) as run:
        rest = torch.zeros(len(masks) + 2, dtype=torch.bool)
        rest[-2] = True
        values = run(bound, torch.stack([*masks, full_mask, ~full_mask]), rest)
    full, empty = metric_ends(values, model)
    shares = ((values.mean(1) - empty) / (full - empty)).tolist()
    if graph.ranks_edges:
        masks = [without_dead_ends(graph, mask) for mask in masks]
    true_sizes = [int(mask.sum()) for mask in masks]
    half = len(masks) // 2
    curves = [
        Curve(tuple(sizes_of(n)), tuple(true_sizes[part]), tuple(shares[part]), n)
        for part in (slice(0, half), slice(half, 2 * half))
    ]
    details = {"task": bound.name, "n_prompts": bound.n_prompts, "replacement": replacement}
    return MibScores(*curves, metadata=details)


def sizes_of(n_units: int) -> list[int]:
    """``int(k N)`` for every ``k``."""
    return [int(share * n_units) for share in SHARES]


def trapezoid(x: Sequence[float], y: Sequence[float]) -> float:
    """Area under straight lines between points."""
    pairs = list(zip(x, y, strict=True))
    return sum((b - a) * (f + g) / 2 for (a, f), (b, g) in zip(pairs, pairs[1:], strict=False))
