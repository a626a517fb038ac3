"""Features of an attribution graph: groups of similar ones, and the words that each writes towards.

Groups are found by average linkage (Sokal & Michener, 1958):

1. Similarity of two features is the mean of up to three cosines:
   ``decoder``, of what they write, all layers that a feature writes to together. Features that write to
   ``z`` of different layers, or to ``z`` and to the stream, cannot be compared and count 0;
   ``activation``, 0 for nodes at different tokens, else of the activations of the two features over all
   tokens where the graph has them: 1 for those that are active at this token only;
   ``edges``, the mean of two cosines, of what reaches them and of what they reach, signed.
2. The two groups with the largest mean similarity of their members are joined, until it falls below a
   threshold, or so many groups are left. A group is called as all its members are, if they share a label,
   else as the most influential one.
3. The groups are a start, to be edited (``supernode_groups.py``). That features are alike says nothing
   about what they do together: ``collapse`` and ablation do.

Words are read off a feature's direction by the unembedding (``features/top_words.py``): the sum of its
decoder rows over all layers that it writes to, those of attention dictionaries through ``W_O`` and the
gain of the norm behind it. They say what a feature does to logits directly, not through later layers: of
early features they say little.

Cost: of groups matrices ``[feature, feature]``, three at a time, and a sort of their entries; of words
one multiplication with the unembedding for all features of the graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from itertools import chain, count
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int64

import gemmascope_plugin.figures as figures
from gemmascope_plugin.errors import (
    EmptySelectionError,
    GemmaScopeError,
    UnknownNameError,
    check_choice,
)
from gemmascope_plugin.features.analyze import TopWords, top_words
from gemmascope_plugin.graphs.combine import positions_of
from gemmascope_plugin.graphs.frames import SHOWN
from gemmascope_plugin.graphs.graph import Graph
from gemmascope_plugin.graphs.graph_arrays import check_graph
from gemmascope_plugin.graphs.supernode_groups import Supernodes
from gemmascope_plugin.models.anatomy import Anatomy
from gemmascope_plugin.models.gate import gate
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.splice.hooked_sae import Saes, as_list, check_saes
from gemmascope_plugin.tracing.linear.trace_site import TraceSite, hooked_of, trace_sites

if TYPE_CHECKING:
    import pandas as pd
    from scipy.sparse import csr_array

Square = Float[np.ndarray, "feature feature"]
MEASURES = ("decoder", "activation", "edges")
MAX_FEATURES = 5000
"""Features between which all similarities fit into memory, 200 MB a matrix."""


@gate(graph=check_graph, saes=check_saes)
def supernodes(
    graph: Graph,
    saes: Saes | None = None,
    *,
    n: int | None = None,
    threshold: float = 0.5,
    by: Sequence[str] | None = None,
) -> Supernodes:
    """Groups of at least two similar features; tokens, errors and targets stay alone.

    Args:
        graph: A pruned graph.
        saes: Those that it was traced with, for ``decoder``.
        n: Into how many groups features are put, those of one feature counted; None for ``threshold``.
        threshold: Smallest mean similarity of two groups that are joined, in (0, 1].
        by: ``decoder``, ``activation``, ``edges``; None for all, the first if SAEs are given.

    Returns:
        The groups, the most influential first.

    Raises:
        UnknownNameError: An unknown measure, a threshold or number that means nothing, a feature of a
            dictionary that was not given.
        EmptySelectionError: No measure, or ``decoder`` without dictionaries.
        GemmaScopeError: More features than fit into memory, or a graph that was collapsed.

    Example:
        >>> suite = gs.tiny()
        >>> saes = [suite.load("transcoder", layer) for layer in range(4)]
        >>> graph = gs.trace(suite.model, "the capital of the state containing dallas is", saes)
        >>> gs.supernodes(graph.prune(0.7), saes)
        Supernodes(4 groups of 16 nodes: 'L1 211': 5, 'L2 27': 6, 'L2 151': 3, 'L1 502': 2)
    """
    measures = _measures(by, saes)
    places = (graph.where("feature") & (graph.weights == 0)).nonzero()[0]
    _check(graph, len(places), n, threshold)
    if len(places) < 2:
        return Supernodes()
    parts = {
        "decoder": lambda: by_decoder(graph, places, saes),
        "activation": lambda: by_activation(graph, places),
        "edges": lambda: by_edges(graph, places),
    }
    total = np.zeros((len(places), len(places)))
    for name in measures:
        total += parts[name]()
    numbers = _linked(total / len(measures), n, threshold)
    groups = [places[numbers == number] for number in np.unique(numbers)]
    groups = [group for group in groups if len(group) > 1]
    groups.sort(key=lambda group: -graph.influence[group].sum())
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
    nodes: dict[str, tuple[str, ...]] = {}
    for group in groups:
        best = graph.nodes.iloc[group[graph.influence[group].argmax()]]
        label = str(best["label"])
        more = (f"{label} @{names[best['pos']]}" + (f" ({i})" if i else "") for i in count())
        name = next(name for name in chain([label], more) if name not in nodes)
        nodes[name] = tuple(graph.nodes["id"].iloc[group])
    return Supernodes(nodes)


def _measures(by: Sequence[str] | None, saes: Saes | None) -> tuple[str, ...]:
    if by is None:
        return MEASURES if saes is not None else MEASURES[1:]
    measures = (by,) if isinstance(by, str) else tuple(dict.fromkeys(by))
    for name in measures:
        check_choice("measure of similarity", name, MEASURES)
    if not measures:
        raise EmptySelectionError(
            "by=() is not a measure of similarity", exists=", ".join(MEASURES)
        )
    if "decoder" in measures and saes is None:
        raise EmptySelectionError(
            "Similarity by decoder needs the dictionaries",
            fix='supernodes(graph, transcoders), or by=("activation", "edges")',
        )
    return measures


def _check(graph: Graph, n_features: int, n: int | None, threshold: float) -> None:
    """Refuses what cannot be grouped."""
    if not 0 < threshold <= 1:
        raise UnknownNameError(
            f"threshold={threshold} is not a similarity", exists="similarities above 0, up to 1"
        )
    if n is not None and n < 1:
        raise UnknownNameError(f"n={n} is not a number of groups", exists="numbers from 1")
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


def by_decoder(graph: Graph, places: np.ndarray, saes: Saes) -> Square:
    """Cosines of decoder directions."""
    rows = graph.nodes.iloc[places]
    similarity = np.zeros((len(rows), len(rows)))
    for features, directions in _directions(rows, saes).values():
        similarity[np.ix_(features, features)] = _cosines(directions)
    return similarity


def _directions(rows: pd.DataFrame, saes: Saes) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Numbers of features and what they write, for each space that is written to."""
    hooked = {
        site.name: (sae, place)
        for sae in (hooked_of(sae, ()) for sae in as_list(saes))
        for place, site in enumerate(sae.sites)
    }
    parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for label, numbers in rows.groupby("site").indices.items():
        name = str(label)
        if name not in hooked:
            raise _no_dictionary(name, hooked)
        sae, place = hooked[name]
        features = torch.from_numpy(rows["index"].to_numpy()[numbers])
        decoders = [site.decoder_from(place).detach() for site in sae.sites[place:]]
        vectors = [W_dec.index_select(0, features.to(W_dec.device)).float() for W_dec in decoders]
        space = name if name.endswith("hook_z") else "stream"
        parts.setdefault(space, []).append((numbers, sum(vectors[1:], vectors[0]).cpu().numpy()))
    return {
        space: (np.concatenate([n for n, _ in pairs]), np.concatenate([d for _, d in pairs]))
        for space, pairs in parts.items()
    }


