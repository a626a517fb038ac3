"""Keeps an attribution graph in one file and reads it back, exactly.

A bundle (``files/bundle.py``): in its header tokens, metadata and the columns of text of the nodes; as
arrays the other columns (``node.layer``, ...) and the compressed rows (``rows``, the node of each;
``indptr``, ``indices``, ``data``).

1. The digest of the bundle is of all of it, labels too: a damaged file is found out.
2. Reading trusts no digest: what makes tables and arrays a graph is checked (``defects.py``), and before
   writing as well. No pickle.

Cost: reading and writing 8 bytes per edge (float32) and some 100 per node.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gemmascope_plugin.errors import GemmaScopeError
from gemmascope_plugin.files.bundle import (
    Arrays,
    as_json,
    from_json_value,
    read_bundle,
    write_bundle,
)
from gemmascope_plugin.files.json_file import Record
from gemmascope_plugin.graphs.cyclic import in_any_order
from gemmascope_plugin.graphs.defects import node_defect, row_defect
from gemmascope_plugin.graphs.parts import Parts

FORMAT, VERSION = "gemmascope_plugin attribution graph", 2
KIND = "attribution graph"
_ROWS = ("rows", "indptr", "indices", "data")


def save_graph(path: str | Path, parts: Parts) -> Path:
    """Writes a graph; an older file is replaced.

    Args:
        path: The file; its folder is made if need be.
        parts: The graph.

    Returns:
        The path.

    Raises:
        GemmaScopeError: The file cannot be written, the metadata do not fit into JSON, or the graph has
            numbers that are not finite.
    """
    nodes, edges = parts.nodes, parts.edges
    texts, arrays = {}, {}
    for name in nodes.columns:
        column = nodes[name].to_numpy()
        if column.dtype.kind in "biuf":
            arrays[f"node.{name}"] = column
        else:
            texts[name] = _texts(name, column)
    matrix = edges.matrix
    arrays |= {"rows": edges.nodes, "indptr": matrix.indptr, "indices": matrix.indices}
    arrays["data"] = matrix.data
    defect = node_defect(nodes, len(parts.tokens))
    defect = defect or row_defect(
        len(nodes), *(arrays[name] for name in _ROWS), grouped="supernodes" in parts.metadata
    )
    if defect is not None:
        raise GemmaScopeError(f"The graph cannot be saved: {defect}")
    content = {
        "format": FORMAT,
        "version": VERSION,
        "columns": [str(name) for name in nodes.columns],
        "texts": texts,
        "tokens": list(parts.tokens),
        "metadata": as_json(parts.metadata),
    }
    return write_bundle(path, content, arrays, kind=KIND)


def load_graph(path: str | Path) -> Parts:
    """Reads what :func:`save_graph` has written.

    Raises:
        MissingFileError: There is no such file.
        BadFileError: It is damaged, contradicts itself, or is of another version.
    """
    content, arrays = read_bundle(path, kind=KIND, format=FORMAT, version=VERSION)
    try:
        return _decoded(content, arrays)
    except ValueError as fault:
        content.bad(str(fault))


def _texts(name: str, column: np.ndarray) -> list[str]:
    for value in column:
        if not isinstance(value, str):
            raise GemmaScopeError(
                f"Column {name!r} of the nodes has {value!r}, which cannot be saved",
                exists="columns of numbers, of truth values, of text",
            )
    return column.tolist()


def _decoded(content: Record, arrays: Arrays) -> Parts:
    """The graph.

    Raises:
        ValueError: What is wrong; also BadFileError.
    """
    import pandas as pd
    import scipy.sparse as sp

    tokens, columns = content.list_of("tokens", str), content.list_of("columns", str)
    texts = Record(content.get("texts", dict), content.path, content.fix)
    table = {
        name: texts.list_of(name, str) if name in texts.content else _array(arrays, f"node.{name}")
        for name in columns
    }
    names = {*(f"node.{name}" for name in columns if name not in texts.content), *_ROWS}
    if len(set(columns)) < len(columns) or names != set(arrays) or set(texts.content) - {*columns}:
        raise ValueError("the columns are not those that it has arrays and texts for")
    if len({len(column) for column in table.values()}) != 1:
        raise ValueError("the columns differ in length")
    nodes = pd.DataFrame(table)
    rows, indptr, indices, data = (_array(arrays, name) for name in _ROWS)
    metadata = from_json_value(content.get("metadata", dict))
    if not isinstance(metadata, dict):
        raise ValueError("the metadata are not an object")
    defect = node_defect(nodes, len(tokens))
    defect = defect or row_defect(
        len(nodes), rows, indptr, indices, data, grouped="supernodes" in metadata
    )
    if defect is not None:
        raise ValueError(defect)
    matrix = sp.csr_array((data, indices, indptr), shape=(len(rows), len(nodes)))
    return Parts(nodes, in_any_order(matrix, rows), tuple(tokens), metadata)


def _array(arrays: Arrays, name: str) -> np.ndarray:
    if name not in arrays:
        raise ValueError(f"the array {name!r} is missing")
    if arrays[name].ndim != 1 and name.startswith("node."):
        raise ValueError(f"the array {name!r} has several axes")
    return arrays[name]
