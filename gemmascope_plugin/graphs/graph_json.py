"""An attribution graph as the JSON that circuit-tracer's viewer and Neuronpedia show.

The keys are those of circuit-tracer's ``frontend/graph_models.py`` and of Neuronpedia's
``graph-schema.json`` 1.0.0; nodes are named in ``graph_json_nodes.py``.

1. Biases are no nodes, as Neuronpedia would take them for targets: they and their links
   (``graph_json_biases.py``), their column sums and the largest residual of a row stand in
   ``metadata.gemmascope``, beside all else that the format has no place for, and what a viewer will not
   show (``limits``).
2. The viewers compute scores from nodes and links; on graphs with transcoders only they are ours.
3. The view that a viewer has saved (``qParams``: pins, supernodes, the rest) comes from ``metadata``
   where ``from_json`` has put it, and goes back into the file (``graph_json_view.py``).
4. A folder has a list of its graphs, ``graph-metadata.json``, one entry per name, written under a lock
   after the graph: it never names one that is not there.

Cost: about 75 bytes an edge and 400 a node.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemmascope_plugin.errors import GemmaScopeError, UnknownNameError
from gemmascope_plugin.files.bundle import as_json
from gemmascope_plugin.files.json_file import Record, read_json
from gemmascope_plugin.files.lock import file_lock
from gemmascope_plugin.files.whole import write_whole
from gemmascope_plugin.graphs.graph_json_biases import bias_records
from gemmascope_plugin.graphs.graph_json_nodes import node_records
from gemmascope_plugin.graphs.graph_json_view import VIEW, saved_view
from gemmascope_plugin.graphs.influence import TraceScores
from gemmascope_plugin.graphs.parts import Parts, ends

INDEX = "graph-metadata.json"
MAX_SLUG, MAX_INDEX_SIZE = 200, 1 << 26
_SLUG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
"""Names that Windows has for devices."""


def to_json(
    parts: Parts,
    scores: TraceScores,
    shares: np.ndarray,
    *,
    slug: str,
    scan: str | None = None,
    source_set: str | None = None,
    transcoder_list: Sequence[str] = (),
    groups: Mapping[str, Sequence[str]] | None = None,
    pinned: Sequence[str] | None = None,
    description: str = "",
) -> dict[str, Any]:
    """The content of a graph file.

    Args:
        parts: The graph.
        scores: Its scores.
        shares: Cumulative share of influence of each node, ``[node]``.
        slug: Name of the graph, that of its file without ``.json``.
        scan: The model as Neuronpedia names it, or where circuit-tracer's viewer finds examples; the
            model's own name by default.
        source_set: Neuronpedia's dashboards of the features, e.g. ``gemmascope-transcoder-16k``.
        transcoder_list: For circuit-tracer's viewer: where examples of each layer lie.
        groups: Supernodes: name to ids of nodes; those of the saved view by default.
        pinned: Ids of nodes that the viewer shows; those of the saved view by default.
        description: Shown with the graph.

    Raises:
        UnknownNameError: A group or pin of a node that is not there, or the slug is not a file name.
        GemmaScopeError: The metadata do not fit into JSON, or nodes were grouped already.
    """
    check_slug(slug)
    if "supernodes" in parts.metadata:
        raise GemmaScopeError(
            "The graph has grouped nodes, whose members this format wants to know",
            fix="graph.to_json(slug, groups=...) of the graph before collapse",
        )
    kept = (parts.nodes["kind"] != "bias").to_numpy()
    rows = parts.nodes.assign(share=shares).loc[kept].to_dict("records")
    explained = (parts.edges.row_of >= 0)[kept].tolist()
    nodes = node_records(rows, explained, parts.tokens, _n_layers(parts))
    names = parts.nodes["id"].to_numpy(dtype=object, copy=True)
    names[kept] = [node["node_id"] for node in nodes]
    names_of = dict(zip(parts.nodes["id"][kept], names[kept], strict=True))
    view = saved_view(parts.metadata, names_of, groups, pinned)
    head = {"slug": slug, "scan": scan or str(parts.metadata.get("model", "model"))}
    biases = {"nodes": bias_records(parts.nodes), "links": _links(parts, names, ~kept)}
    details = {**_own_metadata(parts, scores), "biases": biases, "limits": _limits(rows)}
    shown = _metadata(parts, description, source_set, transcoder_list)
    return {
        "metadata": {**head, **shown, "gemmascope": details},
        "qParams": view,
        "nodes": nodes,
        "links": _links(parts, names, kept),
    }


def check_slug(slug: str) -> None:
    """Refuses a name of a graph that is not a plain file name, or is that of the list of graphs.

    Raises:
        UnknownNameError: With what it may consist of.
    """
    if not isinstance(slug, str) or not _SLUG.fullmatch(slug) or len(slug) > MAX_SLUG:
        raise UnknownNameError(
            f"The slug {slug!r} is no file name", exists="letters, digits, '.', '_', '-'"
        )
    if f"{slug.lower()}.json" == INDEX or _RESERVED.fullmatch(slug):
        raise UnknownNameError(
            f"The slug {slug!r} names a file that is something else", fix=f"slug='my-{slug}'"
        )


def write_json(path: str | Path, content: Mapping[str, Any]) -> Path:
    """Writes a graph file, whole or not at all.

    Raises:
        GemmaScopeError: The file cannot be written.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise GemmaScopeError(f"{str(path)!r} is a folder", fix=f"{str(path / 'graph.json')!r}")
    data = json.dumps(content, allow_nan=False, separators=(",", ":")).encode()
    return write_whole(path, lambda file: file.write(data))


