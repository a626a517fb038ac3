"""Which attention heads carry the edges of an attribution graph.

An edge sums over all direct paths from source to target. At every layer between them each path either
passes by or goes through one head, so ``edge = bypass + sum over heads``, exactly, with what is frozen in
the graph; the method is in ``tracing/linear/head_shares.py``. A layer's loads are not shares of
another layer's: the same path may go through heads of several layers.

Cost: one forward pass and encoding, then a sweep for each target and a push upwards for each source.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float

import gemmascope_plugin.figures as figures
from gemmascope_plugin.errors import (
    EmptySelectionError,
    ModelError,
    TaskError,
    UnknownNameError,
    nearest,
    number_of,
)
from gemmascope_plugin.files.stored_result import ARRAY, StoredResult
from gemmascope_plugin.graphs.frames import SHOWN
from gemmascope_plugin.graphs.graph import Graph
from gemmascope_plugin.models.gate import gate
from gemmascope_plugin.models.prompts import PromptLike
from gemmascope_plugin.models.protocol import HookedModel, check_model, dtype_of
from gemmascope_plugin.models.tokens import token_strings
from gemmascope_plugin.splice.hooked_sae import Saes, check_saes
from gemmascope_plugin.tracing.linear.frozen_pass import FrozenPass
from gemmascope_plugin.tracing.linear.head_shares import loadings
from gemmascope_plugin.tracing.linear.targets import Target
from gemmascope_plugin.tracing.linear.trace_site import Exclude
from gemmascope_plugin.tracing.trace import allowed_gap
from gemmascope_plugin.tracing.traced_prompt import TracedPrompt

if TYPE_CHECKING:
    import pandas as pd

    from gemmascope_plugin.figures.fragments import Figure


@dataclass(frozen=True, eq=False, repr=False)
class HeadLoadings(StoredResult):
    """Loads of heads on edges, in the units of the edges."""

    noun = "head loadings"

    edges: tuple[tuple[str, str], ...]
    """Ids of source and target."""
    weights: Float[np.ndarray, " edge"] = field(metadata=ARRAY)
    """The edges themselves."""
    by_key: Float[np.ndarray, "edge layer head key"] = field(metadata=ARRAY)
    """Loads by the token that the head read."""
    bypass: Float[np.ndarray, "edge layer"] = field(metadata=ARRAY)
    """What passed a layer's attention by."""
    between: Bool[np.ndarray, "edge layer"] = field(metadata=ARRAY)
    """Whether a layer's attention lies between source and target; elsewhere no head carries anything."""
    tokens: tuple[str, ...]
    """The prompt."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """``residual``: the largest gap between an edge and its parts at a layer, as a share of the largest
    edge."""

    @property
    def values(self) -> Float[np.ndarray, "edge layer head"]:
        """Loads."""
        return self.by_key.sum(-1)

    def to_frame(self) -> pd.DataFrame:
        """One row per edge, layer between its ends and head, heads that carry most first: ``source,
        target, edge, layer, head, load, share, key, token``.

        ``edge`` is the edge's weight and ``share`` the load as a share of it; ``key`` is the token that
        was read for most of the load.
        """
        import pandas as pd

        values = self.values
        place, layer, head = np.nonzero(np.repeat(self.between[..., None], values.shape[2], 2))
        load = values[place, layer, head]
        key = np.abs(self.by_key[place, layer, head]).argmax(-1)
        columns = {
            "source": [self.edges[i][0] for i in place],
            "target": [self.edges[i][1] for i in place],
            "edge": self.weights[place],
            "layer": layer,
            "head": head,
            "load": load,
            "share": _shares(load, self.weights[place]),
            "key": key,
            "token": [self.tokens[i] for i in key],
        }
        order = np.lexsort((-np.abs(load), place))
        return pd.DataFrame(columns).iloc[order].reset_index(drop=True)

    def plot(self, edge: int | tuple[str, str] = 0) -> Figure:
        """A plotly figure of one edge: layers by heads, and what passes each layer by.

        Args:
            edge: Its number, or ids of source and target.

        Raises:
            TaskError: No such edge, or no attention between its ends.
        """
        place = self._place(edge)
        layers = np.flatnonzero(self.between[place])
        source, target = self.edges[place]
        if not len(layers):
            raise TaskError(f"No attention lies between {source!r} and {target!r}")
        values = np.hstack([self.values[place, layers], self.bypass[place, layers, None]])
        return figures.heatmap(
            values,
            x=[*(f"head {i}" for i in range(self.by_key.shape[2])), "past all"],
            y=[f"layer {i}" for i in layers],
            title=f"{source} to {target}: {self.weights[place]:.4g}",
            color_title="load",
        )

    def _place(self, edge: int | tuple[str, str]) -> int:
        if isinstance(edge, tuple) and edge in self.edges:
            return self.edges.index(edge)
        if not isinstance(edge, int) or not 0 <= edge < len(self.edges):
            raise TaskError(
                f"{edge!r} is not one of these edges", exists=f"edges 0 to {len(self.edges) - 1}"
            )
        return edge

    def __len__(self) -> int:
        return len(self.edges)

    def __repr__(self) -> str:
        _, layers, heads, _ = self.by_key.shape
        return (
            f"HeadLoadings({number_of(len(self), 'edge')}, {layers} layers of {heads} heads, "
            f"residual {self.metadata.get('residual', float('nan')):.1e})"
        )

    def _repr_html_(self) -> str:
        return f"<p>{escape(repr(self))}</p>{figures.frame_html(self.to_frame(), SHOWN)}"


@gate(model=check_model, saes=check_saes)
def head_loadings(
    model: HookedModel,
    graph: Graph | PromptLike,
    saes: Saes,
    edges: Sequence[tuple[str, str]] | pd.DataFrame | tuple[str, str],
    *,
    targets: Sequence[Target] | Target | None = None,
    exclude: Exclude | None = None,
    memory_budget: int | str = "4 GB",
) -> HeadLoadings:
    """How much of chosen edges each attention head carried.

    Args:
        model: The model that was traced.
        graph: The graph of a prompt, or the prompt itself.
        saes: The dictionaries of the trace.
        edges: Ids of source and target, one pair or several, or rows of ``graph.edge_frame()``: from
            features, errors, tokens and biases to features, logits, differences and directions.
        targets: As in ``trace``, where edges end at directions, which a graph does not hold, or, for a
            prompt, at other than the likeliest next tokens.
        exclude: Special tokens that dictionaries leave alone; None for those of the graph, or bos, eos
            and pad.
        memory_budget: Bytes, or ``"4 GB"``.

    Returns:
        Loads by edge, layer and head.

    Raises:
        UnknownNameError: A node that is not in the graph.
        TaskError: A source that comes after its target, or an end that nothing explains.
        EmptySelectionError: No edge.
        ModelError: Dictionaries that cannot be traced.
        GemmaScopeError: The memory budget is too small.

    Example:
        >>> suite = gs.tiny()
        >>> saes = [suite.load("transcoder", layer) for layer in range(4)]
        >>> graph = gs.trace(suite.model, "the capital of the state containing dallas is", saes)
        >>> nodes = graph.prune(0.8).nodes
        >>> source, target = nodes.id.iloc[0], nodes.id.iloc[-1]
        >>> gs.head_loadings(suite.model, graph, saes, [(source, target)])
        HeadLoadings(1 edge, 4 layers of 4 heads, residual 2.1e-07)
    """
    pairs = _pairs(edges)
    if isinstance(graph, Graph):
        for pair in pairs:
            for node in pair:
                graph.find(node)
    traced = TracedPrompt.of(model, graph, saes, exclude=exclude, memory_budget=memory_budget)
    if targets is not None:
        seeds, _ = traced.choose(targets)
    elif isinstance(graph, Graph):
        seeds, _ = traced.seeds_of(graph)
    else:
        seeds = traced.readout.top(10, 0.95, -1)
    return _carried(traced.with_seeds(seeds), pairs)


def _carried(traced: TracedPrompt, pairs: Sequence[tuple[str, str]]) -> HeadLoadings:
    """Loads of all edges, target by target."""
    frozen = traced.frozen
    places = [_ends(traced, *pair) for pair in pairs]
    sizes = (len(pairs), frozen.n_layers, frozen.anatomy.n_heads, frozen.n_pos)
    weights, gaps = np.zeros(sizes[:1]), np.zeros(sizes[:1])
    by_key, bypass = np.zeros(sizes), np.zeros(sizes[:2])
    between = np.zeros(sizes[:2], dtype=bool)
    for target in dict.fromkeys(last for _, last in places):
        edges = [i for i, (_, last) in enumerate(places) if last == target]
        part = loadings(traced.sweep, traced.entry(target), [places[i][0] for i in edges])
        by_key[edges, ..., : part.loads.shape[-1]] = part.loads.double().cpu().numpy()
        bypass[edges] = part.bypass.double().cpu().numpy()
        between[edges] = part.between.cpu().numpy()
        weights[edges] = part.effects.double().cpu().numpy()
        gaps[edges] = part.gaps.double().cpu().numpy()
    _judge(frozen, pairs, gaps, np.maximum(np.abs(by_key).sum((1, 2, 3)), np.abs(weights)))
    details = {"residual": float(gaps.max() / max(np.abs(weights).max(), 1e-30))}
    words = tuple(token_strings(frozen.model, frozen.tokens))
    return HeadLoadings(tuple(pairs), weights, by_key, bypass, between, words, details)


def _judge(
    frozen: FrozenPass,
    pairs: Sequence[tuple[str, str]],
    gaps: Float[np.ndarray, " edge"],
    sizes: Float[np.ndarray, " edge"],
) -> None:
    """Refuses edges that are not the sum of their parts."""
    model = frozen.model
    allowed = allowed_gap([dtype_of(model)], frozen.n_layers, int(model.cfg.d_model)) * sizes
    worst = int(np.argmax(gaps - allowed))
    if not gaps[worst] <= allowed[worst]:
        source, target = pairs[worst]
        raise ModelError(
            f"What heads carry of the edge from {source} to {target} is off by {gaps[worst]:.3g}, "
            f"allowed is {allowed[worst]:.1g}",
            fix="load_model(name), which folds nothing, or dtype='float32'",
        )


def _ends(traced: TracedPrompt, source: str, target: str) -> tuple[int, int]:
    """The nodes at the ends of an edge."""
    first, last = _find(traced, source), _find(traced, target)
    kinds = traced.nodes["kind"]
    if not _is_target(traced, last):
        raise TaskError(
            f"{target!r} is a source only: nothing explains it",
            exists="features of transcoders, attention and residual SAEs, and targets, as ends",
            fix=f"({target!r}, {source!r})" if _is_target(traced, first) else None,
        )
    if first == traced.layout.constant:
        raise TaskError(f"{source!r} is the part of a target that is its own: no head carries it")
    entry = traced.entry(last)
    if first >= entry.n_below or traced.nodes["pos"][first] > int(entry.positions[0]):
        is_reversed = _is_target(traced, first) and last < first and kinds[last] != "target"
        raise TaskError(
            f"{source!r} comes after {target!r} and cannot reach it",
            fix=f"({target!r}, {source!r})" if is_reversed else "graph.sources_of(target)",
        )
    return first, last


def _find(traced: TracedPrompt, name: str) -> int:
    if name not in traced.node_of:
        raise UnknownNameError(
            f"There is no node {name!r} on this prompt",
            exists=f"{len(traced.node_of)} nodes",
            nearest=nearest(name, traced.node_of),
            fix="ids as in graph.nodes.id; targets=[StreamDirection(...)] for those of directions",
        )
    return traced.node_of[name]


def _is_target(traced: TracedPrompt, node: int) -> bool:
    kind = traced.nodes["kind"][node]
    if kind != "feature":
        return kind == "target"
    site = int(traced.layout.sites_of(np.array([node]))[0])
    return traced.layout.activities[site].site.is_target


def _pairs(edges: Any) -> list[tuple[str, str]]:
    """Edges in whatever form they came."""
    if hasattr(edges, "columns"):
        edges = list(zip(edges["source"], edges["target"], strict=True))
    elif isinstance(edges, tuple) and all(isinstance(node, str) for node in edges):
        edges = [edges]
    if isinstance(edges, (str, Mapping)) or not isinstance(edges, Iterable):
        raise _no_edge(edges)
    pairs: list[Any] = [
        tuple(edge) if isinstance(edge, (tuple, list)) else (edge,) for edge in edges
    ]
    if not pairs:
        raise EmptySelectionError("No edge was given", fix="graph.edge_frame(10)")
    for pair in pairs:
        if len(pair) != 2 or not all(isinstance(node, str) for node in pair):
            raise _no_edge(pair)
    return pairs


def _no_edge(edge: object) -> TaskError:
    return TaskError(f"{edge!r} is not an edge", fix="(source, target), ids of graph.nodes.id")


def _shares(loads: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Loads by the edges that they are part of; NaN for an edge of zero."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(weights == 0, np.nan, loads / weights)
