"""Keeps an attribution graph in one file and reads it back, exactly.

A safetensors file: in its header, as JSON, format, version, tokens, metadata and the columns of text of
the nodes; as arrays the other columns (``node.layer``, ...) and the compressed rows (``rows``, the node
of each; ``indptr``, ``indices``, ``data``).

1. The header holds the SHA-256 of the arrays' bytes: a damaged file is found out.
2. Written under a temporary name and renamed. Reading trusts nothing: names, types, lengths and ranges
   are checked before a graph is built. No pickle.

Cost: reading and writing 8 bytes per edge (float32) and some 100 per node.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from gemmascope_plugin.circuits.tracing.cyclic import in_any_order
from gemmascope_plugin.circuits.tracing.parts import NODE_COLUMNS, Parts, as_json, from_json_value
from gemmascope_plugin.errors import BadFileError, GemmaScopeError, MissingFileError
from gemmascope_plugin.files.whole import write_whole

FORMAT, VERSION = "gemmascope_plugin attribution graph", 1
_KEY = "gemmascope"
_ROWS = ("rows", "indptr", "indices", "data")


def save_graph(path: str | Path, parts: Parts) -> Path:
    """Writes a graph; an older file is replaced.

    Args:
        path: The file; its folder is made if need be.
        parts: The graph.

    Returns:
        The path.

    Raises:
        GemmaScopeError: The file cannot be written, or the metadata do not fit into JSON.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise GemmaScopeError(
            f"{str(path)!r} is a folder", fix=f"{str(path / 'graph.safetensors')!r}"
        )
    nodes, edges = parts.nodes, parts.edges
    texts, arrays = {}, {}
    for name in nodes.columns:
        column = nodes[name].to_numpy()
        if column.dtype.kind in "biuf":
            arrays[f"node.{name}"] = np.ascontiguousarray(column)
        else:
            texts[name] = _texts(name, column)
    matrix = edges.matrix
    arrays |= {"rows": edges.nodes, "indptr": matrix.indptr, "indices": matrix.indices}
    arrays["data"] = matrix.data
    content = {
        "format": FORMAT,
        "version": VERSION,
        "columns": [str(name) for name in nodes.columns],
        "texts": texts,
        "tokens": list(parts.tokens),
        "metadata": as_json(parts.metadata),
        "sha256": _digest(arrays),
    }
    data = save(arrays, {_KEY: json.dumps(content)})
    return write_whole(path, lambda file: file.write(data))


def load_graph(path: str | Path) -> Parts:
    """Reads what :func:`save_graph` has written.

    Raises:
        MissingFileError: There is no such file.
        BadFileError: It is damaged, contradicts itself, or is of an unknown version.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise MissingFileError(
            f"There is no attribution graph at {str(path)!r}",
            fix="a file that graph.save(path) has written",
        )
    try:
        with safe_open(path, framework="numpy") as file:
            header = (file.metadata() or {}).get(_KEY)
            if header is None:
                raise ValueError(f"it is no {FORMAT}")
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return _decoded(json.loads(header), arrays)
    except (OSError, SafetensorError) as fault:
        raise _bad(path, str(fault)) from fault
    except (KeyError, TypeError, ValueError, AttributeError) as fault:
        raise _bad(path, str(fault)) from fault


def _texts(name: str, column: np.ndarray) -> list[str]:
    for value in column:
        if not isinstance(value, str):
            raise GemmaScopeError(
                f"Column {name!r} of the nodes has {value!r}, which cannot be saved",
                exists="columns of numbers, of truth values, of text",
            )
    return column.tolist()


def _digest(arrays: dict[str, np.ndarray]) -> str:
    found = hashlib.sha256()
    for name in sorted(arrays):
        found.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        found.update(np.ascontiguousarray(arrays[name]).data)
    return found.hexdigest()


def _decoded(content: Any, arrays: dict[str, np.ndarray]) -> Parts:
    """The graph.

    Raises:
        ValueError: What is wrong; also KeyError, TypeError.
    """
    import pandas as pd
    import scipy.sparse as sp

    if content["format"] != FORMAT:
        raise ValueError(f"its format is {content['format']!r}, not {FORMAT!r}")
    if content["version"] != VERSION:
        raise ValueError(f"its version is {content['version']!r}, and only {VERSION} is known")
    if content["sha256"] != _digest(arrays):
        raise ValueError("the arrays are not those that the header was written with")
    texts, columns = content["texts"], content["columns"]
    if missing := [name for name in NODE_COLUMNS if name not in columns]:
        raise ValueError(f"the column {missing[0]!r} is missing")
    found = {name: texts[name] if name in texts else arrays[f"node.{name}"] for name in columns}
    nodes = pd.DataFrame(found)
    if not nodes["id"].is_unique:
        raise ValueError("node ids are not unique")
    rows, indptr, indices, data = (arrays[name] for name in _ROWS)
    metadata = from_json_value(content["metadata"])
    _check_rows(len(nodes), rows, indptr, indices, data, "supernodes" in metadata)
    matrix = sp.csr_array((data, indices, indptr), shape=(len(rows), len(nodes)))
    return Parts(nodes, in_any_order(matrix, rows), tuple(map(str, content["tokens"])), metadata)


def _check_rows(
    n_nodes: int,
    rows: np.ndarray,
    indptr: np.ndarray,
    indices: np.ndarray,
    data: np.ndarray,
    grouped: bool,
) -> None:
    """What makes arrays the rows of a graph; groups of nodes may reach each other both ways.

    Raises:
        ValueError: What is wrong.
    """
    if any(array.ndim != 1 for array in (rows, indptr, indices, data)):
        raise ValueError("an array of the rows has several axes")
    if len(indptr) != len(rows) + 1 or len(indices) != len(data) or indptr[0] != 0:
        raise ValueError("the lengths of the rows contradict one another")
    if indptr[-1] != len(data) or (np.diff(indptr) < 0).any():
        raise ValueError("the rows do not add up to the entries")
    if (np.diff(rows) <= 0).any() or (rows < 0).any() or (rows >= n_nodes).any():
        raise ValueError("the nodes of the rows are not ascending places")
    if (indices < 0).any():
        raise ValueError("an edge comes from no node")
    targets = np.repeat(rows, np.diff(indptr))
    if (indices >= (n_nodes if grouped else targets)).any():
        raise ValueError("an edge leads backwards")
    if (np.diff(targets * n_nodes + indices) <= 0).any():
        raise ValueError("the entries of a row are not ascending")


def _bad(path: Path, why: str) -> BadFileError:
    return BadFileError(f"cannot read {str(path)!r}: {why}", fix="save the graph again")
