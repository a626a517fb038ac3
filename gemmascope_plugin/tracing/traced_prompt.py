"""Runs a prompt, or that of a graph once more, and maps graph nodes to model activations.

A prompt is run once and encoded at every site; its nodes then have numbers and ids, and any of them can
be the start of a sweep, a change in a run, or a source whose way up is followed. A node of a graph is
found by its id, a target by what was asked for.

Cost: one forward pass and one encoding per site.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int64

from gemmascope_plugin.arguments import parse_size
from gemmascope_plugin.errors import FeatureIndexError, TaskError, UnknownNameError, nearest
from gemmascope_plugin.graphs.graph import Graph
from gemmascope_plugin.models.points import hook_points, reading
from gemmascope_plugin.models.prompts import PromptLike
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.splice.hooked_sae import Saes
from gemmascope_plugin.tracing.linear.frozen_pass import FrozenPass
from gemmascope_plugin.tracing.linear.pullback import Entry
from gemmascope_plugin.tracing.linear.sweep import Sweep
from gemmascope_plugin.tracing.linear.targets import (
    FeatureTarget,
    Logit,
    LogitDifference,
    Readout,
    Seed,
    StreamDirection,
    Target,
    as_target,
    check_distinct,
    position_in,
)
from gemmascope_plugin.tracing.linear.trace_nodes import Layout, node_table
from gemmascope_plugin.tracing.linear.trace_site import Exclude, activities, trace_sites

if TYPE_CHECKING:
    import pandas as pd

SPECIAL = ("bos", "eos", "pad")


@dataclass(frozen=True, eq=False)
class TracedPrompt:
    """What can be asked of one prompt."""

    frozen: FrozenPass
    layout: Layout
    sweep: Sweep
    seeds: tuple[Seed, ...] = ()
    """Non-feature targets, whose nodes come after those of the layout."""

    @classmethod
    def of(
        cls,
        model: HookedModel,
        source: Graph | PromptLike,
        saes: Saes,
        *,
        exclude: Exclude | None = None,
        memory_budget: int | str = "4 GB",
    ) -> TracedPrompt:
        """Runs the model once and encodes the prompt, or that of a graph, at every site.

        ``exclude`` are special tokens; None for those of the graph, or bos, eos and pad.
        """
        budget = parse_size(memory_budget)
        assert budget is not None, "a budget is a size"
        if isinstance(source, Graph):
            source, exclude = _prompt_of(source, exclude)
        sites = trace_sites(model, saes, SPECIAL if exclude is None else exclude)
        points = hook_points(model)
        names = [name for site in sites for name in (site.hooked.hook_in, site.hooked.hook_out)]
        hooks = [reading(model, name, points).hook for name in names]
        frozen = FrozenPass.of(model, source, hooks, budget // 2)
        layout = Layout(frozen.n_pos, frozen.n_layers, tuple(activities(frozen, sites)))
        return cls(frozen, layout, Sweep(frozen, layout, budget // 4))

    @classmethod
    def of_graph(
        cls,
        model: HookedModel,
        graph: Graph,
        saes: Saes,
        memory_budget: int | str = "4 GB",
    ) -> TracedPrompt:
        """Runs the prompt of a graph again, with all of the graph's targets."""
        if "targets" not in graph.metadata:
            raise _no_trace(graph)
        traced = cls.of(model, graph, saes, memory_budget=memory_budget)
        traced.places(graph)
        seeds, names = traced.seeds_of(graph)
        if names:
            raise TaskError(
                f"The target {names[0]!r} is a direction, which a graph does not hold",
                fix="tokens or differences of tokens as targets",
            )
        return traced.with_seeds(seeds)

    def with_seeds(self, seeds: Iterable[Seed]) -> TracedPrompt:
        """The same with these non-feature targets."""
        return replace(self, seeds=tuple(seeds))

    @cached_property
    def readout(self) -> Readout:
        """Logits as vectors that read the end of the stream."""
        return Readout(self.frozen)

    def seeds_of(self, graph: Graph) -> tuple[list[Seed], list[str]]:
        """Non-feature targets of a graph, and the names of directions, whose vectors it does not hold."""
        seeds: list[Seed] = []
        directions: list[str] = []
        for kind, *words in graph.metadata.get("targets", ()):
            if kind == "logit":
                seeds.append(self.readout.logit(Logit(*words)))
            elif kind == "difference":
                seeds.append(self.readout.difference(LogitDifference(*words)))
            else:
                directions.append(words[0])
        return seeds, directions

    def choose(
        self, targets: Sequence[Target] | Target
    ) -> tuple[list[Seed], dict[int, FeatureTarget]]:
        """Targets by kind: seeds, and nodes of features."""
        kinds = (str, int, Logit, LogitDifference, StreamDirection, FeatureTarget)
        several: Any = [targets] if isinstance(targets, kinds) else targets
        if isinstance(several, Mapping) or not isinstance(several, Iterable):
            as_target(several)  # pyright: ignore[reportArgumentType]  # says what a target is
        several = list(several)
        if not several:
            raise TaskError("No target was given", fix="targets=None for the likeliest next tokens")
        seeds: list[Seed] = []
        features: dict[int, FeatureTarget] = {}
        names: list[tuple[Any, str, int]] = []
        for target in map(as_target, several):
            if isinstance(target, FeatureTarget):
                node = self.feature_node(target)
                features[node] = target
                position = position_in(target.position, self.frozen.n_pos)
                names.append((node, f"{target.site}/{target.feature}", position))
                continue
            seed = self.readout.seed(target)
            seeds.append(seed)
            names.append((seed.source, seed.label, seed.position))
        check_distinct(names)
        return seeds, features

    def feature_node(self, target: FeatureTarget) -> int:
        """The node of an active feature."""
        sites = {activity.site.label: i for i, activity in enumerate(self.layout.activities)}
        if target.site not in sites:
            raise UnknownNameError(
                f"No dictionary stands at {target.site!r}",
                exists=", ".join(sites),
                nearest=nearest(target.site, sites),
            )
        index = sites[target.site]
        activity = self.layout.activities[index]
        if not activity.site.is_target:
            raise UnknownNameError(
                f"What features at {target.site!r} read is not a linear function of the stream",
                fix="a transcoder instead of an SAE of the MLP's output",
            )
        position = position_in(target.position, self.frozen.n_pos)
        start, stop = (int(activity.acts.offsets[position + i]) for i in (0, 1))
        active = activity.acts.indices[start:stop].tolist()
        if target.feature not in active:
            raise FeatureIndexError(
                f"Feature {target.feature} of {target.site} is not active at position {position}",
                exists=f"{len(active)} active features there: {', '.join(map(str, active[:10]))}",
            )
        return self.layout.starts[index] + start + active.index(target.feature)

    def table(self, weights: Float[np.ndarray, " node"] | None = None) -> pd.DataFrame:
        """All nodes, targets last."""
        if weights is None:
            weights = np.zeros(self.layout.n_nodes + len(self.seeds))
        return node_table(self.frozen, self.layout, self.seeds, weights)

    @cached_property
    def nodes(self) -> pd.DataFrame:
        """All nodes without weights, targets last."""
        return self.table()

    @cached_property
    def node_of(self) -> dict[str, int]:
        """From ids to numbers of nodes."""
        return {name: node for node, name in enumerate(self.nodes["id"])}

    def places(self, graph: Graph) -> Int64[np.ndarray, " place"]:
        """Which node of the prompt each node of a graph is; -1 for targets."""
        is_target = graph.where("target")
        ids = graph.nodes["id"].to_numpy()
        missing = [name for name in ids[~is_target] if name not in self.node_of]
        if missing:
            raise UnknownNameError(
                f"{len(missing)} nodes of the graph, {missing[0]!r} among them, do not exist on this "
                "prompt",
                fix="the model and the dictionaries that were traced",
            )
        pairs = zip(ids, is_target, strict=True)
        return np.array([-1 if target else self.node_of[name] for name, target in pairs])

    def entry(self, node: int) -> Entry:
        """A feature or target as what a sweep starts from."""
        first = self.layout.n_nodes
        if node >= first:
            seed = self.seeds[node - first]
            return self.sweep.seed_entry(seed.after, [seed])
        nodes = np.array([node])
        return self.sweep.feature_entry(int(self.layout.sites_of(nodes)[0]), nodes)

    def edge(self, source: str, target: str) -> tuple[int, int]:
        """The nodes at the ends of an edge."""
        first, last = self._find(source), self._find(target)
        kinds = self.nodes["kind"]
        if not self._is_target(last):
            raise TaskError(
                f"{target!r} is a source only: nothing explains it",
                exists="features of transcoders, attention and residual SAEs, and targets, as ends",
                fix=f"({target!r}, {source!r})" if self._is_target(first) else None,
            )
        if first == self.layout.constant:
            raise TaskError(
                f"{source!r} is the part of a target that is its own: no head carries it"
            )
        entry = self.entry(last)
        if first >= entry.n_below or self.nodes["pos"][first] > int(entry.positions[0]):
            is_reversed = self._is_target(first) and last < first and kinds[last] != "target"
            raise TaskError(
                f"{source!r} comes after {target!r} and cannot reach it",
                fix=f"({target!r}, {source!r})" if is_reversed else "graph.sources_of(target)",
            )
        return first, last

    def _find(self, name: str) -> int:
        if name not in self.node_of:
            raise UnknownNameError(
                f"There is no node {name!r} on this prompt",
                exists=f"{len(self.node_of)} nodes",
                nearest=nearest(name, self.node_of),
                fix="ids as in graph.nodes.id; targets=[StreamDirection(...)] for those of directions",
            )
        return self.node_of[name]

    def _is_target(self, node: int) -> bool:
        kind = self.nodes["kind"][node]
        if kind != "feature":
            return kind == "target"
        site = int(self.layout.sites_of(np.array([node]))[0])
        return self.layout.activities[site].site.is_target


def _prompt_of(graph: Graph, exclude: Exclude | None) -> tuple[torch.Tensor, Exclude | None]:
    details = graph.metadata
    if "token_ids" not in details:
        raise _no_trace(graph)
    return torch.tensor(details["token_ids"]), details.get(
        "exclude"
    ) if exclude is None else exclude


def _no_trace(graph: Graph) -> TaskError:
    return TaskError(f"{graph!r} is not the trace of one prompt", fix="a graph from trace(...)")
