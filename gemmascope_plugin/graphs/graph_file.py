"""Keeps a graph, or a circuit, in one file and reads it back, exactly.

A bundle (``files/bundle.py``). Its header says counts, tokens, metadata, what is ranked, and the names of
the node columns with the different texts of each. Its arrays:

1. ``node.<column>``: numbers, or places in the texts of that column.
2. ``edge.source`` and ``edge.weight``; of rows their nodes (``edge.rows``) and ``edge.indptr``, of a list
   ``edge.target``, and ``edge.port`` and ``edge.pos`` where there are any.
3. ``is_kept`` of a circuit, whose header also says ``n_kept`` and ``rank``.

The digest of the bundle is of all of it. Reading trusts none: names, types, lengths, counts and all that
makes columns and edges a graph are checked (``defects.py``), and before writing as well. No pickle.

Cost: reading and writing 8 bytes per edge of rows, 13 of a list with ports, and some 100 per node.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

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
from gemmascope_plugin.graphs.adjacency import Adjacency, EdgeList
from gemmascope_plugin.graphs.defects import (
    Parts,
    find_defect,
    list_defect,
    node_defect,
    rank_defect,
    row_defect,
)
from gemmascope_plugin.graphs.node import PORTS

FORMAT, VERSION = "gemmascope_plugin graph", 1
Kind = Literal["graph", "circuit"]
RANKS = ("absolute", "positive", "negative")
_ROWS = {"edge.rows": "i", "edge.indptr": "i", "edge.source": "i", "edge.weight": "f"}
_LIST = {"edge.source": "i", "edge.target": "i", "edge.weight": "f"}
_OPTIONAL = {"edge.port": "u", "edge.pos": "i"}
_KEPT = "is_kept"


def save_graph(
    path: str | Path, parts: Parts, is_kept: np.ndarray | None = None, rank: str | None = None
) -> Path:
    """Writes a graph, with a selection of its units a circuit; an older file is replaced."""
    arrays: Arrays = {}
    texts: dict[str, list[str]] = {}
    for name, column in parts.columns.items():
        if column.dtype.kind in "biuf":
            arrays[f"node.{name}"] = column
        else:
            texts[name], arrays[f"node.{name}"] = _texts(name, column)
    arrays |= _edge_arrays(parts.edges)
    if (defect := find_defect(parts)) is not None:
        raise GemmaScopeError(f"The graph cannot be saved: {defect}")
    content: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "n_nodes": len(parts.columns["kind"]),
        "n_edges": parts.edges.n_edges,
        "columns": list(parts.columns),
        "texts": texts,
        "tokens": list(parts.tokens),
        "ranked": parts.ranked,
        "ports": list(PORTS),
        "metadata": as_json(parts.metadata),
    }
    if is_kept is not None:
        arrays[_KEPT] = is_kept
        content |= {"n_kept": int(is_kept.sum()), "rank": rank}
    return write_bundle(path, content, arrays, kind="graph" if is_kept is None else "circuit")


def load_graph(path: str | Path) -> Parts:
    """Reads the graph of a file, or of a circuit in a file."""
    return _load(path, "graph")[0]


def load_circuit(path: str | Path) -> tuple[Parts, np.ndarray, Any]:
    """Reads a circuit: the graph, which units are kept, and what they are ranked by."""
    return _load(path, "circuit")


def _load(path: str | Path, kind: Kind) -> tuple[Parts, np.ndarray, Any]:
    content, arrays = read_bundle(path, kind=kind, format=FORMAT, version=VERSION)
    try:
        if kind == "circuit" and _KEPT not in arrays:
            raise ValueError(f"the array {_KEPT!r} is missing: it is a graph without a selection")
        is_kept = arrays.pop(_KEPT, np.zeros(0, dtype=bool))
        parts = _decoded(content, arrays)
        if "n_kept" in content.content:
            _check_selection(content, parts, is_kept)
        elif kind == "circuit" or len(is_kept):
            raise ValueError("n_kept is missing")
        return parts, is_kept, content.content.get("rank")
    except (TypeError, ValueError) as fault:
        content.bad(str(fault))


def _texts(name: str, column: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Different texts of a column, and the place of each entry among them."""
    import pandas as pd

    for value in column:
        if not isinstance(value, str):
            raise GemmaScopeError(
                f"Column {name!r} of the nodes has {value!r}, which cannot be saved",
                exists="columns of numbers, of truth values, of text",
            )
    places, texts = pd.factorize(column)
    return list(map(str, texts)), places.astype(np.int32)


def _edge_arrays(edges: Adjacency | EdgeList) -> Arrays:
    if isinstance(edges, Adjacency):
        rows = {"edge.rows": edges.nodes, "edge.indptr": edges.matrix.indptr}
        return {**rows, "edge.source": edges.source, "edge.weight": edges.weight}
    arrays = {"edge.source": edges.source.astype(np.int32)}
    arrays |= {"edge.target": edges.target.astype(np.int32), "edge.weight": edges.weight}
    optional = {"edge.port": edges.port, "edge.pos": edges.pos}
    return arrays | {name: array for name, array in optional.items() if array is not None}


