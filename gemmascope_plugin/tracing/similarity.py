"""How alike the features of an attribution graph are, by what they write, when, and what they do.

1. ``decoder``: cosine of what they write, all layers that a feature writes to together. Features that
   write to ``z`` of different layers, or to ``z`` and to the stream, cannot be compared and count 0.
2. ``activation``: 0 for nodes at different tokens; else the cosine of the activations of the two features
   over all tokens where the graph has them: 1 for those that are active at this token only.
3. ``edges``: the mean of two cosines, of what reaches them and of what they reach, signed.

Cost: matrices ``[feature, feature]``, three at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float

from gemmascope_plugin.errors import UnknownNameError
from gemmascope_plugin.graphs.graph import Graph
from gemmascope_plugin.splice.check_saes import as_list
from gemmascope_plugin.tracing.linear.tracer import hooked_of

if TYPE_CHECKING:
    import pandas as pd

Square = Float[np.ndarray, "feature feature"]


def by_decoder(graph: Graph, places: np.ndarray, dictionaries: Any) -> Square:
    """Cosines of decoder directions.

    Args:
        graph: The graph.
        places: Of the features.
        dictionaries: Those that it was traced with.

    Raises:
        UnknownNameError: A feature of a dictionary that was not given.
    """
    rows = graph.nodes.iloc[places]
    found = np.zeros((len(rows), len(rows)))
    spaces = _directions(rows, dictionaries)
    for own, directions in spaces.values():
        found[np.ix_(own, own)] = _cosines(directions)
    return found


def _directions(rows: pd.DataFrame, dictionaries: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Numbers of features and what they write, for each space that is written to."""
    hooked = {
        site.name: (one, place)
        for one in (hooked_of(each, ()) for each in as_list(dictionaries))
        for place, site in enumerate(one.sites)
    }
    parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for label, own in rows.groupby("site").indices.items():
        name = str(label)
        if name not in hooked:
            raise UnknownNameError(
                f"The graph has features of {name}, and no dictionary for it was given",
                exists=", ".join(hooked),
            )
        one, place = hooked[name]
        features = torch.from_numpy(rows["index"].to_numpy()[own])
        written = [site.decoder_from(place).detach() for site in one.sites[place:]]
        summed = sum(W_dec.index_select(0, features.to(W_dec.device)).float() for W_dec in written)
        assert isinstance(summed, torch.Tensor), "a site writes at least to itself"
        space = name if name.endswith("hook_z") else "stream"
        parts.setdefault(space, []).append((own, summed.cpu().numpy()))
    return {
        space: (np.concatenate([own for own, _ in each]), np.concatenate([d for _, d in each]))
        for space, each in parts.items()
    }


def by_activation(graph: Graph, places: np.ndarray) -> Square:
    """Cosines of activations over tokens, for nodes at one token.

    Args:
        graph: The graph.
        places: Of the features.
    """
    features = graph.nodes[graph.where("feature")]
    numbers = features.groupby(["site", "index"]).ngroup()
    profiles = np.zeros((int(numbers.max()) + 1, len(graph.tokens)))
    profiles[numbers, features["pos"]] = features["activation"]
    pos = graph.nodes["pos"].to_numpy()[places]
    own = numbers.loc[graph.nodes.index[places]].to_numpy()
    return _cosines(profiles[own]) * (pos[:, None] == pos)


def by_edges(graph: Graph, places: np.ndarray) -> Square:
    """Means of the cosines of incoming and of outgoing edges.

    Args:
        graph: The graph.
        places: Of the features.
    """
    matrix = graph.adjacency
    into, out = matrix[places], matrix[:, places].T.tocsr()
    return (_cosines(into) + _cosines(out)) / 2


def _cosines(rows: Any) -> Square:
    """Of rows, dense or sparse; 0 for rows without entries."""
    sparse = hasattr(rows, "toarray")
    products = (rows @ rows.T).toarray() if sparse else rows @ rows.T
    products = products.astype(np.float64)
    sizes = np.sqrt(products.diagonal())
    sizes[sizes == 0] = 1
    return products / np.outer(sizes, sizes)