def add_to_folder(folder: str | Path, content: Mapping[str, Any]) -> Path:
    """Writes ``<slug>.json`` and enters it in ``graph-metadata.json``, in the place of an older one.

    Returns:
        The graph file.

    Raises:
        FolderInUseError: Another process writes into the folder, for more than a minute.
        BadFileError: The list that is there is damaged.
        GemmaScopeError: A file cannot be written.
    """
    folder, metadata = Path(folder).expanduser(), content["metadata"]
    check_slug(metadata["slug"])
    info = {**metadata["info"], "create_time_ms": time.time_ns() // 10**6}
    metadata = {**metadata, "info": info}
    index = folder / INDEX
    with file_lock(folder / f".{INDEX}.lock", "a graph", shown=folder, wait=60.0):
        listed = [each for each in _listed(index) if each.get("slug") != metadata["slug"]]
        path = write_json(folder / f"{metadata['slug']}.json", {**content, "metadata": metadata})
        listed.append({name: value for name, value in metadata.items() if name != "gemmascope"})
        write_json(index, {"graphs": listed})
    return path


def _listed(index: Path) -> list[dict[str, Any]]:
    """What the list of graphs has.

    Raises:
        BadFileError: It is damaged.
    """
    if not index.exists():
        return []
    fix = "mend it, delete it, or another folder"
    content = read_json(index, max_size=MAX_INDEX_SIZE, fix=fix)
    return Record(content, index, fix).list_of("graphs", dict)


def _links(parts: Parts, names: np.ndarray, kept: np.ndarray) -> list[dict[str, Any]]:
    """Links from some nodes."""
    source, target, weight = ends(parts.edges)
    there = kept[source]
    weights = _shortest(weight[there]).tolist()
    found = zip(names[source[there]], names[target[there]], weights, strict=True)
    return [{"source": s, "target": t, "weight": w} for s, t, w in found]


def _shortest(weights: np.ndarray) -> np.ndarray:
    """Numbers whose shortest text gives the same number in the weights' own type.

    Of float32 those with the fewest digits from six on: a whole number of at most nine digits times or
    over a power of ten is rounded once. Texts make the same numbers, six times slower.
    """
    if weights.dtype != np.float32:
        return weights.astype(str).astype(np.float64)
    numbers, size = weights.astype(np.float64), np.abs(weights.astype(np.float64))
    usual = (size > 1e-12) & (size < 1e12)
    numbers[~usual] = weights[~usual].astype(str).astype(np.float64)
    left = np.flatnonzero(usual)
    for digits in range(6, 10):
        exact = weights[left].astype(np.float64)
        places = digits - 1 - np.floor(np.log10(np.abs(exact)))
        up, down = 10.0 ** places.clip(min=0), 10.0 ** (-places).clip(min=0)
        near = np.rint(exact * up / down) / up * down
        fits = near.astype(np.float32) == weights[left]
        numbers[left[fits]] = near[fits]
        left = left[~fits]
    assert not len(left), "nine digits are enough for float32"
    return numbers


def _metadata(
    parts: Parts, description: str, source_set: str | None, transcoder_list: Sequence[str]
) -> dict[str, Any]:
    given = parts.metadata
    settings = ("max_feature_nodes", "min_share")
    thresholds = ("node_threshold", "edge_threshold")
    return {
        "schema_version": 1,
        "prompt": str(given.get("prompt", "".join(parts.tokens))),
        "prompt_tokens": list(parts.tokens),
        "transcoder_list": list(transcoder_list),
        "node_threshold": given.get("node_threshold"),
        "feature_details": {} if source_set is None else {"neuronpedia_source_set": source_set},
        "info": {"description": description, "generator": {"name": "gemmascope_plugin"}},
        "generation_settings": {name: as_json(given.get(name)) for name in settings},
        "pruning_settings": {name: given.get(name) for name in thresholds},
    }


def _own_metadata(parts: Parts, scores: TraceScores) -> dict[str, Any]:
    sums = np.asarray(parts.edges.matrix.sum(0)).ravel()
    biases = (parts.nodes["kind"] == "bias").to_numpy()
    names = parts.nodes["id"].to_numpy()[biases]
    return {
        # the view stands where the viewers have it, and may change there
        "metadata": as_json({k: v for k, v in parts.metadata.items() if k != VIEW}),
        "replacement_score": scores.replacement,
        "completeness_score": scores.completeness,
        "residual": as_json(parts.metadata.get("residual")),
        "bias_sums": dict(zip(names, map(float, sums[biases]), strict=True)),
        "pruned": "influence" in parts.nodes,
        "n_edges": parts.edges.n_edges,
        "dtype": str(parts.edges.matrix.dtype),
    }


def _limits(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a viewer will not show as it is."""
    found = []
    if max((row["layer"] for row in rows if row["kind"] != "target"), default=0) < 1:
        found.append("Neuronpedia shows no graph without a node above layer 0")
    if any(row["kind"] == "feature" and row["weight"] for row in rows):
        found.append("features are targets, from which the viewers start no scores")
    if any(row["site"] and not row["site"].endswith("hook_mlp_out") for row in rows):
        found.append("dictionaries beside the MLPs' are shown without examples")
    return found


def _n_layers(parts: Parts) -> int:
    inner = parts.nodes.loc[parts.nodes["kind"] != "target", "layer"]
    return int(parts.metadata.get("n_layers", int(inner.max()) + 1))
