"""Weighted sums of attribution graphs, their nodes matched by name: ``union`` and ``contrast`` are two.

1. A node is known by kind, site, index and the *name* of its position: its number, or a word such as
   ``subject`` where prompts of several lengths are put together. Biases are known by their id, targets by
   token and position, or by their number where prompts have targets of their own.
2. Graphs that are put together are of one model and the same dictionaries, and all contrasts or none.
3. A graph's nodes get common numbers; its matrix times its weight is added to the sum,
   its activations and weights of targets to theirs. Of the graph itself nothing is kept, and ``count``
   and ``explained`` say how many graphs have a node, and a row for it.
4. Last, nodes are put in the order of the pass: tokens, biases, site by site features before errors,
   targets. So every source stands before what it reaches, as ``Adjacency`` wants it.

Cost: per graph a loop over its nodes, and one pass over its entries and those of the sum; memory for the
sum and one graph.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from gemmascope_plugin.errors import GemmaScopeError, TaskError
from gemmascope_plugin.graphs.adjacency import Adjacency, rows_of
from gemmascope_plugin.graphs.graph import Graph
from gemmascope_plugin.graphs.write_json import site_word

if TYPE_CHECKING:
    import pandas as pd
    import scipy.sparse as sp

Targets = Literal["label", "order"]
"""Whether targets are the same by token (or name) and position, or the n-th with the n-th."""
SHARED = (
    "model",
    "n_layers",
    "exclude",
    "logits",
    "dictionaries",
    "max_feature_nodes",
    "min_share",
)
"""Metadata that graphs of several prompts share."""
PRUNED = ("node_threshold", "edge_threshold")
"""Metadata that say that a graph is pruned."""
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


# ------------------------------------------------------------------------------------ same nodes
def positions_of(graph: Graph) -> tuple[str, ...]:
    """Names of the positions of a graph: their numbers, unless ``union`` gave others."""
    return tuple(graph.metadata.get("positions", map(str, range(len(graph.tokens)))))


def activations_of(graph: Graph) -> list[str]:
    """Columns of activations; a contrast has three."""
    return [name for name in graph.columns if name.startswith("activation")]


def is_whole(graph: Graph) -> bool:
    """Whether no node was left out: by pruning, or for occurring in too few graphs."""
    return "node_threshold" not in graph.metadata and not graph.metadata.get("min_occurrence")


def sums_hold(graph: Graph) -> bool:
    """Whether rows sum to pre-activations: no node or effect was left out, and biases are there."""
    is_known = math.isfinite(graph.metadata.get("residual", math.nan))
    return is_known and is_whole(graph) and bool(graph.where("bias").any())


def check_alike(graph: Graph, first: Graph, name: str) -> None:
    """Refuses graphs whose nodes do not mean the same; ``name`` is what an error calls the first."""
    if "supernodes" in graph.metadata:
        raise GemmaScopeError(
            f"{name} has grouped nodes, which match no node of another graph",
            fix="the graph before collapse(...)",
        )
    expected, model = first.metadata.get("model"), graph.metadata.get("model")
    if model != expected:
        raise TaskError(f"{name} is of the model {model!r}, the first graph of {expected!r}")
    before, after = dictionaries_of(first), dictionaries_of(graph)
    are_whole = is_whole(first) and is_whole(graph)
    for site in sorted({*before, *after}):
        old, new = before.get(site), after.get(site)
        # a site without nodes in a pruned graph may have a dictionary all the same
        if old != new and (are_whole or (old and new)):
            raise TaskError(
                f"{name} has other dictionaries than the first graph: at {site} "
                f"{_named(new)} and not {_named(old)}",
                exists=f"dictionaries at {', '.join(before)}",
                fix="trace all prompts with the same transcoders",
            )
    if activations_of(graph) != activations_of(first):
        raise TaskError(
            f"{name} has the columns {', '.join(activations_of(graph))}, the first graph "
            f"{', '.join(activations_of(first))}",
            fix="contrasts only, or graphs of single prompts only",
        )


def dictionaries_of(graph: Graph) -> dict[str, str]:
    """The dictionary at each site; empty text where a graph does not say which."""
    sites = graph.nodes.loc[graph.nodes["site"] != "", "site"].unique()
    return {**dict.fromkeys(map(str, sites), ""), **graph.metadata.get("dictionaries", {})}


def _named(dictionary: str | None) -> str:
    return "none" if dictionary is None else dictionary or "one without a name"


def keyed(graph: Graph, names: Sequence[str], targets: Targets) -> pd.DataFrame:
    """The nodes with ``key``, what they are known by, and ids that say the names of positions."""
    columns = [graph.nodes[name] for name in ("id", "kind", "site", "index", "pos")]
    ids = [_id(names, *row) for row in zip(*columns, strict=True)]
    keys = np.array(ids, dtype=object)
    if targets == "order":
        last = graph.where("target").nonzero()[0]
        keys[last] = [f"target {number}" for number in range(len(last))]
    return graph.nodes.drop(columns="influence", errors="ignore").assign(id=ids, key=keys)


def _id(names: Sequence[str], old: str, kind: str, site: str, index: int, pos: int) -> str:
    if kind == "bias":
        return old
    if kind == "target":
        # by their numbers: two tokens may look alike
        stem = f"target:logit:{index}" if index >= 0 else old.rpartition("@")[0] or old
        return f"{stem}@{names[pos]}"
    stem = {"token": "token", "feature": f"{site}/{index}", "error": f"{site}/error"}[kind]
    return f"{stem}@{names[pos]}"


def either(texts: Sequence[str]) -> str:
    """Different texts as one: the first three of them."""
    different = list(dict.fromkeys(text.strip() or repr(text) for text in texts))
    if len(different) == 1:
        return texts[0]
    return " | ".join(different[:3]) + (" | ..." if len(different) > 3 else "")
