"""Runs a prompt, or that of a graph once more, and maps graph nodes to model activations.

1. A prompt is run once and encoded at every site; its nodes then have numbers (``linear/trace_nodes.py``)
   and, in the columns of a graph, ids and labels.
2. Any of them can be the start of a sweep, a change in a run, or a source whose way up is followed. A
   node of a graph is found by its id, a target by what was asked for.

Cost: one forward pass and one encoding per site.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int64

from gemmascope_plugin.arguments import parse_size
from gemmascope_plugin.errors import FeatureIndexError, TaskError, UnknownNameError, nearest
from gemmascope_plugin.graphs.defects import TRACE_COLUMNS
from gemmascope_plugin.graphs.graph import Graph
from gemmascope_plugin.models.points import hook_points, reading
from gemmascope_plugin.models.prompts import PromptLike
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.models.tokens import token_strings
from gemmascope_plugin.splice.hooked_sae import Saes
from gemmascope_plugin.tracing.linear.frozen_pass import FrozenPass
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
from gemmascope_plugin.tracing.linear.trace_nodes import Layout
from gemmascope_plugin.tracing.linear.trace_site import (
    Activity,
    Exclude,
    TraceSite,
    activities,
    trace_sites,
)
from gemmascope_plugin.tracing.linear.transport import Entry

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

    @cached_property
    def columns(self) -> dict[str, np.ndarray]:
        """All nodes as the columns of a graph, without weights; targets last."""
        words = token_strings(self.frozen.model, self.frozen.tokens)
        parts = [_tokens(self.frozen.tokens.tolist(), words), _biases(self.layout)]
        for activity in self.layout.activities:
            parts += [_features(activity), _errors(activity)]
        parts.append(_seeds(self.seeds, self.frozen.n_layers))
        return {name: np.concatenate([part[name] for part in parts]) for name in TRACE_COLUMNS}

    @cached_property
    def nodes(self) -> pd.DataFrame:
        """The same as a table."""
        import pandas as pd

        return pd.DataFrame(self.columns)

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


def _prompt_of(graph: Graph, exclude: Exclude | None) -> tuple[torch.Tensor, Exclude | None]:
    details = graph.metadata
    if "token_ids" not in details:
        raise _no_trace(graph)
    return torch.tensor(details["token_ids"]), details.get(
        "exclude"
    ) if exclude is None else exclude


def _no_trace(graph: Graph) -> TaskError:
    return TaskError(f"{graph!r} is not the trace of one prompt", fix="a graph from trace(...)")


# ----------------------------------------------------------------------------------- columns of nodes
def _rows(count: int, kind: str, **values: Any) -> dict[str, np.ndarray]:
    blank = {"kind": kind, "site": "", "layer": -1, "pos": -1, "index": -1}
    blank |= {"activation": np.nan, "weight": 0.0}
    types: dict[str, Any] = dict.fromkeys(("layer", "pos", "index"), np.int64)
    types |= dict.fromkeys(("activation", "weight"), np.float64)
    columns = {}
    for name, value in {**blank, **values}.items():
        columns[name] = np.empty(count, dtype=types.get(name, object))
        columns[name][:] = value
    return columns


def _tokens(ids: list[int], words: list[str]) -> dict[str, np.ndarray]:
    places = range(len(ids))
    names = [f"token@{pos}" for pos in places]
    return _rows(len(ids), "token", pos=list(places), index=ids, label=words, id=names)


def _biases(layout: Layout) -> dict[str, np.ndarray]:
    labels, sites, layers = ["b_enc and b_U"], [""], [-1]
    for layer in range(layout.n_layers):
        labels.append(f"attention biases of layer {layer}")
        sites.append("")
        layers.append(layer)
    for site in (activity.site for activity in layout.activities):
        labels += [f"b_dec of {site.label}", f"{site.label} at special tokens"]
        sites += [site.label] * 2
        layers += [site.layer] * 2
    names = [f"bias:{label.replace(' ', '_')}" for label in labels]
    return _rows(len(labels), "bias", site=sites, layer=layers, label=labels, id=names)


def _features(activity: Activity) -> dict[str, np.ndarray]:
    acts, site = activity.acts, activity.site
    pos, index = acts.rows.cpu().numpy(), acts.indices.cpu().numpy()
    label, short = site.label, _short(site)
    names = [f"{label}/{i}@{p}" for i, p in zip(index.tolist(), pos.tolist(), strict=True)]
    labels = [f"{short} {i}" for i in index.tolist()]
    values = acts.values.double().cpu().numpy()
    columns = {"site": site.label, "layer": site.layer, "pos": pos, "index": index}
    return _rows(len(index), "feature", **columns, activation=values, label=labels, id=names)


def _errors(activity: Activity) -> dict[str, np.ndarray]:
    site = activity.site
    pos = activity.keep.nonzero()[:, 0].cpu().numpy()
    names = [f"{site.label}/error@{p}" for p in pos]
    columns = {"site": site.label, "layer": site.layer, "pos": pos}
    return _rows(len(pos), "error", **columns, label=f"{_short(site)} error", id=names)


def _short(site: TraceSite) -> str:
    """``L3`` for transcoders, with the kind of site for others."""
    kind = "" if site.kind == "transcoder" else f" {site.kind}"
    return f"L{site.layer}{kind}"


def _seeds(seeds: Sequence[Seed], n_layers: int) -> dict[str, np.ndarray]:
    names = [f"target:{seed.name}" for seed in seeds]
    return _rows(
        len(seeds),
        "target",
        layer=n_layers,
        pos=[seed.position for seed in seeds],
        index=[seed.token for seed in seeds],
        activation=[seed.value for seed in seeds],
        label=[seed.label for seed in seeds],
        id=names,
    )
