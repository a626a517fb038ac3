"""Keeps a circuit in one file and reads it back, exactly.

A bundle (``files/bundle.py``). Its header says hooks of the nodes, names of the ports, what is ranked,
counts, meanings of nodes (by their place) and metadata. Its arrays: node_site (place in ``sites``),
node_index, kept; source, target, port, edge_scores; node_scores, node_pos (-1 for all) and pos where
there are any.

The digest of the bundle is of all of it. Reading trusts none: names, types, lengths, counts, ranges and
what makes arrays a graph are checked before a graph is built. No pickle.

Cost: reading and writing 22 bytes per edge.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import Bool, Shaped

from gemmascope_plugin.files.bundle import as_json, from_json_value, read_bundle, write_bundle
from gemmascope_plugin.files.json_file import Record
from gemmascope_plugin.graphs.frames import layer_of
from gemmascope_plugin.graphs.graph import PORTS, Graph, Rank
from gemmascope_plugin.graphs.node import Node, NodeKind
from gemmascope_plugin.graphs.soundness import MAX_LAYER, content_fault

FORMAT, VERSION = "gemmascope_plugin circuit", 3
KIND = "circuit"
_EDGES = {
    "source": torch.int64,
    "target": torch.int64,
    "port": torch.uint8,
    "edge_scores": torch.float32,
}
_NODES = {"node_site": torch.int32, "node_index": torch.int64}
_TYPES = {
    **_NODES,
    **_EDGES,
    "node_pos": torch.int64,
    "node_scores": torch.float32,
    "pos": torch.int64,
    "kept": torch.bool,
}

Arrays = dict[str, Shaped[torch.Tensor, "*_"]]


def save_circuit(
    path: str | Path, graph: Graph, kept: Bool[torch.Tensor, " unit"], *, rank: Rank
) -> Path:
    """Writes a circuit; an older file is replaced.

    Args:
        path: The file; its folder is made if need be.
        graph: The graph.
        kept: Which units are kept.
        rank: What they are ranked by.

    Returns:
        The path.

    Raises:
        GemmaScopeError: The file cannot be written, or the metadata do not fit into JSON.
    """
    sites = list(dict.fromkeys((node.kind, node.hook) for node in graph.nodes))
    place = {site: i for i, site in enumerate(sites)}
    arrays = _arrays(graph, kept, place)
    content = {
        "format": FORMAT,
        "version": VERSION,
        "n_nodes": len(graph.nodes),
        "n_edges": graph.n_edges,
        "n_kept": int(kept.sum()),
        "signed": rank != "absolute",
        "rank": rank,
        "ranked": graph.ranked,
        "ports": list(PORTS),
        "sites": [list(site) for site in sites],
        "meanings": {
            str(i): graph.meanings[node]
            for i, node in enumerate(graph.nodes)
            if node in graph.meanings
        },
        "metadata": as_json(graph.metadata),
    }
    plain = {name: array.detach().cpu().numpy() for name, array in arrays.items()}
    return write_bundle(path, content, plain, kind=KIND)


def _arrays(graph: Graph, kept: Bool[torch.Tensor, " unit"], place: Mapping[Any, int]) -> Arrays:
    """All arrays of a circuit; ``place`` says where in the list of sites a node's is."""
    arrays: dict[str, Any] = {name: getattr(graph, name) for name in _EDGES if graph.has_edges}
    optional = {"node_scores": graph.node_scores, "pos": graph.pos}
    arrays |= {name: array for name, array in optional.items() if array is not None}
    arrays["node_site"] = torch.tensor([place[n.kind, n.hook] for n in graph.nodes]).int()
    arrays["node_index"] = torch.tensor([node.index for node in graph.nodes])
    if any(node.pos is not None for node in graph.nodes):
        at = [-1 if node.pos is None else node.pos for node in graph.nodes]
        arrays["node_pos"] = torch.tensor(at)
    arrays["kept"] = kept
    return arrays


def load_circuit(path: str | Path) -> tuple[Graph, Bool[torch.Tensor, " unit"], Rank]:
    """Reads what :func:`save_circuit` has written.

    Returns:
        The graph, which units are kept, and what they are ranked by.

    Raises:
        MissingFileError: There is no such file.
        BadFileError: It is damaged, contradicts itself, or is of another version.
    """
    content, plain = read_bundle(path, kind=KIND, format=FORMAT, version=VERSION)
    try:
        arrays = {name: torch.from_numpy(array.copy()) for name, array in plain.items()}
        _check_arrays(arrays, content.get("ranked", str))
        return _decoded(content, arrays)
    except (TypeError, ValueError) as fault:
        content.bad(str(fault))


