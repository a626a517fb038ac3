"""Which nodes of several attribution graphs are the same, and their matrices in common numbers.

1. A node is known by kind, site, index and the *name* of its position: its number, or a word such as
   ``subject`` where prompts of several lengths are put together. Biases are known by their id, targets by
   token and position, or by their number where prompts have targets of their own.
2. Nodes get common numbers as graphs come; a matrix is spread over these.
3. Last, nodes are put in the order of the pass: tokens, biases, site by site features before errors,
   targets. So every source stands before what it reaches, as ``Adjacency`` wants it.

Cost: a loop over the nodes; matrices stay sparse.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from gemmascope_plugin.errors import GemmaScopeError, TaskError
from gemmascope_plugin.graphs.adjacency import Adjacency, rows_of
from gemmascope_plugin.graphs.graph import Graph
from gemmascope_plugin.graphs.write_json import site_word

if TYPE_CHECKING:
    import pandas as pd

Targets = Literal["label", "order"]
"""Whether targets are the same by token (or name) and position, or the n-th with the n-th."""
_STAGES = {"att": 0, "mlp": 1, "res": 2}
"""Order of the sites of a layer in a pass."""
KEPT = ("model", "n_layers", "exclude", "logits", "dictionaries", "max_feature_nodes", "min_share")
"""Metadata that graphs of several prompts share."""
PRUNED = ("node_threshold", "edge_threshold")
"""Metadata that say that a graph is pruned."""


def positions_of(graph: Graph) -> tuple[str, ...]:
    """Names of the positions of a graph: their numbers, unless ``union`` gave others."""
    return tuple(graph.metadata.get("positions", map(str, range(len(graph.tokens)))))


def activations_of(graph: Graph) -> list[str]:
    """Columns of activations; a contrast has three."""
    return [name for name in graph.nodes.columns if name.startswith("activation")]


def is_whole(graph: Graph) -> bool:
    """Whether no node was left out: by pruning, or for occurring in too few graphs."""
    return "node_threshold" not in graph.metadata and not graph.metadata.get("min_occurrence")


def sums_hold(graph: Graph) -> bool:
    """Whether rows sum to pre-activations: no node or effect was left out, and biases are there."""
    known = math.isfinite(graph.metadata.get("residual", math.nan))
    return known and is_whole(graph) and bool(graph.where("bias").any())


def check_alike(graph: Graph, first: Graph, name: str) -> None:
    """Refuses graphs whose nodes do not mean the same.

    Args:
        graph: One of them.
        first: The first one.
        name: What it is called in an error.

    Raises:
        TaskError: Another model, other dictionaries, or a contrast beside graphs that are none.
        GemmaScopeError: Its nodes are groups.
    """
    if "supernodes" in graph.metadata:
        raise GemmaScopeError(
            f"{name} has grouped nodes, which match no node of another graph",
            fix="the graph before collapse(...)",
        )
    model, own = first.metadata.get("model"), graph.metadata.get("model")
    if own != model:
        raise TaskError(f"{name} is of the model {own!r}, the first graph of {model!r}")
    expected, given = dictionaries_of(first), dictionaries_of(graph)
    whole = is_whole(first) and is_whole(graph)
    for site in sorted({*expected, *given}):
        one, other = expected.get(site), given.get(site)
        # a site without nodes in a pruned graph may have a dictionary all the same
        if one != other and (whole or (one and other)):
            raise TaskError(
                f"{name} has other dictionaries than the first graph: at {site} "
                f"{_named(other)} and not {_named(one)}",
                exists=f"dictionaries at {', '.join(expected)}",
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
    """The nodes with ``key``, what they are known by, and ids that say the names of positions.

    Args:
        graph: The graph.
        names: Of its positions, ``[pos]``.
        targets: How targets are known.
    """
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


class Joint:
    """Nodes of several graphs in common numbers, in the order in which they came."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {}
        self._frames: list[pd.DataFrame] = []

    def __len__(self) -> int:
        return len(self._places)

    def places(self, frame: pd.DataFrame) -> np.ndarray:
        """Common number of each node of a graph; new nodes get new ones.

        Args:
            frame: What :func:`keyed` gives.
        """
        known, table = len(self), self._places
        found = np.array([table.setdefault(key, len(table)) for key in frame["key"]], dtype=int)
        self._frames.append(frame.loc[found >= known])
        return found

    def frame(self) -> pd.DataFrame:
        """Every node as it first came, ``key`` included."""
        import pandas as pd

        return pd.concat([frame for frame in self._frames if len(frame)], ignore_index=True)


def pass_order(nodes: pd.DataFrame) -> np.ndarray:
    """Places of nodes in the order of the pass, ``[node]``.

    Args:
        nodes: The table.

    Raises:
        GemmaScopeError: A site that is no place of a trace.
    """
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


def spread(edges: Adjacency, places: np.ndarray, n_nodes: int) -> Any:
    """The matrix in common numbers, ``scipy.sparse.csr_array [node, node]``.

    Args:
        edges: Of one graph.
        places: Common number of each of its nodes.
        n_nodes: How many there are in common.
    """
    import scipy.sparse as sp

    matrix = edges.matrix
    rows = np.repeat(places[edges.nodes], np.diff(matrix.indptr))
    cells = (rows, places[matrix.indices])
    return sp.csr_array((matrix.data, cells), shape=(n_nodes, n_nodes))


def in_order(matrix: Any, explained: np.ndarray, order: np.ndarray) -> Adjacency:
    """Rows of explained nodes, all nodes put in an order.

    Args:
        matrix: ``[node, node]`` in common numbers.
        explained: True at nodes with a row, ``[node]``.
        order: Common number of each place; nodes that are not in it are left out.
    """
    cut = matrix[order[explained[order]]][:, order]
    cut.eliminate_zeros()
    cut.sort_indices()
    return Adjacency(
        rows_of(cut.data, cut.indices, cut.indptr, cut.shape), explained[order].nonzero()[0]
    )


def largest_gap(edges: Adjacency, values: np.ndarray, scale: float) -> float:
    """Largest difference between a row's sum and what it explains, as a share of ``scale``."""
    sums = np.asarray(edges.matrix.sum(1)).ravel()
    return float(np.abs(sums - values).max(initial=0) / max(scale, 1e-30))


def either(texts: Sequence[str]) -> str:
    """Different texts as one: the first three of them."""
    different = list(dict.fromkeys(text.strip() or repr(text) for text in texts))
    if len(different) == 1:
        return texts[0]
    return " | ".join(different[:3]) + (" | ..." if len(different) > 3 else "")
