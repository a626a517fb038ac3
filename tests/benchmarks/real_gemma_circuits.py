"""Circuits of a real Gemma for ordinary tasks: how small, how faithful, how well methods agree.

For each task, on prompts of ``split="train"``; circuits are run on ``"held_out"`` ones:

1. *Nodes* (heads and MLPs, all positions) by exact patching with the corrupted prompt's activations
   (``other``) and with their mean over prompts: the smallest circuit from which on faithfulness stays at
   .9 or above, its interval over prompts, and the median and the best of 20 random circuits of that size.
2. *Edges* by EAP-IG (5 midpoints): the same.
3. *Agreement* with exact node effects (Spearman): AtP, and EAP-IG summed over readers.

Cost: about 5 minutes for each task on two cores.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

import gemmascope_plugin as gs
from gemmascope_plugin.circuits.scored_methods import graph_of
from gemmascope_plugin.circuits.select import top_n
from gemmascope_plugin.graphs.circuit import Circuit
from gemmascope_plugin.graphs.graph import Graph
from tests.benchmarks.real_gemma_intervals import Measured, over_prompts, spearman

TASKS = ("ioi", "agreement", "greater_than", "successors", "capitals", "induction")
FAITHFUL = 0.9
N_RANDOM = 20
SIZES = {
    "node": (*range(0, 31, 2), *range(35, 90, 5)),
    "edge": (0, 10, 20, 40, 60, 80, 100, 150, 200, 300, 400, 600, 1000, 2000, 3000),
}
"""Circuits that are run."""
IG_STEPS = 5


def figures(model: Any, task: Any, held_out: Any) -> Iterator[tuple[str, str]]:
    """Names and figures of one task, as they come."""
    yield "task", repr(held_out)
    exact = {}
    for replacement in ("other", "mean"):
        exact[replacement] = node_effects(model, task, gs.activation_patching, replacement)
        atp = node_effects(model, task, gs.attribution_patching, replacement)
        yield f"AtP, {replacement}", str(agreement(exact[replacement], atp))
        graph = node_graph(exact[replacement])
        yield from smallest(graph, model, held_out, replacement, f"nodes, {replacement}")
    edges = gs.edge_attribution(model, task, method="eap-ig", steps=IG_STEPS, by_prompt=True)
    assert edges.values_by_prompt is not None, "it was asked for"
    order = [edges.edges.writers.index(node) for node, _ in exact["other"]]
    truth = torch.stack([effect for _, effect in exact["other"]], 1)
    yield (
        "EAP-IG, other",
        str(over_prompts(spearman, truth, edges.values_by_prompt.sum(1)[order].T)),
    )
    yield "EAP-IG conservation", f"{edges.metadata['conservation']:+.4f}"
    yield from smallest(graph_of(edges), model, held_out, "other", "edges")


def node_effects(model: Any, task: Any, method: Any, replacement: str) -> list[tuple[Any, Any]]:
    """Node and its effects by prompt, noising, all positions at once."""
    from gemmascope_plugin.graphs import Node

    effects = []
    for component, kind, axes in (("z", "head", ("layer", "head")), ("mlp_out", "mlp", ("layer",))):
        result = method(
            model, task, component, direction="noising", axes=axes, replacement=replacement
        )
        values = result.values_by_prompt.flatten(0, -2)
        places = torch.cartesian_prod(*(torch.tensor(result.labels[axis]) for axis in axes))
        for place, value in zip(places.reshape(len(values), -1).tolist(), values, strict=True):
            effects.append((getattr(Node, kind)(*place), value))
    return effects


def node_graph(effects: list[tuple[Any, Any]]) -> Graph:
    """Nodes ranked by how far the metric falls without them."""
    nodes = tuple(node for node, _ in effects)
    return Graph.of_nodes(nodes, -torch.stack([effect.mean() for _, effect in effects]))


def agreement(exact: list[tuple[Any, Any]], other: list[tuple[Any, Any]]) -> Measured:
    """Rank correlation of two lists of effects of the same nodes."""
    truth, estimate = (torch.stack([values for _, values in each], 1) for each in (exact, other))
    return over_prompts(spearman, truth, estimate)


def smallest(
    graph: Graph, model: Any, held_out: Any, replacement: str, label: str
) -> Iterator[tuple[str, str]]:
    """The smallest faithful circuit of a ranking, on held-out prompts."""
    n = len(graph.unit_scores)
    sizes = [*(size for size in SIZES[graph.unit] if size < n), n]
    circuit = top_n(graph, n)
    options: dict[str, Any] = {"replacement": replacement}
    curve = gs.evaluate(model, circuit, held_out, sizes=sizes, n_random=0, **options)
    size = curve.smallest(FAITHFUL)
    assert size is not None, "all units together are the model"
    best: Circuit = circuit.top(size)
    scores = gs.evaluate(model, best, held_out, sizes=[], n_random=N_RANDOM, **options)
    low, high = scores.interval()
    yield f"{label}: smallest", f"{size} of {n} ({size / n:.1%})"
    yield f"{label}: faithfulness", f"{scores.faithfulness:.2f} [{low:.2f}, {high:.2f}]"
    random = torch.tensor(scores.random)
    yield (
        f"{label}: random, median / best",
        f"{float(random.median()):.2f} / {float(random.max()):.2f}",
    )
