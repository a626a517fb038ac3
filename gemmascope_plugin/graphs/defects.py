"""What makes columns of nodes and edges a graph; asked when one is built, read from a file or written.

1. Nodes are there, each once, of kinds that there are, at layers, positions and indices that a model and
   a prompt can have. Key-value heads of a layer come with all heads of the layer, in equal groups.
2. In a graph of a prompt, ids are unique texts, all nodes but biases have a position within the prompt,
   features and errors a site; weights are finite, neither negative nor all zero; activations are finite,
   or not known (NaN).
3. Edges lie between nodes that exist, through ports and at positions that exist, and are there once;
   compressed rows belong to ascending nodes, and their entries come from earlier ones, unless groups of
   nodes reach each other both ways. Every score is a finite number, and what is ranked is there.

Cost: some passes over the columns and the edges, and a sort of edges that are in no order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from gemmascope_plugin.graphs.adjacency import Adjacency, EdgeList
from gemmascope_plugin.graphs.node import (
    MAX_INDEX,
    MAX_LAYER,
    MAX_POS,
    PORTS,
    Node,
    NodeColumns,
    NodeKind,
    hook_of,
    is_hook_of,
    layer_of,
)

COMPONENT_COLUMNS = ("kind", "site", "layer", "pos", "index")
"""Columns that every graph has."""
TRACE_COLUMNS = ("id", *COMPONENT_COLUMNS, "activation", "weight", "label")
"""Columns that a graph of a prompt has."""
SMALLEST_WEIGHT = 1e-30
"""What the weights of targets sum to at least; scores and influence divide by it."""


class Parts(NamedTuple):
    """The fields of a ``Graph``, in its order."""

    columns: NodeColumns
    edges: Adjacency | EdgeList
    tokens: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = {}
    ranked: Literal["edge", "node"] | None = None


def find_defect(parts: Parts) -> str | None:
    """Why parts are not a graph; None if they are one."""
    defect = node_defect(parts.columns, len(parts.tokens))
    if defect is not None:
        return defect
    n_nodes, edges = len(parts.columns["kind"]), parts.edges
    if isinstance(edges, EdgeList):
        return list_defect(n_nodes, edges) or rank_defect(parts)
    if edges.n_nodes != n_nodes:
        return f"the rows have {edges.n_nodes} columns, and there are {n_nodes} nodes"
    return row_defect(
        n_nodes,
        edges.nodes,
        edges.matrix.indptr,
        edges.matrix.indices,
        edges.matrix.data,
        grouped="supernodes" in parts.metadata,
    )


def rank_defect(parts: Parts) -> str | None:
    """Whether what is ranked is missing."""
    if isinstance(parts.edges, Adjacency):
        return None
    n_edges, has_scores = parts.edges.n_edges, "score" in parts.columns
    if parts.ranked == "edge" and not n_edges:
        return "there are no edges to rank"
    if not has_scores and (parts.ranked == "node" or not n_edges):
        return f"there are {'no' if n_edges else 'neither edges nor'} scores of nodes"
    return None


# ------------------------------------------------------------------------------------------- nodes
def node_defect(columns: NodeColumns, n_tokens: int) -> str | None:
    """Why columns are not those of a graph's nodes; ``n_tokens`` is 0 for a graph of no prompt."""
    for name in TRACE_COLUMNS if n_tokens else COMPONENT_COLUMNS:
        if name not in columns:
            return f"the column {name!r} is missing"
    if not len(columns["kind"]):
        return "there are no nodes"
    for name in ("id", "kind", "site", "label", "meaning"):
        if not all(isinstance(value, str) for value in columns.get(name, ())):
            return f"the column {name!r} has entries that are not text"
    kind = columns["kind"]
    if unknown := set(kind) - {*get_args(NodeKind)}:
        return f"a node is of the kind {min(unknown)!r}"
    defect = _integer_defect(columns, n_tokens) or _number_defect(columns)
    return defect or _twice(columns) or (_site_defect if n_tokens else _hook_defect)(columns)


def _name(columns: NodeColumns, place: int) -> str:
    """``feature 'blocks.2.../17@3'`` where nodes have ids, else ``feature at 'blocks.2...'``."""
    kind = columns["kind"][place]
    if "id" in columns:
        return f"the {kind} {columns['id'][place]!r}"
    return f"the {kind} at {columns['site'][place][:80]!r}"


def _integer_defect(columns: NodeColumns, n_tokens: int) -> str | None:
    kind = columns["kind"]
    for name, end in {"layer": MAX_LAYER, "pos": n_tokens or MAX_POS, "index": MAX_INDEX}.items():
        column = columns[name]
        if column.dtype.kind != "i":
            return f"the column {name!r} has entries that are not whole numbers"
        bad = (column < -1) | (column >= end)
        if name == "pos" and n_tokens:
            bad |= (column < 0) & (kind != "bias")
        elif name == "index":
            has_index = np.isin(kind, ["token", "feature"]) if n_tokens else True
            bad |= (column < 0) & has_index
        if bad.any():
            place = int(bad.argmax())
            return f"{_name(columns, place)} has {name} {column[place]}"
    return None


def _number_defect(columns: NodeColumns) -> str | None:
    for name in ("activation", "weight", "influence", "score"):
        if name not in columns:
            continue
        column = columns[name]
        if column.dtype.kind != "f":
            return f"the column {name!r} has entries that are not numbers"
        bad = np.isinf(column) if name == "activation" else ~np.isfinite(column)
        if bad.any() and name == "score":
            return "a score is NaN or infinite"
        if bad.any():
            place = int(bad.argmax())
            return f"{_name(columns, place)} has {name} {column[place]}"
    if "weight" in columns:
        weights = columns["weight"]
        if (weights < 0).any() or not SMALLEST_WEIGHT < weights.sum() < 1 / SMALLEST_WEIGHT:
            return f"the weights of its nodes sum to {weights.sum()}: nothing in it is explained"
    return None


