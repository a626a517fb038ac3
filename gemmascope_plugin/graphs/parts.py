"""What an attribution graph consists of, for those that write and read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gemmascope_plugin.graphs.adjacency import Adjacency

if TYPE_CHECKING:
    import pandas as pd

KINDS = ("token", "bias", "feature", "error", "target")
NODE_COLUMNS = ("id", "kind", "site", "layer", "pos", "index", "activation", "weight", "label")
"""Columns that every graph has."""


class Parts(NamedTuple):
    """The fields of an ``AttributionGraph``, in its order."""

    nodes: pd.DataFrame
    edges: Adjacency
    tokens: tuple[str, ...]
    metadata: Mapping[str, Any]


def ends(edges: Adjacency) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Source, target and weight of every entry, row by row."""
    matrix = edges.matrix
    return matrix.indices, np.repeat(edges.nodes, np.diff(matrix.indptr)), matrix.data
