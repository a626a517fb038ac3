"""Groups the similar features of an attribution graph by themselves.

1. Similarity of two features is the mean of up to three cosines: of decoder directions, of activations at
   the same token, of edges (``similarity.py``).
2. Average linkage (Sokal & Michener, 1958): the two groups with the largest mean similarity of their
   members are joined, until it falls below a threshold, or so many groups are left.
3. A group is called as all its members are, if they share a label, else as the most influential one.

The groups are a start, to be edited (``supernode_groups.py``). That features are alike says nothing about
what they do together: ``collapse`` and ablation do.

Cost: matrices ``[feature, feature]``, and a sort of their entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, count
from typing import Any

import numpy as np

from gemmascope_plugin.errors import (
    EmptySelectionError,
    GemmaScopeError,
    UnknownNameError,
    check_choice,
)
from gemmascope_plugin.graphs.graph import Graph
from gemmascope_plugin.graphs.graph_arrays import check_graph
from gemmascope_plugin.graphs.matching import positions_of
from gemmascope_plugin.graphs.supernode_groups import Supernodes
from gemmascope_plugin.models.gate import gate
from gemmascope_plugin.splice.check_saes import check_saes
from gemmascope_plugin.tracing.similarity import by_activation, by_decoder, by_edges

MEASURES = ("decoder", "activation", "edges")
MAX_FEATURES = 5000
"""Features between which all similarities fit into memory, 200 MB a matrix."""


@gate(graph=check_graph, dictionaries=check_saes)
def supernodes(
    graph: Graph,
    dictionaries: Any = None,
    *,
    n: int | None = None,
    threshold: float = 0.5,
    by: Sequence[str] | None = None,
) -> Supernodes:
    """Groups of at least two similar features; tokens, errors and targets stay alone.

    Args:
        graph: A pruned graph.
        dictionaries: Those that it was traced with, for ``decoder``.
        n: Into how many groups features are put, those of one feature counted; None for ``threshold``.
        threshold: Smallest mean similarity of two groups that are joined, in (0, 1].
        by: ``decoder``, ``activation``, ``edges``; None for all, the first if dictionaries are given.

    Returns:
        The groups, the most influential first.

    Raises:
        UnknownNameError: An unknown measure, a threshold or number that means nothing, a feature of a
            dictionary that was not given.
        EmptySelectionError: No measure, or ``decoder`` without dictionaries.
        GemmaScopeError: More features than fit into memory, or a graph that was collapsed.
    """
    measures = _measures(by, dictionaries)
    places = (graph.where("feature") & (graph.weights == 0)).nonzero()[0]
    _check(graph, len(places), n, threshold)
    if len(places) < 2:
        return Supernodes()
    parts = {
        "decoder": lambda: by_decoder(graph, places, dictionaries),
        "activation": lambda: by_activation(graph, places),
        "edges": lambda: by_edges(graph, places),
    }
    total = np.zeros((len(places), len(places)))
    for name in measures:
        total += parts[name]()
    numbers = _linked(total / len(measures), n, threshold)
    groups = [places[numbers == number] for number in np.unique(numbers)]
    groups = [own for own in groups if len(own) > 1]
    groups.sort(key=lambda own: -graph.influence[own].sum())
    return _named(graph, groups)


def _linked(similarity: np.ndarray, n: int | None, threshold: float) -> np.ndarray:
    """The group of each feature, by average linkage, ``[feature]``."""
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    # rounding must not make distances negative or different in both directions
    distance = np.clip(1 - (similarity + similarity.T) / 2, 0, None)
    np.fill_diagonal(distance, 0)
    tree = linkage(squareform(distance, checks=False), "average")
    if n is not None:
        return fcluster(tree, n, "maxclust")
    return fcluster(tree, 1 - threshold, "distance")


def _named(graph: Graph, groups: Sequence[np.ndarray]) -> Supernodes:
    """Groups with names that are there once."""
    names = positions_of(graph)
    found: dict[str, tuple[str, ...]] = {}
    for own in groups:
        best = graph.nodes.iloc[own[graph.influence[own].argmax()]]
        label = str(best["label"])
        more = (f"{label} @{names[best['pos']]}" + (f" ({i})" if i else "") for i in count())
        name = next(name for name in chain([label], more) if name not in found)
        found[name] = tuple(graph.nodes["id"].iloc[own])
    return Supernodes(found)


def _measures(by: Sequence[str] | None, dictionaries: Any) -> tuple[str, ...]:
    if by is None:
        return MEASURES if dictionaries is not None else MEASURES[1:]
    measures = (by,) if isinstance(by, str) else tuple(dict.fromkeys(by))
    for name in measures:
        check_choice("measure of similarity", name, MEASURES)
    if not measures:
        raise EmptySelectionError("by=() is no measure of similarity", exists=", ".join(MEASURES))
    if "decoder" in measures and dictionaries is None:
        raise EmptySelectionError(
            "Similarity by decoder needs the dictionaries",
            fix='supernodes(graph, transcoders), or by=("activation", "edges")',
        )
    return measures


def _check(graph: Graph, n_features: int, n: int | None, threshold: float) -> None:
    """Refuses what cannot be grouped.

    Raises:
        UnknownNameError: A threshold or number that means nothing.
        GemmaScopeError: Too many features, or a graph that was collapsed.
    """
    if not 0 < threshold <= 1:
        raise UnknownNameError(
            f"threshold={threshold} is no similarity", exists="similarities above 0, up to 1"
        )
    if n is not None and n < 1:
        raise UnknownNameError(f"n={n} is no number of groups", exists="numbers from 1")
    if "supernodes" in graph.metadata:
        raise GemmaScopeError(
            "The graph has grouped nodes already", fix="the graph before collapse"
        )
    if n_features > MAX_FEATURES:
        raise GemmaScopeError(
            f"The graph has {n_features} features; similarities of more than {MAX_FEATURES} do not "
            "fit into memory",
            fix="graph.prune()",
        )
