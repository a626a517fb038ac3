"""Circuits of nodes: how far the metric falls if a node alone is corrupted, measured or estimated.

* ``exact``: one pass per node, :func:`~gemmascope_plugin.activation_patching`;
* ``atp``, ``ig``, ``atp*``, ``relp``: a few backward passes for all nodes,
  :func:`~gemmascope_plugin.attribution_patching`.

1. Heads, MLPs and features are scored kind by kind, at all positions at once, in the clean run.
2. Positive scores support the metric; ``atp*`` knows sizes only.

Cost: that of the function, once per kind of node.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, cast

from gemmascope_plugin.causes import Effects, Task, activation_patching, attribution_patching
from gemmascope_plugin.causes.gradient.attribution_patching import METHODS, NodeMethodName
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

_COMPONENT = {"head": "z", "mlp": "mlp_out", "feature": "feature"}
_NODES = SELECTING | {"nodes", "saes", "units"}
_MAGNITUDES = "atp*"
"""The method that gives sizes only."""


@dataclass(frozen=True)
class NodeCircuits(CircuitMethod):
    """Scores nodes of some kinds, and keeps the best."""

    def find(self, model: HookedModel, task: Task, options: Options) -> Circuit:
        """By default half of the nodes."""
        scores: dict[Node, float] = {}
        estimate: dict[str, Any] = {}
        for kind in options.nodes:
            saes = {"saes": options.saes} if kind == "feature" else {}
            effects = self.effects(model, task, _COMPONENT[kind], options, saes)
            scores |= _drops(kind, effects, self.name == _MAGNITUDES)
            if "residual_max" in effects.metadata:
                worst = max(estimate.get("residual_max", 0.0), effects.metadata["residual_max"])
                estimate = {"steps": effects.metadata["steps"], "residual_max": worst}
        details = {
            "task": task.name,
            "metric": task.asked.name,
            "method": self.name,
            "kinds": options.nodes,
            "rank": options.rank,
            **estimate,
            "weights": weights_of(model),
            **({"sign": MAGNITUDES} if self.name == _MAGNITUDES else {}),
        }
        graph = Graph.of_nodes(list(scores), list(scores.values()), details)
        return select_units(graph, options, len(graph) // 2)

    @abstractmethod
    def effects(
        self, model: HookedModel, task: Task, component: str, options: Options, saes: dict[str, Any]
    ) -> Effects:
        """What corrupting each node of a component does to the metric."""


@dataclass(frozen=True)
class ExactNodes(NodeCircuits):
    """Every node patched in a pass of its own."""

    def effects(
        self, model: HookedModel, task: Task, component: str, options: Options, saes: dict[str, Any]
    ) -> Effects:
        """Measured."""
        return activation_patching(
            model,
            task,
            component,
            direction="noising",
            per_position=False,
            memory_budget=options.memory_budget,
            progress=options.progress,
            **saes,
        )


@dataclass(frozen=True)
class EstimatedNodes(NodeCircuits):
    """First-order estimates from a few backward passes."""

    def effects(
        self, model: HookedModel, task: Task, component: str, options: Options, saes: dict[str, Any]
    ) -> Effects:
        """Estimated."""
        return attribution_patching(
            model,
            task,
            component,
            method=cast("NodeMethodName", self.name),
            steps=options.steps,
            direction="noising",
            per_position=False,
            **saes,
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


def _estimated(name: str) -> EstimatedNodes:
    """A method of ``attribution_patching``; it can rank by sign unless it gives sizes only."""
    method = METHODS[name]
    options = _NODES | ({"steps"} & set(method.options()))
    if name == _MAGNITUDES:
        options -= {"rank"}
    return EstimatedNodes(name, "nodes", options, method.paper, method.cost)


NODE_METHODS: tuple[NodeCircuits, ...] = (
    ExactNodes(
        "exact",
        "nodes",
        _NODES | {"memory_budget"},
        "Heimersheim & Nanda, arXiv 2404.15255",
        "one row of prompts per node",
    ),
    *map(_estimated, ("atp", "ig", _MAGNITUDES, "relp")),
)