def _decoded(content: Record, arrays: Arrays) -> Parts:
    """The graph."""
    tokens, ports = content.list_of("tokens", str), content.list_of("ports", str)
    if ports != list(PORTS):
        raise ValueError(f"ports are {ports!r}, not {list(PORTS)}")
    ranked: Any = content.get("ranked", str)
    if ranked not in ("edge", "node"):
        raise ValueError(f"ranked is {ranked!r}, neither edge nor node")
    metadata = from_json_value(content.get("metadata", dict))
    if not isinstance(metadata, dict):
        raise ValueError("the metadata are not an object")
    columns = _columns(content, arrays)
    n_nodes = len(next(iter(columns.values())))
    if (defect := node_defect(columns, len(tokens))) is not None:
        raise ValueError(defect)
    edges = _edges(n_nodes, arrays, is_grouped="supernodes" in metadata)
    parts = Parts(columns, edges, tuple(tokens), metadata, ranked)
    if (defect := rank_defect(parts)) is not None:
        raise ValueError(defect)
    for name, count in {"n_nodes": n_nodes, "n_edges": edges.n_edges}.items():
        if content.get(name, int) != count:
            raise ValueError(f"{name} is {content.content[name]}, but the arrays have {count}")
    return parts


def _columns(content: Record, arrays: Arrays) -> dict[str, np.ndarray]:
    """Columns of the nodes; takes their arrays out of ``arrays``."""
    names = content.list_of("columns", str)
    texts = Record(content.get("texts", dict), content.path, content.fix)
    columns = {name: _array(arrays, f"node.{name}") for name in names}
    is_complete = not any(name.startswith("node.") for name in arrays)
    if not is_complete or not columns or len(names) > len(columns) or set(texts.content) - {*names}:
        raise ValueError("the columns are not those that it has arrays and texts for")
    if any(column.ndim != 1 for column in columns.values()):
        raise ValueError("a column has several axes")
    if len({len(column) for column in columns.values()}) != 1:
        raise ValueError("the columns differ in length")
    for name in texts.content:
        words, places = np.array(texts.list_of(name, str), dtype=object), columns[name]
        if places.dtype.kind != "i" or not ((places >= 0) & (places < len(words))).all():
            raise ValueError(f"the column {name!r} has a place where it has no text")
        columns[name] = words[places]
    return columns


def _edges(n_nodes: int, arrays: Arrays, is_grouped: bool) -> Adjacency | EdgeList:
    import scipy.sparse as sp

    types = {**(_ROWS if "edge.rows" in arrays else {**_LIST, **_OPTIONAL})}
    if unknown := set(arrays) - set(types):
        raise ValueError(f"the array {min(unknown)!r} is unknown")
    for name, array in arrays.items():
        if array.ndim != 1 or array.dtype.kind != types[name]:
            raise ValueError(f"the array {name!r} is {array.shape} of {array.dtype}")
    if "edge.rows" not in arrays:
        source, target, weight = (_array(arrays, name) for name in _LIST)
        port, pos = (arrays.get(name) for name in _OPTIONAL)
        edges = EdgeList.of(source, target, weight, port=port, pos=pos)
        if (defect := list_defect(n_nodes, edges)) is not None:
            raise ValueError(defect)
        return edges
    rows, indptr, source, weight = (_array(arrays, name) for name in _ROWS)
    # first: scipy does not say what is wrong
    defect = row_defect(n_nodes, rows, indptr, source, weight, grouped=is_grouped)
    if defect is not None:
        raise ValueError(defect)
    matrix = sp.csr_array((weight, source, indptr), shape=(len(rows), n_nodes))
    return Adjacency.in_any_order(matrix, rows)


def _check_selection(content: Record, parts: Parts, is_kept: np.ndarray) -> None:
    ranks_edges = parts.ranked == "edge"
    n_units = parts.edges.n_edges if ranks_edges else len(parts.columns["kind"])
    if is_kept.dtype != bool or is_kept.shape != (n_units,):
        raise ValueError(
            f"array {_KEPT!r} is {is_kept.shape} of {is_kept.dtype}, not ({n_units},) of bool"
        )
    if content.get("n_kept", int) != int(is_kept.sum()):
        raise ValueError(
            f"n_kept is {content.content['n_kept']}, but the arrays have {int(is_kept.sum())}"
        )
    rank = content.get("rank", str)
    if rank not in RANKS:
        raise ValueError(f"rank is {rank!r}, not one of {', '.join(RANKS)}")


def _array(arrays: Arrays, name: str) -> np.ndarray:
    if name not in arrays:
        raise ValueError(f"the array {name!r} is missing")
    return arrays.pop(name) if name.startswith("node.") else arrays[name]
