"""What an attribution graph consists of, for those that write and read it, and its metadata as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gemmascope_plugin.attribution.adjoint.adjacency import Adjacency
from gemmascope_plugin.errors import GemmaScopeError

if TYPE_CHECKING:
    import pandas as pd

NODE_COLUMNS = ("id", "kind", "site", "layer", "pos", "index", "activation", "weight", "label")
"""Columns that every graph has."""
_FLOAT = "$float"


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


def as_json(value: Any, where: str = "metadata") -> Any:
    """Metadata as what JSON can hold; ``nan`` and infinities as text, which every reader takes.

    Args:
        value: Text, numbers, truth values, None; tuples, lists and mappings of them.
        where: What it is called in an error.

    Raises:
        GemmaScopeError: Something else, or a key that is no text.
    """
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise GemmaScopeError(f"{where} has the key {key!r}, which is no text")
        return {key: as_json(each, f"{where}[{key!r}]") for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return [as_json(each, f"{where}[{i}]") for i, each in enumerate(value)]
    plain = value.item() if isinstance(value, np.generic) else value
    if isinstance(plain, float) and not math.isfinite(plain):
        return {_FLOAT: str(plain)}
    if plain is None or isinstance(plain, (str, bool, int, float)):
        return plain
    raise GemmaScopeError(
        f"{where} is {type(value).__name__}, which cannot be saved",
        exists="text, numbers, booleans, None, and tuples, lists and dicts of them",
    )


def from_json_value(value: Any) -> Any:
    """The inverse of :func:`as_json`; sequences are tuples."""
    if isinstance(value, dict):
        if list(value) == [_FLOAT]:
            return float(value[_FLOAT])
        return {key: from_json_value(each) for key, each in value.items()}
    return tuple(map(from_json_value, value)) if isinstance(value, list) else value