def _check_arrays(arrays: Arrays, ranked: str) -> None:
    """Names, types and lengths.

    Raises:
        ValueError: What is wrong.
    """
    if ranked not in ("edge", "node"):
        raise ValueError(f"ranked is {ranked!r}, neither edge nor node")
    has_edges = any(name in arrays for name in (*_EDGES, "pos"))
    ranks_edges = ranked == "edge"
    wanted = {
        *_NODES,
        "kept",
        *(_EDGES if has_edges else []),
        *([] if ranks_edges else ["node_scores"]),
    }
    if missing := wanted - set(arrays):
        raise ValueError(f"array {min(missing)!r} is missing")
    if unknown := set(arrays) - set(_TYPES):
        raise ValueError(f"array {min(unknown)!r} is unknown")
    unit = "source" if ranks_edges else "node_index"
    if unit not in arrays:
        raise ValueError("edges are ranked, and there are none")
    for name, array in arrays.items():
        of = {"k": unit, "n": "node_index"}.get(name[0], "source")
        if array.ndim != 1 or array.dtype != _TYPES[name] or len(array) != arrays[of].numel():
            raise ValueError(
                f"array {name!r} is {tuple(array.shape)} of {array.dtype}, not "
                f"({arrays[of].numel()},) of {_TYPES[name]}"
            )
    if len(arrays["kept"]) == 0:
        raise ValueError("array 'kept' has no entries")


def _decoded(content: Record, arrays: Arrays) -> tuple[Graph, Bool[torch.Tensor, " unit"], Rank]:
    """The circuit.

    Raises:
        ValueError: What is wrong; also BadFileError.
    """
    if content.list_of("ports", str) != list(PORTS):
        raise ValueError(f"ports are {content.content['ports']!r}, not {list(PORTS)}")
    nodes, kept = _nodes(content, arrays), arrays["kept"]
    edges = {name: arrays.get(name, torch.empty(0, dtype=t)) for name, t in _EDGES.items()}
    optional = {name: arrays.get(name) for name in ("node_scores", "pos")}
    counts = {"n_nodes": len(nodes), "n_edges": len(edges["source"]), "n_kept": int(kept.sum())}
    for name, count in counts.items():
        if content.get(name, int) != count:
            raise ValueError(f"{name} is {content.content[name]}, but the arrays have {count}")
    ranked: Any = content.get("ranked", str)
    fault = content_fault(nodes, **optional, **edges, ranked=ranked)
    if fault is not None:
        raise ValueError(fault)
    metadata = from_json_value(content.get("metadata", dict))
    if not isinstance(metadata, dict):
        raise ValueError("the metadata are not an object")
    meanings = _meanings(content, nodes)
    graph = Graph(nodes, **optional, **edges, metadata=metadata, ranked=ranked, meanings=meanings)
    return graph, kept, _rank(content)


def _rank(content: Record) -> Rank:
    """What units are ranked by; files without ``rank`` know only whether by signed score.

    Raises:
        ValueError: What is wrong; also BadFileError.
    """
    signed = content.get("signed", bool)
    if "rank" not in content.content:
        return "positive" if signed else "absolute"
    rank: Any = content.get("rank", str)
    if rank not in get_args(Rank):
        raise ValueError(f"rank is {rank!r}, none of {', '.join(get_args(Rank))}")
    if signed != (rank != "absolute"):
        raise ValueError(f"rank is {rank!r}, and signed is {signed}")
    return rank


def _meanings(content: Record, nodes: tuple[Node, ...]) -> dict[Node, str]:
    places = {str(i): node for i, node in enumerate(nodes)}
    texts = content.dict_of("meanings", str)
    if unknown := set(texts) - set(places):
        raise ValueError(f"meanings has {min(unknown)!r}, which is not the place of a node")
    return {places[place]: text for place, text in texts.items()}


def _nodes(content: Record, arrays: Arrays) -> tuple[Node, ...]:
    sites = [tuple(site) for site in content.list_of("sites", list)]
    for site in sites:
        is_site = len(site) == 2 and site[0] in get_args(NodeKind) and isinstance(site[1], str)
        if not is_site:
            raise ValueError(f"{list(site)!r} is not a kind of node and a hook")
    places, indices = arrays["node_site"].tolist(), arrays["node_index"].tolist()
    if min(places + indices, default=0) < 0 or max(places, default=0) >= len(sites):
        raise ValueError("a node has a place or an index that there is not")
    at = arrays["node_pos"].tolist() if "node_pos" in arrays else [-1] * len(places)
    if min(at, default=-1) < -1:
        raise ValueError("a node has a negative position")
    nodes = tuple(
        Node(sites[place][0], sites[place][1], index, None if pos < 0 else pos)
        for place, index, pos in zip(places, indices, at, strict=True)
    )
    for node in nodes:
        _check_layer(node)
    return nodes


def _check_layer(node: Node) -> None:
    try:
        layer = layer_of(node) or 0
    except (ValueError, IndexError):
        layer = MAX_LAYER
    if not -1 <= layer < MAX_LAYER:
        raise ValueError(f"{node.hook[:80]!r} is not the hook of a {node.kind}")
