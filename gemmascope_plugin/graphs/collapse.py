"""One node for each group of nodes of an attribution graph, with the influence that its members have.

With ``I`` the influence of nodes, ``w`` their weights, ``T = I + w`` and ``Abar`` the absolute matrix,
each row divided by its sum (``pruning.py``), for groups ``G`` and ``S`` of which single nodes are some:

1. ``influence``: ``F_GS = sum_{i in G} T_i sum_{s in S} Abar_is`` is the influence that flows from ``G``
   to ``S``; divided by ``T_G = sum_i T_i`` it is the mean of the members' normalised rows, weighted by
   their influence. An edge has the sign of that sum over signed effects, and a row is scaled by the
   absolute sum of its members' rows: edges between single nodes stay what they are.
2. ``effects``: signed direct effects are summed over members on both sides; a row sums to the sum of its
   members' pre-activations, if the graph is whole and no member reaches another.
3. Edges within a group are left out.

By 1. ``sum_G T_G F_GS / T_G = sum_{s in S} I_s``: a group's influence is the sum of its members', less
what flows between them; all others keep theirs. Groups that lead into each other both ways are not
an exception (``adjacency.py``). By 2. influence is another: effects that cancel count less.

Cost: one pass over the entries and a sort of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from gemmascope_plugin.errors import GemmaScopeError, check_choice
from gemmascope_plugin.graphs.adjacency import MIN_SUM, Adjacency, rows_of
from gemmascope_plugin.graphs.combine import activations_of
from gemmascope_plugin.graphs.graph import Graph
from gemmascope_plugin.graphs.node import table_columns

if TYPE_CHECKING:
    import pandas as pd

Edges = Literal["influence", "effects"]
"""What an edge between groups is."""
GROUPABLE = ("feature", "error")
"""Kinds of nodes that can be in a group, unless they are targets."""


def collapse(
    graph: Graph, groups: Mapping[str, Sequence[str]], edges: Edges = "influence"
) -> Graph:
    """The graph with one node per group.

    A group stands where its most influential member does, with that one's ``site``, ``layer``, ``pos``
    and ``index``, the group's name as label and ``group:`` and the name as id; activations are summed,
    and ``members`` says how many there are. ``edges`` is ``influence`` for edges by which groups have
    their members' influence, ``effects`` for sums of signed direct effects.
    """
    check_choice("sort of edges", edges, ("influence", "effects"))
    if "supernodes" in graph.metadata:
        raise GemmaScopeError(
            "The graph has grouped nodes already", fix="the graph before collapse"
        )
    members = {name: np.array([graph.find(i) for i in ids]) for name, ids in groups.items()}
    for name, places in members.items():
        check_members(graph, name, places)
    importance = graph.influence + graph.weights
    stands = np.arange(len(graph.nodes))
    for places in members.values():
        stands[places] = places[importance[places].argmax()]
    is_left = stands == np.arange(len(stands))
    at = (np.cumsum(is_left) - 1)[stands]
    matrix = _matrix(graph, at, importance, edges)
    nodes = _table(graph, members, stands).loc[is_left].reset_index(drop=True)
    named = {name: tuple(ids) for name, ids in groups.items()}
    details = {**graph.metadata, "supernodes": named, "group_edges": edges}
    return replace(graph, columns=table_columns(nodes), edges=matrix, metadata=details)


def check_members(graph: Graph, name: str, places: np.ndarray) -> None:
    """Refuses nodes that cannot be a group."""
    rows, kinds = graph.nodes.iloc[places], set(graph.nodes["kind"].iloc[places])
    for node, kind, weight in zip(rows["id"], rows["kind"], rows["weight"], strict=True):
        if kind not in GROUPABLE or weight:
            sort = "target" if weight else kind
            raise GemmaScopeError(
                f"The group {name!r} has the {sort} {node!r}",
                exists="groups of features, or of errors, that are not targets",
            )
    if len(kinds) > 1:
        raise GemmaScopeError(f"The group {name!r} has features and errors", fix="a group of each")
    is_explained = graph.rows.row_of[places] >= 0
    if is_explained.any() and not is_explained.all():
        missing = rows["id"].iloc[int(is_explained.argmin())]
        raise GemmaScopeError(
            f"The group {name!r} has {int(is_explained.sum())} nodes that the graph explains and "
            f"{int((~is_explained).sum())} that it does not, such as {missing!r}",
            fix="a group of each, or trace(..., max_feature_nodes=None)",
        )


def _matrix(graph: Graph, at: np.ndarray, importance: np.ndarray, edges: Edges) -> Adjacency:
    """Edges between groups."""
    matrix, explained = graph.rows.matrix, graph.rows.nodes
    n, counts = int(at.max()) + 1, np.diff(matrix.indptr)
    effects = matrix.data.astype(np.float64)
    row, column = np.repeat(at[explained], counts), at[matrix.indices]
    cells, place = np.unique(row * n + column, return_inverse=True)
    if edges == "effects":
        values = np.bincount(place, effects, len(cells))
    else:
        values = _flows(graph, at, importance, effects, place, len(cells), cells // n)
    row, column = cells // n, cells % n
    is_edge = (row != column) & (values != 0)
    row, column, values = row[is_edge], column[is_edge], values[is_edge]
    rows = np.unique(at[explained])
    ends = np.searchsorted(row, np.append(rows, n))
    data = values.astype(matrix.dtype)
    return Adjacency.in_any_order(rows_of(data, column, ends, (len(rows), n)), rows)


def _flows(
    graph: Graph,
    at: np.ndarray,
    importance: np.ndarray,
    effects: np.ndarray,
    place: np.ndarray,
    n_cells: int,
    row: np.ndarray,
) -> np.ndarray:
    """Signed mean normalised effects, in units of effects, one per pair of groups.

    Every entry belongs to the pair ``place``; ``row`` is the group that a pair leads to.
    """
    matrix, nodes = graph.rows.matrix, graph.rows.nodes
    counts = np.diff(matrix.indptr)
    counted = ~graph.where("bias")[matrix.indices]
    entry_row = np.repeat(np.arange(len(nodes)), counts)
    sizes = np.bincount(entry_row, np.abs(effects) * counted, len(nodes))
    sizes = np.maximum(sizes, MIN_SUM)
    weight = importance[nodes]
    # members of a group without influence count alike
    idle = np.bincount(at[nodes], weight)[at[nodes]] == 0
    weight = np.where(idle, 1.0, weight)
    scale = np.bincount(at[nodes], sizes) / np.maximum(np.bincount(at[nodes], weight), 1e-300)
    shares = np.repeat(weight / sizes, counts) * effects
    signed = np.bincount(place, shares, n_cells)
    flow = np.bincount(place, np.abs(shares) * counted, n_cells)
    # biases have no influence, so no flow either
    of_bias = np.bincount(place, ~counted, n_cells) > 0
    return scale[row] * np.where(of_bias, signed, np.copysign(flow, signed))


def _table(graph: Graph, members: Mapping[str, np.ndarray], stands: np.ndarray) -> pd.DataFrame:
    """The table, in which the node that a group stands for describes it."""
    nodes = graph.nodes.assign(members=1)
    for name, places in members.items():
        first = nodes.index[stands[places[0]]]
        rows = graph.nodes.iloc[places]
        new = {"id": f"group:{name}", "label": name, "members": len(places)}
        new |= {column: rows[column].sum(skipna=False) for column in activations_of(graph)}
        if "influence" in rows:
            # it is small for what is important
            new["influence"] = rows["influence"].min()
        for column, value in new.items():
            nodes.at[first, column] = value
    return nodes
