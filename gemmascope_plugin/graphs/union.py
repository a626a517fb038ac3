"""The mean of the attribution graphs of many prompts, aligned by the positions of a template.

1. Every position of every prompt has a name: its number, its number from the end, or a word such as
   ``subject``. Nodes with the same kind, site, index and name are one node (``combine.py``).
2. An edge is the mean over *all* prompts, 0 where it is not there; activations and weights likewise. A
   row sums to the mean of its node's pre-activations, 0 where a prompt does not explain it.
3. Graphs come one by one: what is kept is the sum so far. The mean of contrasts is the contrast of the
   means, so ``union(contrast(a, b) for ...)`` averages contrasts over a data set.

Each graph has the attention patterns and norm scales of its own prompt: the mean is not the graph of a
mean prompt. Opposite effects in different prompts cancel each other.

Cost: per graph one pass over its entries and those of the sum; memory for the sum and one graph.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import repeat, zip_longest
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from gemmascope_plugin.errors import (
    EmptySelectionError,
    InputError,
    TaskError,
    UnknownNameError,
    check_choice,
)
from gemmascope_plugin.graphs.combine import (
    PRUNED,
    SHARED,
    Aligned,
    GraphSum,
    Targets,
    combine,
    either,
    largest_gap,
    pass_order,
    positions_of,
)
from gemmascope_plugin.graphs.graph import Graph
from gemmascope_plugin.graphs.graph_arrays import check_graph
from gemmascope_plugin.graphs.node import table_columns
from gemmascope_plugin.models.gate import gate

if TYPE_CHECKING:
    import pandas as pd


@gate()
def union(
    graphs: Iterable[Graph],
    *,
    align: Literal["position", "end"] = "position",
    labels: Iterable[Sequence[str]] | None = None,
    targets: Targets = "label",
    min_share: float = 0.0,
) -> Graph:
    """The mean graph of many prompts.

    Args:
        graphs: Of ``trace``, ``contrast`` or ``prune``, all of one kind; an iterator is read once, one
            graph at a time.
        align: Positions are the same counted from the start, for prompts of equal length, or from the
            end.
        labels: Instead, a name for every token of every graph, each once in a graph: ``["bos",
            "subject", "verb"]``. Positions stand in the order in which prompts have them on average.
        targets: ``label``: targets are the same by token and position; ``order``: the n-th of each
            prompt, such as its own answer.
        min_share: Features and errors in a smaller share of the graphs are left out; rows then lack
            their effects.

    Returns:
        A graph whose table says in how many graphs a node occurs (``count``), in what share of them
        (``share``), and how many explain it (``explained``). ``metadata["residual"]``: the largest gap
        between a row's sum and the mean of what it explains; not a number if anything was left out.

    Raises:
        InputError: A single graph.
        EmptySelectionError: No graph, or ``min_share`` leaves no feature and no error.
        TaskError: Different models or dictionaries, different lengths without labels, labels that do
            not fit.
        UnknownNameError: An unknown alignment, or a share outside [0, 1].
        GemmaScopeError: A graph with grouped nodes.

    Example:
        >>> suite = gs.tiny()
        >>> saes = [suite.load("transcoder", layer) for layer in range(4)]
        >>> graph = gs.trace(suite.model, "the capital of the state containing dallas is", saes)
        >>> other = gs.trace(suite.model, "the capital of the state containing greeley is", saes)
        >>> gs.union([graph, other])
        Graph('<bos>thecapitalofthestatecontainingdallas | greeleyis': 9 tokens, 13 biases, 427
          features, 32 errors, 2 targets, 46515 edges)
    """
    check_choice("alignment", align, ("position", "end"))
    check_choice("way to match targets", targets, get_args(Targets))
    if not 0 <= min_share <= 1:
        raise UnknownNameError(f"min_share={min_share} is not a share", exists="shares from 0 to 1")
    if labels is not None and align == "end":
        raise TaskError('labels= and align="end" both align', fix="one of them")
    if isinstance(graphs, (str, Mapping)) or not isinstance(graphs, Iterable):
        check_graph(graphs, "union(graphs)")
        raise InputError("union() got a single graph", fix="union([graph, other])")
    if labels is not None and (isinstance(labels, str) or not isinstance(labels, Iterable)):
        raise _no_labels("union()", labels)
    parts = _counted(graphs, align) if labels is None else _labelled(graphs, labels)
    total = combine(parts, repeat(1.0), targets)
    if total.first is None:
        raise EmptySelectionError("No graph was given", fix="[trace(...), ...]")
    return _mean(total, min_share, align if labels is None else "labels")


def _mean(total: GraphSum, min_share: float, align: str) -> Graph:
    """The sum over the number of graphs."""
    assert total.first is not None, "there is a graph"
    columns, n, metadata = total.columns, total.n_graphs, total.first.metadata
    nodes, names = _table(total, align)
    order = pass_order(nodes)
    nodes = nodes.iloc[order].reset_index(drop=True)
    edges = total.edges(total.matrix / n, columns["explained"] > 0, order)
    sums = (columns["row sum"] / n)[order][edges.nodes]
    is_whole = total.sums_hold and not min_share
    gap = largest_gap(edges, sums, float(np.abs(sums).max(initial=0))) if is_whole else math.nan
    is_left = _occurring(nodes, min_share)
    details = {
        **{name: metadata[name] for name in (*SHARED, *PRUNED) if name in metadata},
        "prompts": tuple(total.prompts),
        "n_graphs": n,
        "align": align,
        "positions": names,
        "min_occurrence": min_share,
        "residual": gap,
    }
    tokens = names if align == "labels" else _tokens(total, names)
    columns = table_columns(nodes.loc[is_left].reset_index(drop=True))
    return Graph(columns, edges.compacted(is_left), tokens, details)


def _table(total: GraphSum, align: str) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """The table in common numbers, and the names of positions in their order."""
    names = sorted(total.positions, key=lambda name: float(np.mean(total.positions[name])))
    place = {name: i for i, name in enumerate(names)}
    pos = np.array([*(place[name] for name in total.positions), -1])
    nodes, columns, n = total.table(), total.columns, total.n_graphs
    means = {name: columns[name] / n for name in columns if name.startswith("activation")}
    means |= {"weight": columns["weight"] / n, "pos": pos[nodes["pos"]]}
    count, explained = (columns[name].astype(np.int64) for name in ("count", "explained"))
    counts = {"count": count, "share": count / n, "explained": explained}
    labels = [
        either([*total.words[key]]) if key in total.words else label
        for key, label in zip(nodes["key"], nodes["label"], strict=True)
    ]
    nodes = nodes.assign(**means, label=labels, **counts).drop(columns="key")
    if align == "labels":
        is_token = nodes["kind"] == "token"
        rows = zip(nodes.loc[is_token, "pos"], nodes.loc[is_token, "label"], strict=True)
        nodes.loc[is_token, "label"] = [f"{names[pos]}: {words}" for pos, words in rows]
    return nodes, tuple(names)


def _tokens(total: GraphSum, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(either([*total.words[f"token@{name}"]]) for name in names)


def _occurring(nodes: pd.DataFrame, min_share: float) -> np.ndarray:
    """True at nodes that stay, ``[node]``."""
    droppable = (nodes["kind"].isin(["feature", "error"]) & (nodes["weight"] == 0)).to_numpy()
    is_left = ~droppable | (nodes["share"] >= min_share).to_numpy()
    if not (is_left & droppable).any():
        raise EmptySelectionError(
            f"min_share={min_share} leaves no feature and no error of {len(nodes)} nodes",
            exists=f"nodes in up to {nodes.loc[droppable, 'share'].max():.2f} of the graphs",
            fix="a smaller min_share, or another alignment",
        )
    return is_left


def _counted(graphs: Iterable[Graph], align: str) -> Iterator[Aligned]:
    """Graphs with names of their positions that say where these stand."""
    first: Graph | None = None
    for number, graph in enumerate(graphs):
        check_graph(graph, "union(graphs)")
        n_pos = len(graph.tokens)
        places = np.arange(n_pos, dtype=float)
        if align == "end":
            yield Aligned(graph, [str(i - n_pos) for i in range(n_pos)], places - n_pos)
            continue
        first = first or graph
        if positions_of(graph) != positions_of(first):
            raise TaskError(
                f"Graph {number} has {n_pos} tokens, the first graph {len(first.tokens)}"
                if n_pos != len(first.tokens)
                else f"The positions of Graph {number} have other names than those of the first graph",
                fix='align="end", or labels=[["bos", "subject", ...], ...]',
            )
        yield Aligned(graph, positions_of(graph), places)


def _labelled(graphs: Iterable[Graph], labels: Iterable[Sequence[str]]) -> Iterator[Aligned]:
    """Graphs with their labels."""
    for number, (graph, names) in enumerate(zip_longest(graphs, labels)):
        if graph is None or names is None:
            few, many = ("graph", "labels") if graph is None else ("labels", "graph")
            raise TaskError(
                f"There are {many} number {number} without {few}",
                fix="one list of labels per graph",
            )
        check_graph(graph, "union(graphs)")
        _check_labels(names, len(graph.tokens), f"Graph {number}")
        yield Aligned(graph, tuple(names), np.linspace(0, 1, len(names)))


def _check_labels(labels: Sequence[str], n_pos: int, name: str) -> None:
    """A text for every token, each once."""
    if isinstance(labels, str) or not isinstance(labels, Iterable):
        raise _no_labels(name, labels)
    if not all(isinstance(label, str) for label in labels):
        raise _no_labels(name, labels)
    if len(labels) != n_pos:
        raise TaskError(f"{name} has {n_pos} tokens and {len(labels)} labels")
    label, times = Counter(labels).most_common(1)[0]
    if times > 1:
        raise TaskError(
            f"{name} has the label {label!r} {times} times", fix=f"'{label} 1', '{label} 2'"
        )


def _no_labels(name: str, labels: object) -> TaskError:
    return TaskError(f"{name} has the labels {labels!r}", exists="lists of texts")