def _no_dictionary(site: str, sites: Iterable[str]) -> UnknownNameError:
    return UnknownNameError(
        f"The graph has features of {site}, and no dictionary for it was given",
        exists=", ".join(sites),
    )


def by_activation(graph: Graph, places: np.ndarray) -> Square:
    """Cosines of activations over tokens, for nodes at one token."""
    features = graph.nodes[graph.where("feature")]
    numbers = features.groupby(["site", "index"]).ngroup()
    profiles = np.zeros((int(numbers.max()) + 1, len(graph.tokens)))
    profiles[numbers, features["pos"]] = features["activation"]
    pos = graph.nodes["pos"].to_numpy()[places]
    rows = numbers.loc[graph.nodes.index[places]].to_numpy()
    return _cosines(profiles[rows]) * (pos[:, None] == pos)


def by_edges(graph: Graph, places: np.ndarray) -> Square:
    """Means of the cosines of incoming and of outgoing edges."""
    matrix = graph.adjacency
    into, out = matrix[places], matrix[:, places].T.tocsr()
    return (_cosines(into) + _cosines(out)) / 2


def _cosines(rows: np.ndarray | csr_array) -> Square:
    """Of rows, dense or sparse; 0 for rows without entries."""
    products = rows @ rows.T
    dense = products if isinstance(products, np.ndarray) else products.toarray()
    products = dense.astype(np.float64)
    sizes = np.sqrt(products.diagonal())
    sizes[sizes == 0] = 1
    return products / np.outer(sizes, sizes)


