"""Circuits of edges: how far the metric falls if one reader gets one writer from the other run.

* ``exact``: every edge patched, :func:`~gemmascope_plugin.edge_patching`;
* ``eap``, ``eap-ig``, ``eap-ig-activations``, ``clean-corrupted``: estimates of that from gradients,
  :func:`~gemmascope_plugin.edge_attribution`.

ACDC, which tries edges in turn instead of scoring each alone, is in ``acdc.py``.

Cost: that of the function.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

from gemmascope_plugin.causes import Task
from gemmascope_plugin.causes.effects import Effects
from gemmascope_plugin.causes.exact.edge_patching import edge_patching
from gemmascope_plugin.causes.gradient.edge_attribution import (
    METHODS,
    EdgeMethodName,
    edge_attribution,
)
from gemmascope_plugin.circuits.circuit_methods import (
    MEMORY,
    SELECTING,
    CircuitMethod,
    Options,
    select_units,
)
from gemmascope_plugin.graphs.circuit import Circuit
from gemmascope_plugin.graphs.graph import Graph
from gemmascope_plugin.models.protocol import HookedModel

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
class EdgeCircuits(CircuitMethod):
    """Scores all edges, and keeps the best."""

    def find(self, model: HookedModel, task: Task, options: Options) -> Circuit:
        """By default a tenth of the edges."""
        graph = graph_of(self.effects(model, task, options))
        graph = replace(graph, metadata={**graph.metadata, "rank": options.rank})
        return select_units(graph, options, graph.n_edges // 10)

    def effects(self, model: HookedModel, task: Task, options: Options) -> Effects:
        """What patching each edge does to the metric: estimated, unless the method is ``exact``."""
        memory = MEMORY if options.memory_budget is None else options.memory_budget
        if self.name == "exact":
            return edge_patching(
                model,
                task,
                replacement=options.replacement,
                memory_budget=memory,
                progress=options.progress,
            )
        return edge_attribution(
            model,
            task,
            method=cast("EdgeMethodName", self.name),
            steps=options.steps,
            replacement=options.replacement,
            memory_budget=memory,
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
    *(
        EdgeCircuits(
            name, "edges", _EDGES | ({"steps"} & set(method.options())), method.paper, method.cost
        )
        for name, method in METHODS.items()
    ),
)
