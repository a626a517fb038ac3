"""The prompt of a graph once more: which node of the graph is what in the model.

The prompt is run and encoded as when it was traced; a node of the graph is found by its id, a target by
what was asked for.

Cost: one forward pass and one encoding per site.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from gemmascope_plugin.errors import InputError, TaskError, UnknownNameError
from gemmascope_plugin.graphs.graph import Graph
from gemmascope_plugin.models.check_model import describe
from gemmascope_plugin.models.points import reading
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.sizes import parse_size
from gemmascope_plugin.tracing.linear.frozen_pass import FrozenPass
from gemmascope_plugin.tracing.linear.node_order import Layout
from gemmascope_plugin.tracing.linear.targets import Logit, LogitDifference, Readout, Seed
from gemmascope_plugin.tracing.linear.tracer import Tracer
from gemmascope_plugin.tracing.node_table import node_table

Hooks = list[tuple[str, Callable[..., Any]]]
KINDS_CHANGED = ("feature", "error", "token")


@dataclass(frozen=True, eq=False)
class Replay:
    """A graph with the model and the dictionaries that it was traced with."""

    graph: Graph
    tracer: Tracer
    place: np.ndarray
    """Of each node of the graph in the layout of the whole trace; -1 for targets."""
    seeds: tuple[Seed, ...]
    """Targets that are no features, in the order of the graph."""

    @classmethod
    def of(
        cls,
        model: HookedModel,
        graph: Graph,
        dictionaries: Any,
        memory_budget: int | str = "4 GB",
    ) -> Replay:
        """Runs the prompt of a graph again.

        Args:
            model: The model that was traced.
            graph: The graph, whole or pruned.
            dictionaries: Those that it was traced with.
            memory_budget: Bytes, or ``"4 GB"``.

        Raises:
            UnknownNameError: The prompt has no such nodes: other dictionaries, or another model.
            TaskError: Targets that a file does not hold, or a graph of several prompts.
        """
        details = graph.metadata
        if "token_ids" not in details or "targets" not in details:
            raise TaskError(
                f"{graph!r} is not the trace of one prompt", fix="a graph from trace(...)"
            )
        budget = parse_size(memory_budget)
        assert budget is not None, "a budget is a size"
        tokens = torch.tensor(details["token_ids"])
        tracer = Tracer.of(model, tokens, dictionaries, exclude=details["exclude"], budget=budget)
        return cls(graph, tracer, _places(graph, tracer), _seeds(graph, tracer))

    @property
    def record(self) -> FrozenPass:
        """The prompt's run."""
        return self.tracer.record

    @property
    def layout(self) -> Layout:
        """All nodes of the prompt."""
        return self.tracer.layout

    @cached_property
    def seed_nodes(self) -> np.ndarray:
        """Places of the seeds in the graph."""
        return np.flatnonzero(self.graph.where("target"))

    def sources(self, changes: Mapping[str, float]) -> dict[int, float]:
        """Changes by place in the layout.

        Raises:
            UnknownNameError: No such node, or one that cannot be changed.
        """
        if not isinstance(changes, Mapping):
            raise InputError(
                f"{describe(changes)} does not say what is changed",
                fix="changes={node id: factor}, 0.0 for off; ids are those of graph.nodes.id",
            )
        found = {}
        for name, factor in changes.items():
            if not isinstance(factor, (int, float)) or not math.isfinite(factor):
                raise InputError(
                    f"The factor of {name!r} is {factor!r}",
                    fix=f"changes={{{name!r}: 0.0}} for off",
                )
            node = self.graph.find(name)
            kind = str(self.graph.nodes["kind"].iloc[node])
            if kind not in KINDS_CHANGED:
                raise UnknownNameError(
                    f"{name!r} is a {kind} and cannot be changed", exists=", ".join(KINDS_CHANGED)
                )
            found[int(self.place[node])] = float(factor)
        return found

    def hook_of(self, name: str) -> str:
        """The model's hook for a dictionary's tensor."""
        return reading(self.record.model, name).hook


def _places(graph: Graph, tracer: Tracer) -> np.ndarray:
    """Where the nodes of a graph are in the whole trace.

    Raises:
        UnknownNameError: One of them is not there.
    """
    whole = node_table(tracer, (), np.zeros(tracer.layout.n_nodes))
    known = {name: i for i, name in enumerate(whole["id"])}
    targets = graph.where("target")
    ids = graph.nodes["id"].to_numpy()
    missing = [name for name in ids[~targets] if name not in known]
    if missing:
        raise UnknownNameError(
            f"{len(missing)} nodes of the graph, {missing[0]!r} among them, do not exist on this prompt",
            fix="the model and the dictionaries that were traced",
        )
    return np.array(
        [-1 if target else known[name] for name, target in zip(ids, targets, strict=True)]
    )


def _seeds(graph: Graph, tracer: Tracer) -> tuple[Seed, ...]:
    """The targets of a graph as vectors.

    Raises:
        TaskError: A direction, whose vector no graph holds.
    """
    readout = Readout(tracer.record)
    found = []
    for kind, *words in graph.metadata["targets"]:
        if kind == "logit":
            found.append(readout.logit(Logit(*words)))
        elif kind == "difference":
            found.append(readout.difference(LogitDifference(*words)))
        else:
            raise TaskError(
                f"The target {words[0]!r} is a direction, which a graph does not hold",
                fix="tokens or differences of tokens as targets",
            )
    return tuple(found)
