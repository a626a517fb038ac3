"""Weighted sums of attribution graphs, their nodes matched by name: ``union`` and ``contrast`` are two.

1. A graph's nodes get common numbers (``matching.py``); its matrix times its weight is added to the sum,
   its activations and weights of targets to theirs. Of the graph itself nothing is kept, and ``count``
   and ``explained`` say how many graphs have a node, and a row for it.
2. Last, nodes are put in the order of the pass: tokens, biases, site by site features before errors,
   targets. So every source stands before what it reaches, as ``Adjacency`` wants it.

Cost: per graph a loop over its nodes, and one pass over its entries and those of the sum; memory for the
sum and one graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gemmascope_plugin.graphs.adjacency import Adjacency, rows_of
from gemmascope_plugin.graphs.graph import Graph
from gemmascope_plugin.graphs.matching import Targets, activations_of, check_alike, keyed, sums_hold
from gemmascope_plugin.graphs.write_json import site_word

if TYPE_CHECKING:
    import pandas as pd
    import scipy.sparse as sp

_STAGES = {"att": 0, "mlp": 1, "res": 2}
"""Order of the sites of a layer in a pass."""


class Aligned(NamedTuple):
    """A graph and its positions beside those of other graphs."""

    graph: Graph
    names: Sequence[str]
    """Of its positions, ``[pos]``."""
    places: np.ndarray
    """Where these stand, ``[pos]``."""


class GraphSum:
    """The weighted sum of the graphs so far, in common numbers of nodes."""

    def __init__(self, targets: Targets) -> None:
        self.first: Graph | None = None
        self.n_graphs = 0
        self.matrix: Any = None
        """``scipy.sparse.csr_array [node, node]``."""
        self.columns: dict[str, np.ndarray] = {}
        """Sums of ``weight``, activations and ``row sum``; numbers of graphs, ``count, explained``."""
        self.positions: dict[str, list[float]] = {}
        """Where each named position stands in each graph; names are numbered as they come."""
        self.words: dict[str, dict[str, None]] = {}
        """Different words of tokens and targets, by key."""
        self.prompts: list[str] = []
        self.sums_hold = True
        """Whether rows sum to what they explain in every graph."""
        self._targets: Targets = targets
        self._numbers: dict[str, int] = {}
        """Common number of each node, by key."""
        self._frames: list[pd.DataFrame] = []

    def __len__(self) -> int:
        return len(self._numbers)

    def add(self, part: Aligned, weight: float) -> None:
        """Adds a graph times a weight."""
        graph, names, places = part
        self.first = self.first or graph
        check_alike(graph, self.first, f"Graph {self.n_graphs}")
        for name, place in zip(names, places.tolist(), strict=True):
            self.positions.setdefault(name, []).append(place)
        numbers = {name: number for number, name in enumerate(self.positions)}
        # -1 is the position of biases, and the last of these
        pos = np.array([*(numbers[name] for name in names), -1])[graph.columns["pos"]]
        frame = keyed(graph, names, self._targets).assign(pos=pos)
        self._note_words(frame)
        at = self._common(frame)
        self._add_columns(graph, at, weight)
        matrix = self._spread(graph.rows, at, weight)
        if self.matrix is not None:
            self.matrix.resize(matrix.shape)
            matrix = self.matrix + matrix
        self.matrix = matrix
        self.prompts.append(str(graph.metadata.get("prompt", "".join(graph.tokens))))
        self.sums_hold &= sums_hold(graph)
        self.n_graphs += 1

    def places_of(self, frame: pd.DataFrame) -> np.ndarray:
        """Common number of each node of a graph that was added, from what ``keyed`` gives."""
        return np.array([self._numbers[key] for key in frame["key"]], dtype=int)

    def _note_words(self, frame: pd.DataFrame) -> None:
        rows = frame[frame["kind"].isin(["token", "target"])]
        for key, word in zip(rows["key"], rows["label"], strict=True):
            self.words.setdefault(key, {})[word] = None

    def _common(self, frame: pd.DataFrame) -> np.ndarray:
        """Common number of each node of a graph; new nodes get new ones."""
        n_before, numbers = len(self), self._numbers
        at = np.array([numbers.setdefault(key, len(numbers)) for key in frame["key"]], dtype=int)
        self._frames.append(frame.loc[at >= n_before])
        return at

    def _add_columns(self, graph: Graph, at: np.ndarray, weight: float) -> None:
        rows = graph.rows.nodes
        values: dict[str, tuple[np.ndarray, Any]] = {
            "count": (at, 1.0),
            "explained": (at[rows], 1.0),
        }
        values["weight"] = at, weight * graph.weights
        values["row sum"] = at[rows], weight * graph.columns["activation"][rows]
        values |= {name: (at, weight * graph.columns[name]) for name in activations_of(graph)}
        for name, (nodes, added) in values.items():
            column = self.columns.get(name, np.zeros(0))
            column = np.pad(column, (0, len(self) - len(column)))
            # a graph has every node once
            column[nodes] += added
            self.columns[name] = column

    def _spread(self, edges: Adjacency, at: np.ndarray, weight: float) -> Any:
        import scipy.sparse as sp

        matrix = edges.matrix
        cells = (np.repeat(at[edges.nodes], np.diff(matrix.indptr)), at[matrix.indices])
        return sp.csr_array((weight * matrix.data, cells), shape=(len(self), len(self)))

    def table(self) -> pd.DataFrame:
        """Every node as it first came, ``key`` included."""
        import pandas as pd

        return pd.concat([frame for frame in self._frames if len(frame)], ignore_index=True)

    def edges(self, matrix: sp.csr_array, is_explained: np.ndarray, order: np.ndarray) -> Adjacency:
        """Rows of explained nodes, all nodes put in an order; those that it lacks are left out."""
        cut = matrix[order[is_explained[order]]][:, order]
        cut.eliminate_zeros()
        cut.sort_indices()
        return Adjacency(
            rows_of(cut.data, cut.indices, cut.indptr, cut.shape), is_explained[order].nonzero()[0]
        )


def combine(graphs: Iterable[Aligned], weights: Iterable[float], targets: Targets) -> GraphSum:
    """``sum_i w_i graph_i``; weights may be more than there are graphs."""
    total = GraphSum(targets)
    for part, weight in zip(graphs, weights, strict=False):
        total.add(part, weight)
    return total


def pass_order(nodes: pd.DataFrame) -> np.ndarray:
    """Places of the nodes of a table in the order of the pass, ``[node]``."""
    kinds = nodes["kind"].map({"token": 0, "bias": 1, "feature": 2, "error": 2, "target": 3})
    inner = (kinds == 2).to_numpy()
    stages = {site: _STAGES[site_word(site)] for site in nodes.loc[inner, "site"].unique()}
    stage = nodes["site"].where(inner, "").map({"": 0, **stages}).to_numpy()
    layer = np.where(inner, nodes["layer"], 0)
    # biases and targets keep the order in which they came
    pos = np.where(inner | (kinds == 0).to_numpy(), nodes["pos"], 0)
    index = np.where(inner, nodes["index"], 0)
    errors = (nodes["kind"] == "error").to_numpy()
    return np.lexsort((index, pos, errors, stage, layer, kinds.to_numpy()))


def largest_gap(edges: Adjacency, values: np.ndarray, scale: float) -> float:
    """Largest difference between a row's sum and what it explains, as a share of ``scale``."""
    sums = np.asarray(edges.matrix.sum(1)).ravel()
    return float(np.abs(sums - values).max(initial=0) / max(scale, 1e-30))
