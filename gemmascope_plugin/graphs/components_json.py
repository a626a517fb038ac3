"""A graph of components or features, or a circuit, as JSON, and back exactly.

The frame is that of ``write_json.py``: ``metadata, qParams, nodes, links``. Nodes are known by their
labels, links carry ports and positions; what the viewers have no place for stands under ``gemmascope``:

1. In the metadata: those of the graph, what is ranked, and of a circuit the places of the units that are
   kept and what they are ranked by.
2. In a node: its site, layer, score and meaning. In a link: its port and position.

The viewers do not show such a graph: its nodes have no token. Other programs can read it without this
package.

Cost: a loop over nodes and edges.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gemmascope_plugin.files.bundle import as_json, from_json_value
from gemmascope_plugin.graphs.adjacency import EdgeList
from gemmascope_plugin.graphs.defects import Parts, find_defect
from gemmascope_plugin.graphs.graph_arrays import GraphArrays
from gemmascope_plugin.graphs.node import PORTS
from gemmascope_plugin.graphs.viewer_files import EMPTY, check_slug
from gemmascope_plugin.graphs.write_json import shortest

Selection = tuple[np.ndarray, str]
"""Which units are kept, and what they are ranked by."""


def components_to_json(
    graph: GraphArrays, slug: str, selection: Selection | None = None
) -> dict[str, Any]:
    """The content of a file of a graph, or of a circuit."""
    check_slug(slug)
    details = {"metadata": as_json(graph.metadata), "ranked": graph.ranked}
    if selection is not None:
        details |= {"kept": np.flatnonzero(selection[0]).tolist(), "rank": selection[1]}
    head = {"slug": slug, "scan": str(graph.metadata.get("model", "model")), "schema_version": 1}
    return {
        "metadata": {**head, "prompt": "", "prompt_tokens": [], "gemmascope": details},
        "qParams": dict(EMPTY),
        "nodes": _nodes(graph),
        "links": _links(graph),
    }


def _nodes(graph: GraphArrays) -> list[dict[str, Any]]:
    columns, labels = graph.columns, graph.labels.tolist()
    names = [name for name in ("site", "layer", "meaning") if name in columns]
    extras: list[dict[str, Any]] = [
        dict(zip(names, row, strict=True))
        for row in zip(*(columns[name].tolist() for name in names), strict=True)
    ]
    if "score" in columns:
        for extra, score in zip(extras, shortest(columns["score"]).tolist(), strict=True):
            extra["score"] = score
    rows = zip(*(columns[name].tolist() for name in ("kind", "layer", "pos", "index")), strict=True)
    return [
        {
            "node_id": label,
            "feature_type": kind,
            "layer": str(layer),
            "ctx_idx": pos,
            "feature": index,
            "clerp": extra.get("meaning") or label,
            "gemmascope": extra,
        }
        for label, (kind, layer, pos, index), extra in zip(labels, rows, extras, strict=True)
    ]


def _links(graph: GraphArrays) -> list[dict[str, Any]]:
    edges, labels = graph.edges, graph.labels
    ends = labels[edges.source].tolist(), labels[edges.target].tolist()
    weights = shortest(edges.weight).tolist()
    links: list[dict[str, Any]] = [
        {"source": s, "target": t, "weight": w} for s, t, w in zip(*ends, weights, strict=True)
    ]
    ports = None if edges.port is None else [PORTS[port] for port in edges.port.tolist()]
    extras = {"port": ports, "pos": None if edges.pos is None else edges.pos.tolist()}
    for name, values in extras.items():
        for link, value in zip(links, values or (), strict=values is not None):
            link.setdefault("gemmascope", {})[name] = value
    return links


def is_of_components(content: Mapping[str, Any]) -> bool:
    """Whether JSON is that of components."""
    return "ranked" in (content["metadata"].get("gemmascope") or {})


def components_from_json(content: Mapping[str, Any]) -> tuple[Parts, Selection | None]:
    """The inverse of :func:`components_to_json`."""
    details = content["metadata"]["gemmascope"]
    if details["ranked"] not in ("edge", "node"):
        raise ValueError(f"ranked is {details['ranked']!r}, neither edge nor node")
    metadata = from_json_value(details["metadata"])
    if not isinstance(metadata, dict):
        raise ValueError("its metadata are not an object")
    nodes, links = content["nodes"], content["links"]
    columns = {
        "kind": _texts(node["feature_type"] for node in nodes),
        "site": _texts(node["gemmascope"]["site"] for node in nodes),
        "layer": _integers([node["gemmascope"]["layer"] for node in nodes]),
        "pos": _integers([node["ctx_idx"] for node in nodes]),
        "index": _integers([node["feature"] for node in nodes]),
    }
    if any("score" in node["gemmascope"] for node in nodes):
        columns["score"] = _numbers([node["gemmascope"]["score"] for node in nodes])
    if any("meaning" in node["gemmascope"] for node in nodes):
        columns["meaning"] = _texts(node["gemmascope"]["meaning"] for node in nodes)
    places = {node["node_id"]: place for place, node in enumerate(nodes)}
    if len(places) < len(nodes):
        raise ValueError("a node is there twice")
    parts = Parts(columns, _edges(links, places), (), metadata, details["ranked"])
    if (defect := find_defect(parts)) is not None:
        raise ValueError(defect)
    if "kept" not in details:
        return parts, None
    n_units = parts.edges.n_edges if parts.ranked == "edge" else len(nodes)
    units = _integers(details["kept"])
    if len(units) and not (units.min() >= 0 and units.max() < n_units):
        raise ValueError(f"a unit that is kept is not among the {n_units}")
    is_kept = np.zeros(n_units, dtype=bool)
    is_kept[units] = True
    return parts, (is_kept, details["rank"])


def _edges(links: Sequence[Mapping[str, Any]], places: Mapping[str, int]) -> EdgeList:
    for link in links:
        for end in (link["source"], link["target"]):
            if end not in places:
                raise ValueError(f"a link ends at {end!r}, which is not a node")
    extras = [link.get("gemmascope", {}) for link in links]
    has_port, has_pos = (any(name in extra for extra in extras) for name in ("port", "pos"))
    return EdgeList.of(
        [places[link["source"]] for link in links],
        [places[link["target"]] for link in links],
        _numbers([link["weight"] for link in links]),
        port=[PORTS.index(extra["port"]) for extra in extras] if has_port else None,
        pos=_integers([extra["pos"] for extra in extras]) if has_pos else None,
    )


def _texts(values: Iterable[object]) -> np.ndarray:
    texts = list(values)
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a node has an entry that is not text")
    return np.array(texts, dtype=object)


def _integers(values: Sequence[Any]) -> np.ndarray:
    if not all(type(value) is int and abs(value) < 1 << 53 for value in values):
        raise ValueError("an entry is not a whole number")
    return np.array(values, dtype=np.int64)


def _numbers(values: Sequence[Any]) -> np.ndarray:
    if not all(type(value) in (int, float) for value in values):
        raise ValueError("an entry is not a number")
    with np.errstate(over="ignore"):  # found out by the checks
        return np.array(values, dtype=np.float64).astype(np.float32)
