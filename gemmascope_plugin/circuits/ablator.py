"""The metric under any choice of a graph's units: edges are removed, or nodes replaced.

Nodes of a circuit of features (``feature_circuits``) replace whole sites, errors among them; those of
other graphs replace what they name and leave everything else alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Float

from gemmascope_plugin.causes.bound_task import MIN_GAP, BoundTask
from gemmascope_plugin.causes.memory import Limit
from gemmascope_plugin.causes.nodes import patchable
from gemmascope_plugin.causes.replace import Replacement
from gemmascope_plugin.circuits.edge_ablation import EdgeAblation
from gemmascope_plugin.circuits.feature_ablation import Errors, feature_metric
from gemmascope_plugin.circuits.feature_graphs import (
    check_prompts,
    is_feature_graph,
    layout_of_graph,
)
from gemmascope_plugin.circuits.node_ablation import node_metric
from gemmascope_plugin.errors import TaskError, UnknownNameError
from gemmascope_plugin.graphs.edge_positions import places_in
from gemmascope_plugin.graphs.graph import Graph
from gemmascope_plugin.models.finite import check_finite
from gemmascope_plugin.models.protocol import HookedModel

Ablator = Callable[
    [BoundTask, Bool[torch.Tensor, "circuit unit"], Bool[torch.Tensor, " circuit"]],
    Float[torch.Tensor, "circuit prompt"],
]
"""A task and circuits, True where a unit is kept, and whether a circuit keeps what is in no unit of a
graph of features (elsewhere that is always kept), to the metric of every prompt."""


@contextmanager
def ablator(
    graph: Graph,
    model: HookedModel,
    saes: Any = None,
    *,
    replacement: Replacement = "other",
    errors: Errors = "as-circuit",
    limit: Limit,
    progress: bool = False,
) -> Iterator[Ablator]:
    """What runs circuits of a graph; dictionaries are spliced in as long as the block lasts.

    Args:
        graph: Its units.
        model: The model.
        saes: The dictionaries that features among the nodes belong to.
        replacement: What stands in for what a circuit does not keep.
        errors: Which reconstruction errors are kept, of circuits of features.
        limit: How large a pass may be.
        progress: Show a progress bar.

    Raises:
        UnknownNameError: The graph has features and no dictionaries were given, or edges that the model
            does not have.
    """
    if graph.ranks_edges:
        yield _of_edges(graph, model, replacement, limit, progress)
        return
    if is_feature_graph(graph):
        yield _of_features(graph, model, saes, replacement, errors, limit, progress)
        return
    features = any(node.kind == "feature" for node in graph.components)
    if features and saes is None:
        raise UnknownNameError(
            "The circuit has features", fix="evaluate(..., saes=[the same dictionaries])"
        )

    def run(runner: Any) -> Ablator:
        def of_nodes(bound: BoundTask, kept: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
            return node_metric(
                runner,
                bound,
                graph.components,
                kept,
                replacement=replacement,
                max_rows=limit.max_rows,
            )

        return torch.no_grad()(of_nodes)

    with patchable(model, "feature", saes) if features else nullcontext(model) as runner:
        yield run(runner)


def _of_edges(
    graph: Graph,
    model: HookedModel,
    replacement: Replacement,
    limit: Limit,
    progress: bool,
) -> Ablator:
    def of_edges(bound: BoundTask, kept: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
        ablation = EdgeAblation(model, bound, replacement, limit)
        rows, columns = places_in(graph, ablation.edges)
        masks = torch.zeros(len(kept), *ablation.edges.mask.shape, dtype=torch.bool)
        masks[:, rows, columns] = kept
        return ablation.metric(masks, progress)

    return of_edges


def _of_features(
    graph: Graph,
    model: HookedModel,
    saes: Any,
    replacement: Replacement,
    errors: Errors,
    limit: Limit,
    progress: bool,
) -> Ablator:
    layout = layout_of_graph(graph, model, saes)

    def of_features(bound: BoundTask, kept: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
        check_prompts(graph, bound)
        return feature_metric(
            model,
            bound,
            layout,
            kept,
            rest,
            errors=errors,
            replacement=replacement,
            limit=limit,
            progress=progress,
        )

    return of_features


def metric_ends(
    values: Float[torch.Tensor, "circuit prompt"], model: HookedModel
) -> tuple[float, float]:
    """Metric with everything and with nothing kept, the last two rows, if they differ."""
    check_finite(values, "The metric by circuit and prompt", model)
    full, empty = float(values[-2].mean()), float(values[-1].mean())
    if abs(full - empty) < MIN_GAP:
        raise TaskError(
            f"The metric is {full:.6f} with everything and {empty:.6f} with nothing kept; "
            "faithfulness cannot be put on a scale between them",
            fix="other prompts, another metric, or another replacement",
        )
    return full, empty
