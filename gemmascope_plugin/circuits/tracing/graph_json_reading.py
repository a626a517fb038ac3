"""Reads an attribution graph from the JSON of ``graph_json.py``, or of circuit-tracer.

1. Our own files give back the graph without its biases, exactly: what the format has no place for stands
   under ``gemmascope``. Nodes keep their order.
2. Files of circuit-tracer have no sites, no exact order and no probabilities but those of targets. Its
   error of layer ``l`` may be called as feature ``l`` of layer 0 is: nodes are known by name *and* type;
   a link from such a name is the feature's where the error could not reach the target, or where it comes
   first (circuit-tracer writes features first). What stays open is counted in
   ``metadata["ambiguous_links"]``.
3. A link to or from no node, and one that leads backwards, make the file a damaged one.

Cost: a loop over nodes and links.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gemmascope_plugin.attribution.adjoint.adjacency import Adjacency
from gemmascope_plugin.circuits.tracing.graph_json_nodes import (
    EMBEDDING,
    FEATURE,
    LOGIT,
    SHIFT,
    SITES,
    from_cantor,
)
from gemmascope_plugin.circuits.tracing.parts import NODE_COLUMNS, Parts
from gemmascope_plugin.errors import BadFileError, MissingFileError
from gemmascope_plugin.files.bundle import from_json_value

_KINDS = {EMBEDDING: "token", FEATURE: "feature", LOGIT: "target"}
_ORDER = {"token": 0, "feature": 1, "error": 2, "target": 3}


def read_graph(source: str | Path | Mapping[str, Any]) -> Parts:
    """A graph from a file, or from its content.

    Raises:
        MissingFileError: There is no such file.
        BadFileError: It is damaged, or has kinds of nodes that are no part of a trace.
    """
    content, name = source, "the graph"
    if not isinstance(source, Mapping):
        path = Path(source).expanduser()
        name = repr(str(path))
        if not path.is_file():
            raise MissingFileError(f"There is no graph at {name}", fix="graph.to_json(...)")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as fault:
            raise BadFileError(f"cannot read {name}: {fault}") from fault
    try:
        return _decoded(content)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as fault:
        raise BadFileError(
            f"{name} is no attribution graph: {fault}",
            exists="the JSON of circuit-tracer and of graph.to_json(...)",
        ) from fault


def _decoded(content: Any) -> Parts:
    """The graph.

    Raises:
        ValueError: What is wrong; also KeyError, TypeError.
    """
    import pandas as pd

    head = content["metadata"]
    own = head.get("gemmascope")
    version = head.get("schema_version", 0)
    layers = [int(n["layer"]) for n in content["nodes"] if n["layer"] != "E"]
    top = max(layers, default=0)
    rows = [_row(node, version, top) for node in content["nodes"]]
    if own is None:
        rows.sort(key=_in_order)
    nodes = pd.DataFrame(rows)
    columns = [*NODE_COLUMNS, *(["influence"] if own is None or own["pruned"] else [])]
    if not nodes["id"].is_unique:
        twice = nodes.loc[nodes["id"].duplicated(), "id"].tolist()[0]
        raise ValueError(f"the node {twice!r} is there twice")
    edges, ambiguous = _edges(nodes, content["links"], "float32" if own is None else own["dtype"])
    metadata = _metadata(head, ambiguous) if own is None else from_json_value(own["metadata"])
    return Parts(nodes[columns].copy(), edges, tuple(map(str, head["prompt_tokens"])), metadata)


def _in_order(row: Mapping[str, Any]) -> tuple[int, int, int]:
    """Tokens, then layer by layer features before errors, then targets."""
    kind = row["kind"]
    outer = {"token": 0, "target": 2}.get(kind, 1)
    return outer, row["layer"] if outer == 1 else 0, _ORDER[kind]


def _row(node: Mapping[str, Any], version: int, top: int) -> dict[str, Any]:
    """A row of the table, with ``node_id`` and ``explained`` beside its columns.

    Raises:
        ValueError: Another type of node.
    """
    kind = "error" if "error" in node["feature_type"] else _KINDS.get(node["feature_type"])
    if kind is None:
        raise ValueError(f"its node {node['node_id']!r} is of the type {node['feature_type']!r}")
    own = node.get("gemmascope", {})
    layer = -1 if node["layer"] == "E" else int(node["layer"])
    index, activation = -1, node.get("activation")
    if kind == "token":
        index = int(node["node_id"].split("_")[1])
    elif kind == "feature":
        index = _index(node, version) % (SHIFT if own else sys.maxsize)
    elif kind == "target":
        index, layer = own.get("token", node["feature"]), own.get("layer", top - 1)
        activation = from_json_value(own.get("value"))
    weight = node.get("token_prob") or 0.0 if kind == "target" else own.get("weight", 0.0)
    site = "" if kind in ("token", "target") else f"blocks.{layer}.{SITES['mlp']}"
    influence = node.get("influence")
    return {
        "id": own.get("id", f"{kind}:{node['node_id']}"),
        "kind": kind,
        "site": own.get("site", site),
        "layer": layer,
        "pos": int(node["ctx_idx"]),
        "index": int(index),
        "activation": np.nan if activation is None else float(activation),
        "weight": float(weight),
        "label": own.get("label", node["clerp"]),
        "influence": 1.0 if influence is None else float(influence),
        "node_id": node["node_id"],
        "explained": own.get("explained", kind in ("feature", "target")),
    }


def _index(node: Mapping[str, Any], version: int) -> int:
    """The index of a feature in its dictionary."""
    if version < 1:
        return int(node["node_id"].split("_")[1])
    return from_cantor(int(node["feature"]))[1]


def _edges(nodes: Any, links: Any, dtype: str) -> tuple[Adjacency, int]:
    """The matrix, and how many links could begin at two nodes.

    Raises:
        ValueError: A link that ends nowhere, leads backwards, or is there twice.
    """
    import scipy.sparse as sp

    places: dict[str, list[int]] = {}
    for place, name in enumerate(nodes["node_id"]):
        places.setdefault(name, []).append(place)
    explained = nodes["explained"].to_numpy(dtype=bool)
    entries: dict[tuple[int, int], float] = {}
    ambiguous = 0
    for link in links:
        for end in (link["source"], link["target"]):
            if end not in places:
                raise ValueError(f"a link ends at {end!r}, which is no node")
        target = next((p for p in places[link["target"]] if explained[p]), -1)
        sources = [p for p in places[link["source"]] if p < target]
        if not sources:
            raise ValueError(
                f"a link leads backwards, from {link['source']!r} to {link['target']!r}"
            )
        free = [p for p in sources if (target, p) not in entries]
        if not free:
            raise ValueError(
                f"the link from {link['source']!r} to {link['target']!r} is there twice"
            )
        ambiguous += len(free) > 1
        ambiguous -= len(sources) > len(free)
        entries[target, free[0]] = float(link["weight"])
    rows = explained.nonzero()[0]
    row_of = {int(node): row for row, node in enumerate(rows)}
    order = sorted(entries)
    cells = ([row_of[target] for target, _ in order], [source for _, source in order])
    data = np.array([entries[key] for key in order], dtype=dtype)
    matrix = sp.csr_array((data, cells), shape=(len(rows), len(nodes)))
    return Adjacency(matrix, rows), ambiguous


def _metadata(head: Mapping[str, Any], ambiguous: int) -> dict[str, Any]:
    known = {"prompt": head["prompt"], "model": head["scan"]}
    settings = {**head.get("generation_settings", {}), **head.get("pruning_settings", {})}
    if head.get("node_threshold") is not None:
        settings["node_threshold"] = head["node_threshold"]
    return {**known, **from_json_value(settings), "ambiguous_links": ambiguous}
