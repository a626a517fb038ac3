"""A running sum of attribution graphs whose nodes are matched by name, and the mean that comes of it.

1. A graph's nodes get common numbers, its matrix is added to the sum, its activations and weights to
   theirs; of the graph itself nothing is kept.
2. Last, everything is divided by the number of graphs and put in the order of the pass; positions stand
   where prompts have them on average.

Cost: per graph one pass over its entries and those of the sum; memory for the sum and one graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gemmascope_plugin.errors import EmptySelectionError
from gemmascope_plugin.graphs.graph import Graph
from gemmascope_plugin.graphs.graph_arrays import table_columns
from gemmascope_plugin.graphs.matching import (
    KEPT,
    PRUNED,
    Joint,
    Targets,
    activations_of,
    check_alike,
    either,
    in_order,
    keyed,
    largest_gap,
    pass_order,
    spread,
    sums_hold,
)

if TYPE_CHECKING:
    import pandas as pd


class GraphSum:
    """The sum of the graphs so far.

    Args:
        targets: How targets are known.
    """

    def __init__(self, targets: Targets) -> None:
        self.first: Graph | None = None
        self.n_graphs = 0
        self._targets: Targets = targets
        self._joint = Joint()
        self._matrix: Any = None
        self._columns: dict[str, np.ndarray] = {}
        self._places: dict[str, list[float]] = {}
        """Where each named position stands in each graph; names are numbered as they come."""
        self._words: dict[str, dict[str, None]] = {}
        """Different words of tokens and targets, by key."""
        self._prompts: list[str] = []
        self._sums_hold = True

    def add(self, graph: Graph, names: Sequence[str], places: np.ndarray) -> None:
        """One graph more.

        Args:
            graph: The graph.
            names: Of its positions, ``[pos]``.
            places: Where these stand beside those of other graphs, ``[pos]``.

        Raises:
            TaskError: Another model, or other dictionaries.
            GemmaScopeError: Its nodes are groups.
        """
        self.first = self.first or graph
        check_alike(graph, self.first, f"Graph {self.n_graphs}")
        for name, place in zip(names, places.tolist(), strict=True):
            self._places.setdefault(name, []).append(place)
        numbers = {name: number for number, name in enumerate(self._places)}
        # -1 is the position of biases, and the last of these
        pos = np.array([*(numbers[name] for name in names), -1])[graph.nodes["pos"]]
        frame = keyed(graph, names, self._targets).assign(pos=pos)
        self._note_words(frame)
        at = self._joint.places(frame)
        self._add_columns(graph, at)
        part = spread(graph.rows, at, len(self._joint))
        if self._matrix is not None:
            self._matrix.resize(part.shape)
            part = self._matrix + part
        self._matrix = part
        self._prompts.append(str(graph.metadata.get("prompt", "".join(graph.tokens))))
        self._sums_hold &= sums_hold(graph)
        self.n_graphs += 1

    def _note_words(self, frame: pd.DataFrame) -> None:
        own = frame[frame["kind"].isin(["token", "target"])]
        for key, word in zip(own["key"], own["label"], strict=True):
            self._words.setdefault(key, {})[word] = None

    def _add_columns(self, graph: Graph, at: np.ndarray) -> None:
        rows, n = graph.rows.nodes, len(self._joint)
        added = {"count": (at, 1.0), "explained": (at[rows], 1.0), "weight": (at, graph.weights)}
        added["row sum"] = (at[rows], graph.nodes["activation"].to_numpy()[rows])
        for name in activations_of(graph):
            added[name] = (at, graph.nodes[name].to_numpy())
        for name, (places, values) in added.items():
            known = self._columns.get(name, np.zeros(0))
            known = np.pad(known, (0, n - len(known)))
            # a graph has every node once
            known[places] += values
            self._columns[name] = known

    def mean(self, min_share: float, align: str) -> Graph:
        """The mean graph.

        Args:
            min_share: Features and errors in a smaller share of the graphs are left out.
            align: How positions were named: ``position``, ``end`` or ``labels``.

        Raises:
            EmptySelectionError: No feature and no error is left.
        """
        assert self.first is not None, "there is a graph"
        columns, n, metadata = self._columns, self.n_graphs, self.first.metadata
        nodes, names = self._table(align)
        order = pass_order(nodes)
        nodes = nodes.iloc[order].reset_index(drop=True)
        edges = in_order(self._matrix / n, columns["explained"] > 0, order)
        sums = (columns["row sum"] / n)[order][edges.nodes]
        whole = self._sums_hold and not min_share
        gap = largest_gap(edges, sums, float(np.abs(sums).max(initial=0))) if whole else math.nan
        kept = _occurring(nodes, min_share)
        details = {
            **{name: metadata[name] for name in (*KEPT, *PRUNED) if name in metadata},
            "prompts": tuple(self._prompts),
            "n_graphs": n,
            "align": align,
            "positions": names,
            "min_occurrence": min_share,
            "residual": gap,
        }
        tokens = names if align == "labels" else self._tokens(names)
        nodes = nodes[kept].reset_index(drop=True)
        return Graph(table_columns(nodes), edges.compacted(kept), tokens, details)

    def _table(self, align: str) -> tuple[pd.DataFrame, tuple[str, ...]]:
        """The table in common numbers, and the names of positions in their order."""
        names = sorted(self._places, key=lambda name: float(np.mean(self._places[name])))
        place = {name: i for i, name in enumerate(names)}
        pos = np.array([*(place[name] for name in self._places), -1])
        nodes = self._joint.frame()
        columns, n = self._columns, self.n_graphs
        count = columns["count"].astype(np.int64)
        known = {name: columns[name] / n for name in columns if name.startswith("activation")}
        known |= {"weight": columns["weight"] / n, "pos": pos[nodes["pos"]]}
        explained = columns["explained"].astype(np.int64)
        counts = {"count": count, "share": count / n, "explained": explained}
        labels = [
            either([*self._words[key]]) if key in self._words else label
            for key, label in zip(nodes["key"], nodes["label"], strict=True)
        ]
        nodes = nodes.assign(**known, label=labels, **counts).drop(columns="key")
        if align == "labels":
            tokens = nodes["kind"] == "token"
            own = zip(nodes.loc[tokens, "pos"], nodes.loc[tokens, "label"], strict=True)
            nodes.loc[tokens, "label"] = [f"{names[pos]}: {words}" for pos, words in own]
        return nodes, tuple(names)

    def _tokens(self, names: Sequence[str]) -> tuple[str, ...]:
        return tuple(either([*self._words[f"token@{name}"]]) for name in names)


def _occurring(nodes: pd.DataFrame, min_share: float) -> np.ndarray:
    """True at nodes that stay, ``[node]``.

    Raises:
        EmptySelectionError: No feature and no error is left.
    """
    droppable = (nodes["kind"].isin(["feature", "error"]) & (nodes["weight"] == 0)).to_numpy()
    kept = ~droppable | (nodes["share"] >= min_share).to_numpy()
    if not (kept & droppable).any():
        raise EmptySelectionError(
            f"min_share={min_share} leaves no feature and no error of {len(nodes)} nodes",
            exists=f"nodes in up to {nodes.loc[droppable, 'share'].max():.2f} of the graphs",
            fix="a smaller min_share, or another alignment",
        )
    return kept
