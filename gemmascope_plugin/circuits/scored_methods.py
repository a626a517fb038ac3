"""Circuits of nodes or edges that are scored each alone, by a function of ``causes``.

======================================== ================================ ================================
units and method                         score                            function
======================================== ================================ ================================
nodes, ``exact``                         the fall of the metric if the    ``activation_patching``
                                         node alone is corrupted
nodes, ``atp``, ``ig``, ``atp*``,        its estimate, from a few         ``attribution_patching``
``relp``                                 backward passes for all nodes
edges, ``exact``                         the fall if one reader gets one  ``edge_patching``
                                         writer from the other run
edges, ``eap``, ``eap-ig``,              its estimate from gradients      ``edge_attribution``
``eap-ig-activations``,
``clean-corrupted``
======================================== ================================ ================================

1. Heads, MLPs and features are scored kind by kind, at all positions at once, in the clean run.
2. Positive scores support the metric; ``atp*`` knows sizes only.

ACDC, which tries edges in turn instead of scoring each alone, is in ``acdc.py``.

Cost: that of the function, of nodes once per kind.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

from gemmascope_plugin.causes import (
    Effects,
    Task,
    activation_patching,
    attribution_patching,
    edge_attribution,
    edge_patching,
)
from gemmascope_plugin.causes.gradient.attribution_patching import METHODS as NODE_ESTIMATES
from gemmascope_plugin.causes.gradient.attribution_patching import NodeMethodName
from gemmascope_plugin.causes.gradient.edge_attribution import METHODS as EDGE_ESTIMATES
from gemmascope_plugin.causes.gradient.edge_attribution import EdgeMethodName
from gemmascope_plugin.circuits.circuit_methods import (
    SELECTING,
    CircuitMethod,
    Options,
    select_units,
)
from gemmascope_plugin.graphs.circuit import Circuit
from gemmascope_plugin.graphs.graph import Graph
from gemmascope_plugin.graphs.graph_arrays import MAGNITUDES
from gemmascope_plugin.graphs.node import Node
from gemmascope_plugin.models.protocol import HookedModel, weights_of
from gemmascope_plugin.splice.hooked_sae import Saes

_COMPONENT = {"head": "z", "mlp": "mlp_out", "feature": "feature"}
_MAGNITUDES = "atp*"
"""The method that gives sizes only, and so cannot rank by sign."""
_NODES = SELECTING | {"nodes", "saes", "units"}
_EDGES = SELECTING | {"units", "select", "replacement", "memory_budget"}
_METADATA = (
    "task",
    "metric",
    "method",
    "direction",
    "replacement",
    "writer_delta",
    "steps",
    "conservation",
    "n_prompts",
    "weights",
)
"""What a graph says of the effects that it was made of."""


@dataclass(frozen=True)
class NodeCircuits(CircuitMethod):
    """Scores nodes of some kinds, and keeps the best."""

    def find(self, model: HookedModel, task: Task, options: Options) -> Circuit:
        """By default half of the nodes."""
        scores: dict[Node, float] = {}
        estimate: dict[str, Any] = {}
        for kind in options.nodes:
            saes = options.saes if kind == "feature" else None
            effects = self.effects(model, task, _COMPONENT[kind], options, saes)
            scores |= _drops(kind, effects, self.name == _MAGNITUDES)
            if "residual_max" in effects.metadata:
                worst = max(estimate.get("residual_max", 0.0), effects.metadata["residual_max"])
                estimate = {"steps": effects.metadata["steps"], "residual_max": worst}
        details = {
            "task": task.name,
            "metric": task.question.name,
            "method": self.name,
            "kinds": options.nodes,
            "rank": options.rank,
            **estimate,
            "weights": weights_of(model),
            **({"sign": MAGNITUDES} if self.name == _MAGNITUDES else {}),
        }
        graph = Graph.of_nodes(list(scores), list(scores.values()), details)
        return select_units(graph, options, len(graph) // 2)

    def effects(
        self, model: HookedModel, task: Task, component: str, options: Options, saes: Saes
    ) -> Effects:
        """What corrupting each node does to the metric: estimated, unless the method is ``exact``."""
        if self.name == "exact":
            return activation_patching(
                model,
                task,
                component,
                direction="noising",
                per_position=False,
                saes=saes,
                memory_budget=options.memory_budget,
                progress=options.progress,
            )
        return attribution_patching(
            model,
            task,
            component,
            method=cast("NodeMethodName", self.name),
            steps=options.steps,
            direction="noising",
            per_position=False,
            saes=saes,
        )


def _drops(kind: str, effects: Effects, magnitudes: bool) -> dict[Node, float]:
    """Each node with the fall of the metric when it is corrupted, or the size of its change."""
    drops = effects.values.abs() if magnitudes else -effects.values
    if kind == "feature":
        nodes = [Node.of_feature(feature) for feature in effects.labels["feature"]]
    elif kind == "mlp":
        nodes = [Node.mlp(layer) for layer in range(len(drops))]
    else:
        n_layers, n_heads = drops.shape
        nodes = [Node.head(layer, head) for layer in range(n_layers) for head in range(n_heads)]
    return dict(zip(nodes, drops.flatten().tolist(), strict=True))


NODE_METHODS: tuple[NodeCircuits, ...] = (
    NodeCircuits(
        "exact",
        "nodes",
        _NODES | {"memory_budget"},
        "Heimersheim & Nanda, arXiv 2404.15255",
        "one row of prompts per node",
    ),
    NodeCircuits.by(NODE_ESTIMATES["atp"], "nodes", _NODES),
    NodeCircuits.by(NODE_ESTIMATES["ig"], "nodes", _NODES),
    NodeCircuits.by(NODE_ESTIMATES[_MAGNITUDES], "nodes", _NODES - {"rank"}),
    NodeCircuits.by(NODE_ESTIMATES["relp"], "nodes", _NODES),
)


@dataclass(frozen=True)
class EdgeCircuits(CircuitMethod):
    """Scores all edges, and keeps the best."""

    def find(self, model: HookedModel, task: Task, options: Options) -> Circuit:
        """By default a tenth of the edges."""
        graph = graph_of(self.effects(model, task, options))
        graph = replace(graph, metadata={**graph.metadata, "rank": options.rank})
        return select_units(graph, options, graph.n_edges // 10)

    def effects(self, model: HookedModel, task: Task, options: Options) -> Effects:
        """What patching each edge does to the metric: estimated, unless the method is ``exact``."""
        if self.name == "exact":
            return edge_patching(
                model,
                task,
                replacement=options.replacement,
                memory_budget=options.memory,
                progress=options.progress,
            )
        return edge_attribution(
            model,
            task,
            method=cast("EdgeMethodName", self.name),
            steps=options.steps,
            replacement=options.replacement,
            memory_budget=options.memory,
            progress=options.progress,
        )


def graph_of(effects: Effects) -> Graph:
    """Edges with the fall of the metric as their score, whichever run was patched."""
    sign = -1 if effects.metadata["direction"] == "noising" else 1
    details = {key: effects.metadata[key] for key in _METADATA if key in effects.metadata}
    return Graph.of_edges(effects.edges, sign * effects.values, details)


EDGE_METHODS: tuple[EdgeCircuits, ...] = (
    EdgeCircuits(
        "exact",
        "edges",
        _EDGES,
        "Goldowsky-Dill et al., arXiv 2304.05969",
        "one row of prompts per edge",
    ),
    *(EdgeCircuits.by(method, "edges", _EDGES) for method in EDGE_ESTIMATES.values()),
)