def _twice(columns: NodeColumns) -> str | None:
    names = ["id"] if "id" in columns else ["kind", "site", "index", "pos"]
    rows = zip(*(columns[name].tolist() for name in names), strict=True)
    rows, seen = list(rows), set()
    if len(set(rows)) == len(rows):
        return None
    if names != ["id"]:
        return "a node is there twice"
    twice = next(row for row in rows if row in seen or seen.add(row))
    return f"the node {twice[0]!r} is there twice"


def _site_defect(columns: NodeColumns) -> str | None:
    nowhere = np.isin(columns["kind"], ["feature", "error"]) & (columns["site"] == "")
    return f"{_name(columns, int(nowhere.argmax()))} has no site" if nowhere.any() else None


def _hook_defect(columns: NodeColumns) -> str | None:
    """Sites that are not those of components, and heads that do not go together."""
    names = [columns[name].tolist() for name in ("kind", "site", "layer")]
    for kind, site, layer in dict.fromkeys(zip(*names, strict=True)):
        node = Node(kind, hook_of(kind, site))
        if not is_hook_of(node):
            return f"{site[:80]!r} is not the hook of a {kind}"
        expected = layer_of(node)
        if layer != (-1 if expected is None else expected):
            return f"the {kind} at {site!r} has layer {layer}"
    heads = rows_of_layers(columns, "head")
    for layer, rows in rows_of_layers(columns, "kv").items():
        n, n_kv = len(heads[layer]), len(rows)
        if set(heads[layer]) != set(range(n)) or set(rows) != set(range(n_kv)) or n % n_kv or not n:
            return (
                f"layer {layer} has heads {sorted(heads[layer])} and key-value heads "
                f"{sorted(rows)}, which cannot share them"
            )
    return None


def rows_of_layers(columns: NodeColumns, kind: str) -> dict[int, dict[int, int]]:
    """Layer to head to place among the nodes."""
    rows: dict[int, dict[int, int]] = defaultdict(dict)
    places = np.flatnonzero(columns["kind"] == kind)
    for place, layer, index in zip(
        places.tolist(),
        columns["layer"][places].tolist(),
        columns["index"][places].tolist(),
        strict=True,
    ):
        rows[layer][index] = place
    return rows


# ------------------------------------------------------------------------------------------- edges
def list_defect(n_nodes: int, edges: EdgeList) -> str | None:
    """Why arrays are not edges between the nodes of a graph; None if they are."""
    arrays = {"target": edges.target, "weight": edges.weight, "port": edges.port, "pos": edges.pos}
    for name, array in arrays.items():
        if array is not None and array.shape != edges.source.shape:
            return f"the edges have {len(edges.source)} sources, and {name} is {array.shape}"
    if not np.isfinite(edges.weight).all():
        return "a score is NaN or infinite"
    if not edges.n_edges:
        return None
    for name, ends in (("source", edges.source), ("target", edges.target)):
        if int(ends.min()) < 0 or int(ends.max()) >= n_nodes:
            return f"the {name} of an edge is not among the {n_nodes} nodes"
    if edges.port is not None and int(edges.port.max()) >= len(PORTS):
        return f"an edge has port number {int(edges.port.max())}"
    if edges.pos is not None and (int(edges.pos.min()) < 0 or int(edges.pos.max()) >= MAX_POS):
        return f"an edge has a position outside 0 to {MAX_POS - 1}"
    if (edges.source == edges.target).any():
        return "an edge ends where it begins"
    keys = edges.source.astype(np.int64) * n_nodes + edges.target
    if edges.port is not None:
        keys = keys * len(PORTS) + edges.port
    if edges.pos is not None:
        keys = keys * (int(edges.pos.max()) + 1) + edges.pos
    steps = np.diff(keys)
    if (steps <= 0).any():
        steps = np.diff(np.sort(keys))
    return None if (steps > 0).all() else "an edge is there twice"


def row_defect(
    n_nodes: int,
    rows: np.ndarray,
    indptr: np.ndarray,
    indices: np.ndarray,
    data: np.ndarray,
    *,
    grouped: bool,
) -> str | None:
    """Why arrays are not the compressed rows of a graph; None if they are."""
    integers = (rows, indptr, indices)
    if any(array.ndim != 1 for array in (*integers, data)):
        return "an array of the rows has several axes"
    if any(array.dtype.kind != "i" for array in integers) or data.dtype.kind != "f":
        return "an array of the rows is of another type"
    if len(indptr) != len(rows) + 1 or len(indices) != len(data) or indptr[0] != 0:
        return "the lengths of the rows contradict one another"
    if indptr[-1] != len(data) or (np.diff(indptr) < 0).any():
        return "the rows do not add up to the entries"
    if (np.diff(rows) <= 0).any() or (rows < 0).any() or (rows >= n_nodes).any():
        return "the nodes of the rows are not ascending places"
    if (indices < 0).any():
        return "an edge comes from no node"
    targets = np.repeat(rows.astype(np.int64), np.diff(indptr))
    if (indices >= (n_nodes if grouped else targets)).any():
        return "an edge leads backwards"
    if (np.diff(targets * n_nodes + indices) <= 0).any():
        return "the entries of a row are not ascending"
    return None if np.isfinite(data).all() else "an edge is NaN or infinite"
