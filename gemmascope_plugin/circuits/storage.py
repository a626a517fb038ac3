"""Keeps a circuit in a folder and reads it back, exactly.

    circuit.json         format, version, hooks of the nodes, names of the ports, what is ranked, counts,
                         meanings of nodes (by their place), metadata
    circuit.safetensors  node_site (place in ``sites``), node_index, kept; source, target, port,
                         edge_scores; node_scores, node_pos (-1 for all) and pos where there are any

Version 2; version 1 had neither ranks, meanings nor positions of nodes, and is read.

1. The arrays are written first, then the JSON, which holds their SHA-256: each file under a temporary
   name that is then renamed. A JSON beside the arrays of another save is found out.
2. Reading trusts neither: names, types, lengths, counts, ranges and what makes arrays a graph are
   checked before a graph is built. No pickle.

Cost: reading and writing 22 bytes per edge.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import Bool, Shaped
from safetensors import SafetensorError
from safetensors.torch import load, save

from gemmascope_plugin.circuits.graph import PORTS, Graph
from gemmascope_plugin.circuits.soundness import content_fault
from gemmascope_plugin.circuits.tables import layer_of
from gemmascope_plugin.errors import BadFileError, GemmaScopeError, MissingFileError
from gemmascope_plugin.files.json_file import MAX_SIZE, read_json
from gemmascope_plugin.files.whole import write_whole
from gemmascope_plugin.patching.node import Node, NodeKind

FORMAT, VERSION = "gemmascope_plugin circuit", 2
JSON, ARRAYS = "circuit.json", "circuit.safetensors"
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
    folder: str | Path, graph: Graph, kept: Bool[torch.Tensor, " unit"], *, signed: bool
) -> Path:
    """Writes a circuit; an older one in the folder is replaced.

    Args:
        folder: Made if need be.
        graph: The graph.
        kept: Which units are kept.
        signed: Whether they are ranked by signed score.

    Returns:
        The folder.

    Raises:
        GemmaScopeError: The folder cannot be written, or the metadata do not fit into JSON.
    """
    folder = Path(folder).expanduser()
    _check_plain(graph.metadata, "metadata")
    sites = list(dict.fromkeys((node.kind, node.hook) for node in graph.nodes))
    place = {site: i for i, site in enumerate(sites)}
    arrays = _arrays(graph, kept, place)
    data = save({name: array.clone().contiguous() for name, array in arrays.items()})
    content = {
        "format": FORMAT,
        "version": VERSION,
        "n_nodes": len(graph.nodes),
        "n_edges": graph.n_edges,
        "n_kept": int(kept.sum()),
        "signed": signed,
        "ranked": graph.ranked,
        "ports": PORTS,
        "sites": sites,
        "meanings": {
            str(i): graph.meanings[node]
            for i, node in enumerate(graph.nodes)
            if node in graph.meanings
        },
        "metadata": graph.metadata,
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    text = json.dumps(content, indent=1).encode() + b"\n"
    if len(text) > MAX_SIZE:
        raise GemmaScopeError(
            f"The metadata and meanings of {graph!r} take {len(text)} bytes as JSON",
            exists=f"room for {MAX_SIZE}",
            fix="Graph(..., metadata=) without large entries",
        )
    write_whole(folder / ARRAYS, lambda file: file.write(data))
    write_whole(folder / JSON, lambda file: file.write(text))
    return folder


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


def load_circuit(folder: str | Path) -> tuple[Graph, Bool[torch.Tensor, " unit"], bool]:
    """Reads what :func:`save_circuit` has written.

    Returns:
        The graph, which units are kept, and whether they are ranked by signed score.

    Raises:
        MissingFileError: One of the files is not there.
        BadFileError: They are damaged, contradict one another, or are of an unknown version.
    """
    folder = Path(folder).expanduser()
    for name in (JSON, ARRAYS):
        if not (folder / name).is_file():
            raise MissingFileError(
                f"There is no circuit in {str(folder)!r}: no {name}",
                fix="a folder that circuit.save(folder) has written",
            )
    content = read_json(folder / JSON)
    if content.get("format") != FORMAT:
        raise _bad(folder / JSON, f"its format is {content.get('format')!r}, not {FORMAT!r}")
    if content.get("version") not in (1, VERSION):
        raise BadFileError(
            f"{str(folder / JSON)!r} is of version {content.get('version')!r}",
            exists=f"versions 1 and {VERSION}",
            fix="a newer gemmascope_plugin",
        )
    try:
        data = (folder / ARRAYS).read_bytes()
        if hashlib.sha256(data).hexdigest() != content.get("sha256"):
            raise _bad(folder / ARRAYS, f"it is not the file that {JSON} was written with")
        arrays = load(data)
        _check_arrays(arrays, content.get("ranked"))
        return _decoded(content, arrays)
    except (OSError, SafetensorError) as fault:
        raise _bad(folder / ARRAYS, str(fault)) from fault
    except (KeyError, TypeError, ValueError, IndexError) as fault:
        raise _bad(folder / JSON, str(fault)) from fault


def _check_plain(value: Any, where: str) -> None:
    """Refuses what JSON cannot give back as it was.

    Raises:
        GemmaScopeError: Names the entry.
    """
    if isinstance(value, Mapping):
        for key, each in value.items():
            if not isinstance(key, str):
                raise GemmaScopeError(f"{where} has the key {key!r}, which is no text")
            _check_plain(each, f"{where}[{key!r}]")
    elif isinstance(value, tuple):
        for i, each in enumerate(value):
            _check_plain(each, f"{where}[{i}]")
    elif not (value is None or isinstance(value, str | bool | int | float)):
        raise GemmaScopeError(
            f"{where} is {type(value).__name__}, which cannot be saved",
            exists="text, numbers, booleans, None, and tuples, lists and dicts of them",
        )


def _check_arrays(arrays: Arrays, ranked: Any) -> None:
    """Names, types and lengths.

    Raises:
        ValueError: What is wrong.
    """
    if ranked not in (None, "edge", "node"):
        raise ValueError(f"ranked is {ranked!r}, neither edge nor node")
    has_edges = any(name in arrays for name in (*_EDGES, "pos"))
    ranks_edges = has_edges if ranked is None else ranked == "edge"
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
        length = len(arrays[of])
        if array.dtype != _TYPES[name] or array.shape != (length,):
            raise ValueError(
                f"array {name!r} is {tuple(array.shape)} of {array.dtype}, not ({length},) of "
                f"{_TYPES[name]}"
            )
    if not 0 < len(arrays["kept"]) == len(arrays[unit]):
        raise ValueError(f"array 'kept' has {len(arrays['kept'])} entries")


def _decoded(
    content: dict[str, Any], arrays: Arrays
) -> tuple[Graph, Bool[torch.Tensor, " unit"], bool]:
    """The circuit.

    Raises:
        ValueError: What is wrong; also KeyError, TypeError, IndexError.
    """
    signed, metadata = content["signed"], content["metadata"]
    ranked = content.get("ranked")
    if not isinstance(signed, bool) or not isinstance(metadata, dict):
        raise ValueError("signed is no truth value, or metadata no object")
    if content["ports"] != list(PORTS):
        raise ValueError(f"ports are {content['ports']!r}, not {list(PORTS)}")
    nodes, kept = _nodes(content["sites"], arrays), arrays["kept"]
    edges = {name: arrays.get(name, torch.empty(0, dtype=t)) for name, t in _EDGES.items()}
    optional = {name: arrays.get(name) for name in ("node_scores", "pos")}
    counts = {"n_nodes": len(nodes), "n_edges": len(edges["source"]), "n_kept": int(kept.sum())}
    for name, count in counts.items():
        if content[name] != count:
            raise ValueError(f"{name} is {content[name]!r}, but the arrays have {count}")
    meanings = _meanings(content.get("meanings", {}), nodes)
    fault = content_fault(nodes, **optional, **edges, ranked=ranked)
    if fault is not None:
        raise ValueError(fault)
    graph = Graph(nodes, **optional, **edges, metadata=metadata, ranked=ranked, meanings=meanings)
    return graph, kept, signed


def _meanings(content: Any, nodes: tuple[Node, ...]) -> dict[Node, str]:
    if not isinstance(content, dict) or not all(isinstance(x, str) for x in content.values()):
        raise ValueError("meanings are no texts by node")
    return {nodes[int(place)]: text for place, text in content.items()}


def _nodes(sites: Any, arrays: Arrays) -> tuple[Node, ...]:
    for kind, hook in sites:
        if kind not in get_args(NodeKind) or not isinstance(hook, str):
            raise ValueError(f"{[kind, hook]!r} is no kind of node and hook")
    places, indices = arrays["node_site"].tolist(), arrays["node_index"].tolist()
    if min(places + indices, default=0) < 0:
        raise ValueError("a node has a negative place or index")
    at = arrays["node_pos"].tolist() if "node_pos" in arrays else [-1] * len(places)
    if min(at, default=-1) < -1:
        raise ValueError("a node has a negative position")
    nodes = tuple(
        Node(sites[place][0], sites[place][1], index, None if pos < 0 else pos)
        for place, index, pos in zip(places, indices, at, strict=True)
    )
    for node in nodes:
        layer_of(node)
    return nodes


def _bad(path: Path, why: str) -> BadFileError:
    return BadFileError(f"cannot read {str(path)!r}: {why}", fix="save the circuit again")