class TopTokens(dict[str, TopWords]):
    """Words of feature nodes, by the ids of the nodes."""

    def to_frame(self) -> pd.DataFrame:
        """One row a node: ``id, top, bottom``, the words in one text each, the strongest first."""
        import pandas as pd

        rows = [
            (node, *(", ".join(map(repr, part)) for part in words)) for node, words in self.items()
        ]
        return pd.DataFrame(rows, columns=["id", "top", "bottom"])

    def to_json(self) -> dict[str, dict[str, list[str]]]:
        """From ids to words, as plain values."""
        return {
            node: {"top": list(words.top), "bottom": list(words.bottom)}
            for node, words in self.items()
        }

    def __repr__(self) -> str:
        return f"TopTokens({len(self)} features)"

    def _repr_html_(self) -> str:
        return f"<p>{escape(repr(self))}</p>{figures.frame_html(self.to_frame(), SHOWN)}"


def top_tokens(graph: Graph, model: HookedModel, saes: Saes, k: int = 5) -> TopTokens:
    """Words of every feature node.

    Args:
        graph: The graph.
        model: The model that it was traced in.
        saes: Those that it was traced with.
        k: How many words of each.

    Returns:
        From the id of a node to its words.

    Raises:
        UnknownNameError: The graph has features of a dictionary that was not given.
        EmptySelectionError: ``k`` is not a number of words.
    """
    sites = trace_sites(model, saes, ())
    by_label = {site.label: site for site in sites}
    rows = graph.nodes[graph.where("feature")]
    words = TopTokens()
    for label, nodes in rows.groupby("site"):
        label = str(label)
        if label not in by_label:
            raise _no_dictionary(label, by_label)
        features = torch.from_numpy(np.unique(np.asarray(nodes["index"])))
        directions = stream_writes(Anatomy(model), by_label[label], sites, features)
        by_feature = dict(zip(features.tolist(), top_words(model, directions, k), strict=True))
        words |= {name: by_feature[i] for name, i in zip(nodes["id"], nodes["index"], strict=True)}
    return words


def stream_writes(
    anatomy: Anatomy,
    site: TraceSite,
    sites: Sequence[TraceSite],
    features: Int64[torch.Tensor, " feature"],
) -> Float[torch.Tensor, "feature d_model"]:
    """What features of a site write to the stream, at all sites of a trace together, up to the scale of
    attention's norm.
    """
    parts = []
    for writer in sites:
        if not writer.receives(site):
            continue
        W_dec = writer.hooked.decoder_from(site.place).detach()
        rows = W_dec.index_select(0, features.to(W_dec.device)).float()
        if writer.kind == "attention":
            rows = rows @ anatomy.W_O(writer.layer).flatten(0, 1).to(rows)
            norm = anatomy.norm(writer.layer, "ln1_post")
            rows = rows if norm is None or norm.gain is None else rows * norm.gain.to(rows)
        parts.append(rows)
    return torch.stack(parts).sum(0)
