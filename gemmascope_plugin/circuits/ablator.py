"""The metric under any choice of a graph's units: edges are removed, or nodes replaced.

What a circuit does not keep gets, at every position, what it is in the corrupted run of the same prompt,
zero, or a mean over that run. What is kept is computed anew in that context.

1. Edges: what one reader sees of one writer is replaced (``edge_ablation.py``).
2. Nodes of a circuit of features: whole sites are taken apart, errors too (``feature_ablation.py``).
3. Nodes of other graphs: what they name, and nothing else; dictionaries are spliced in for features
   among them, and reconstruction errors are kept.

Cost: of nodes, one row per circuit and prompt, from the lowest replaced node and the first difference on;
circuits ride on the batch axis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from jaxtyping import Bool, Float

from gemmascope_plugin.causes.bound_task import MIN_GAP, BoundTask
from gemmascope_plugin.causes.components import Runner, layer_of, patchable
from gemmascope_plugin.causes.memory import Limit
from gemmascope_plugin.causes.replace import Replacement, replaced
from gemmascope_plugin.causes.replayed import Part, joined, replayed
from gemmascope_plugin.circuits.ablation_values import keep_units
from gemmascope_plugin.circuits.edge_ablation import EdgeAblation
from gemmascope_plugin.circuits.feature_ablation import Errors, feature_metric
from gemmascope_plugin.circuits.feature_nodes import (
    check_prompts,
    is_feature_graph,
    layout_of_graph,
)
from gemmascope_plugin.errors import TaskError, UnknownNameError
from gemmascope_plugin.graphs.edge_map import places_in
from gemmascope_plugin.graphs.graph import Graph
from gemmascope_plugin.graphs.node import Node
from gemmascope_plugin.models.protocol import HookedModel, check_finite
from gemmascope_plugin.models.record import write
from gemmascope_plugin.models.replay_points import Entry
from gemmascope_plugin.splice.hooked_sae import Saes

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
    saes: Saes = None,
    *,
    replacement: Replacement = "other",
    errors: Errors = "as-circuit",
    limit: Limit,
    progress: bool = False,
) -> Iterator[Ablator]:
    """What runs circuits of a graph; dictionaries are spliced in as long as the block lasts."""
    if graph.ranks_edges:

        def of_edges(bound: BoundTask, is_kept: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
            ablation = EdgeAblation(model, bound, replacement, limit)
            rows, columns = places_in(graph, ablation.edges)
            masks = torch.zeros(len(is_kept), *ablation.edges.mask.shape, dtype=torch.bool)
            masks[:, rows, columns] = is_kept
            return ablation.metric(masks, progress)

        yield of_edges
        return
    if is_feature_graph(graph):
        layout = layout_of_graph(graph, model, saes)

        def of_sites(bound: BoundTask, is_kept: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
            check_prompts(graph, bound)
            return feature_metric(
                model,
                bound,
                layout,
                is_kept,
                rest,
                errors=errors,
                replacement=replacement,
                limit=limit,
                progress=progress,
            )

        yield of_sites
        return
    has_features = any(node.kind == "feature" for node in graph.components)
    if has_features and saes is None:
        raise UnknownNameError(
            "The circuit has features", fix="evaluate(..., saes=[the same dictionaries])"
        )
    with patchable(model, "feature", saes) if has_features else nullcontext(model) as runner:

        def of_nodes(bound: BoundTask, is_kept: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
            return node_metric(
                runner,
                bound,
                graph.components,
                is_kept,
                replacement=replacement,
                max_rows=limit.max_rows,
            )

        yield of_nodes


@torch.no_grad()
def node_metric(
    runner: Runner,
    bound: BoundTask,
    nodes: Sequence[Node],
    is_kept: Bool[torch.Tensor, "circuit node"],
    *,
    replacement: Replacement = "other",
    max_rows: int,
) -> Float[torch.Tensor, "circuit prompt"]:
    """The metric of every prompt with the nodes outside each circuit replaced.

    ``runner`` is the model, or the model with dictionaries spliced in.
    """
    hooks = list(dict.fromkeys(node.hook for node in nodes))
    runs = replayed(
        runner,
        bound,
        bound.clean,
        bound.corrupt,
        rows=max(1, min(len(bound), max_rows)),
        base_points=hooks,
        other_points=hooks,
        whole=replacement != "other",
    )
    parts = tuple(runs)
    corrupt = joined(parts, hooks, *bound.clean.shape, other=True)
    other = {name: replaced(x, bound.mask, replacement) for name, x in corrupt.items()}
    values = torch.zeros(len(is_kept), len(bound))
    for part in parts:
        size, window = max(1, max_rows // len(part.index)), part.replay.window(part.start)
        of_part = {name: x[part.index][:, window] for name, x in other.items()}
        for chunk in torch.arange(len(is_kept)).split(size):
            measured = _measured(part, window, nodes, is_kept[chunk], of_part)
            values[chunk[:, None], part.index.cpu()] = measured.to(values)
    return values


def _measured(
    part: Part,
    window: slice,
    nodes: Sequence[Node],
    is_kept: Bool[torch.Tensor, "circuit node"],
    other: Mapping[str, Float[torch.Tensor, "part pos ..."]],
) -> Float[torch.Tensor, "circuit part"]:
    """One pass from the lowest node that any of the circuits does not keep."""
    is_whole = is_kept.all(0).tolist()
    removed = [node for node, stays in zip(nodes, is_whole, strict=True) if not stays]
    if not removed:
        return part.base.expand(len(is_kept), -1)
    hooks = [(name, _replace(name, nodes, is_kept, x)) for name, x in other.items()]
    layer = 0 if part.replay.runs_whole else max(0, min(layer_of(n.hook) for n in removed))
    return part.metric(part.replay.run(Entry(layer, copies=len(is_kept), hooks=hooks), window))


def _replace(
    name: str,
    nodes: Sequence[Node],
    is_kept: Bool[torch.Tensor, "circuit node"],
    other: Float[torch.Tensor, "prompt pos ..."],
) -> Callable[..., torch.Tensor]:
    """Hook that replaces the nodes at ``name`` that each copy's circuit does not keep."""
    columns = [i for i, node in enumerate(nodes) if node.hook == name]
    index = None
    if nodes[columns[0]].kind in ("head", "feature"):
        index = torch.tensor([nodes[i].index for i in columns], device=other.device)
    at_hook = is_kept[:, None, columns]
    return write(partial(keep_units, replacement=other, is_kept=at_hook, index=index))


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
