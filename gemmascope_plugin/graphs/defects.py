"""What makes tables and arrays an attribution graph; asked when one is read from a file or written.

1. Ids of nodes are texts, each there once; kinds are those that there are; all but biases have a
   position within the prompt, features and tokens an index, features and errors a site.
2. Weights and influence are finite, weights neither negative nor all zero; activations are finite, or not
   known (NaN).
3. Rows belong to nodes in ascending order, their entries come from earlier nodes (groups of nodes may
   reach each other both ways), and every effect is a finite number.

Cost: some passes over the columns and the entries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gemmascope_plugin.graphs.parts import KINDS, NODE_COLUMNS
from gemmascope_plugin.graphs.soundness import MAX_INDEX, MAX_LAYER

if TYPE_CHECKING:
    import pandas as pd

_TEXTS = ("id", "kind", "site", "label")
_WHOLE = {"layer": MAX_LAYER, "pos": None, "index": MAX_INDEX}
"""Columns of whole numbers from -1, and their ends; that of positions is the prompt's."""
SMALLEST_WEIGHT = 1e-30
"""What the weights of targets sum to at least; scores and influence divide by it."""


def node_defect(nodes: pd.DataFrame, n_tokens: int) -> str | None:
    """Why a table is not that of a graph's nodes; None if it is.

    Args:
        nodes: The table.
        n_tokens: Tokens of the prompt.
    """
    if missing := [name for name in NODE_COLUMNS if name not in nodes.columns]:
        return f"the column {missing[0]!r} is missing"
    for name in _TEXTS:
        if not all(isinstance(value, str) for value in nodes[name]):
            return f"the column {name!r} has entries that are not text"
    if not nodes["id"].is_unique:
        return f"the node {nodes.loc[nodes['id'].duplicated(), 'id'].tolist()[0]!r} is there twice"
    kind = nodes["kind"].to_numpy()
    if not set(kind) <= set(KINDS):
        return f"a node is of the kind {min(set(kind) - set(KINDS))!r}"
    return _number_defect(nodes, kind, n_tokens) or _site_defect(nodes, kind)


def _number_defect(nodes: pd.DataFrame, kind: np.ndarray, n_tokens: int) -> str | None:
    for name, end in _WHOLE.items():
        column, end = nodes[name].to_numpy(), n_tokens if end is None else end
        if column.dtype.kind != "i":
            return f"the column {name!r} has entries that are not whole numbers"
        bad = (column < -1) | (column >= end)
        if name == "pos":
            bad |= (column < 0) & (kind != "bias")
        elif name == "index":
            bad |= (column < 0) & np.isin(kind, ["token", "feature"])
        if bad.any():
            place = int(bad.argmax())
            return f"the {kind[place]} {nodes['id'].iloc[place]!r} has {name} {column[place]}"
    for name in ("activation", "weight", *(["influence"] if "influence" in nodes else [])):
        column = nodes[name].to_numpy()
        if column.dtype.kind != "f":
            return f"the column {name!r} has entries that are not numbers"
        bad = np.isinf(column) if name == "activation" else ~np.isfinite(column)
        if bad.any():
            place = int(bad.argmax())
            return f"the {kind[place]} {nodes['id'].iloc[place]!r} has {name} {column[place]}"
    weights = nodes["weight"].to_numpy()
    if (weights < 0).any() or not SMALLEST_WEIGHT < weights.sum() < 1 / SMALLEST_WEIGHT:
        return f"the weights of its nodes sum to {weights.sum()}: nothing in it is explained"
    return None


def _site_defect(nodes: pd.DataFrame, kind: np.ndarray) -> str | None:
    nowhere = np.isin(kind, ["feature", "error"]) & (nodes["site"] == "").to_numpy()
    if nowhere.any():
        place = int(nowhere.argmax())
        return f"the {kind[place]} {nodes['id'].iloc[place]!r} has no site"
    return None


def row_defect(
    n_nodes: int,
    rows: np.ndarray,
    indptr: np.ndarray,
    indices: np.ndarray,
    data: np.ndarray,
    *,
    grouped: bool,
) -> str | None:
    """Why arrays are not the compressed rows of a graph; None if they are.

    Args:
        n_nodes: How many nodes there are.
        rows: The node of each row.
        indptr: Where each row begins among the entries.
        indices: The node that each entry comes from.
        data: The effects.
        grouped: Whether nodes may reach each other both ways.
    """
    wholes = (rows, indptr, indices)
    if any(array.ndim != 1 for array in (*wholes, data)):
        return "an array of the rows has several axes"
    if any(array.dtype.kind != "i" for array in wholes) or data.dtype.kind != "f":
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
