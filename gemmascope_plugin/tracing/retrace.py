"""The nodes of a prompt or of its graph once more, with what can be asked of them: for questions that a
graph's edges do not answer.

Cost: one forward pass and one encoding per site.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gemmascope_plugin.errors import TaskError, UnknownNameError, nearest
from gemmascope_plugin.graphs.graph import Graph
from gemmascope_plugin.models.prompts import PromptLike
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.sizes import parse_size
from gemmascope_plugin.tracing.linear.sweep import Entry
from gemmascope_plugin.tracing.linear.targets import Logit, LogitDifference, Readout, Seed, Target
from gemmascope_plugin.tracing.linear.tracer import Tracer
from gemmascope_plugin.tracing.node_table import node_table
from gemmascope_plugin.tracing.trace import chosen

if TYPE_CHECKING:
    import pandas as pd

SPECIAL = ("bos", "eos", "pad")
Prompt = PromptLike


def tracer_of(
    model: HookedModel,
    source: Graph | Prompt,
    dictionaries: Any,
    exclude: str | int | Sequence[str | int] | None,
    memory_budget: int | str,
) -> Tracer:
    """The prompt, run and encoded.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge`` of a Gemma.
        source: A prompt, or the graph of one.
        dictionaries: As in ``trace``.
        exclude: Special tokens; None for those of the graph, or bos, eos and pad.
        memory_budget: Bytes, or ``"4 GB"``.

    Raises:
        TaskError: A graph that is not of one prompt; else see ``Tracer.of``.
    """
    budget = parse_size(memory_budget)
    assert budget is not None, "a budget is a size"
    left = SPECIAL if exclude is None else exclude
    if isinstance(source, Graph):
        if "token_ids" not in source.metadata:
            raise TaskError(
                f"{source!r} is not the trace of one prompt", fix="a graph from trace(...)"
            )
        left = source.metadata.get("exclude", left) if exclude is None else exclude
        source = torch.tensor(source.metadata["token_ids"])
    return Tracer.of(model, source, dictionaries, exclude=left, budget=budget)


@dataclass(frozen=True, eq=False)
class Retrace:
    """A prompt's nodes and targets by their ids."""

    tracer: Tracer
    seeds: tuple[Seed, ...]
    """Targets that are no features."""

    @cached_property
    def nodes(self) -> pd.DataFrame:
        """All nodes, targets last."""
        weights = np.zeros(self.tracer.layout.n_nodes + len(self.seeds))
        return node_table(self.tracer, self.seeds, weights)

    def edge(self, source: str, target: str) -> tuple[int, int]:
        """The places of an edge's ends.

        Raises:
            UnknownNameError: No such node.
            TaskError: A source that cannot reach the target, or a target that nothing explains.
        """
        first, last = self._place(source), self._place(target)
        kinds = self.nodes["kind"]
        if not self._is_target(last):
            raise TaskError(
                f"{target!r} is a source only: nothing explains it",
                exists="features of transcoders, attention and residual SAEs, and targets, as ends",
                fix=f"({target!r}, {source!r})" if self._is_target(first) else None,
            )
        if first == self.tracer.layout.own:
            raise TaskError(
                f"{source!r} is the part of a target that is its own: no head carries it"
            )
        entry = self.entry(last)
        if first >= entry.n_below or self.nodes["pos"][first] > int(entry.positions[0]):
            turned = self._is_target(first) and last < first and kinds[last] != "target"
            raise TaskError(
                f"{source!r} comes after {target!r} and cannot reach it",
                fix=f"({target!r}, {source!r})" if turned else "graph.sources_of(target)",
            )
        return first, last

    def entry(self, place: int) -> Entry:
        """A feature or target as what a sweep starts from."""
        first = self.tracer.layout.n_nodes
        if place >= first:
            seed = self.seeds[place - first]
            return self.tracer.seed_entry(seed.after, [seed])
        nodes = np.array([place])
        return self.tracer.entry(int(self.tracer.sites_of(nodes)[0]), nodes)

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.nodes["id"])}

    def _place(self, node: str) -> int:
        if node not in self._places:
            raise UnknownNameError(
                f"There is no node {node!r} on this prompt",
                exists=f"{len(self._places)} nodes",
                nearest=nearest(node, self._places),
                fix="ids as in graph.nodes.id; targets=[StreamDirection(...)] for those of directions",
            )
        return self._places[node]

    def _is_target(self, place: int) -> bool:
        kind = self.nodes["kind"][place]
        if kind != "feature":
            return kind == "target"
        site = int(self.tracer.sites_of(np.array([place]))[0])
        return self.tracer.layout.activities[site].site.is_target


def seeds_of(
    tracer: Tracer,
    source: Graph | Prompt,
    targets: Sequence[Target] | Target | None,
) -> tuple[Seed, ...]:
    """Targets that are no features.

    Args:
        tracer: The prompt's.
        source: Whose targets they are if none are given: those of a graph but for directions, which it
            does not hold, or the likeliest next tokens of a prompt.
        targets: As in ``trace``.

    Raises:
        TaskError: A target that is none, or one twice.
    """
    readout = Readout(tracer.record)
    if targets is not None:
        return tuple(chosen(tracer, readout, targets)[0])
    if not isinstance(source, Graph):
        return tuple(readout.top(10, 0.95, -1))
    found = []
    for kind, *words in source.metadata.get("targets", ()):
        if kind == "logit":
            found.append(readout.logit(Logit(*words)))
        elif kind == "difference":
            found.append(readout.difference(LogitDifference(*words)))
    return tuple(found)
