"""Reads an attribution graph from the JSON of ``write_json.py``, or of circuit-tracer.

1. Our own files give back the graph, exactly: what the format has no place for, biases too, stands under
   ``gemmascope``. Nodes keep their order. Where links are missing, ``residual`` becomes NaN.
2. Files of circuit-tracer have no sites, no exact order and no probabilities but those of targets. Its
   error of layer ``l`` may be called as feature ``l`` of layer 0 is: nodes are known by name *and* type;
   a link from such a name is the feature's where the error could not reach the target, or where it comes
   first (circuit-tracer writes features first). What stays open is counted in
   ``metadata["ambiguous_links"]``.
   Their labels of tokens and targets are taken out of the words that the viewers put around them.
3. A link to or from no node, and one that leads backwards, make the file a damaged one, and so does all
   that does not make a graph (``defects.py``): numbers that are not finite, positions beyond the prompt.
4. The saved view of the viewers, ``qParams``, becomes part of the metadata (``viewer_files.py``).

Cost: a loop over nodes and links.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gemmascope_plugin.errors import BadFileError, MissingFileError
from gemmascope_plugin.files.bundle import from_json_value
from gemmascope_plugin.files.json_file import bad_file, parse_json, read_json
from gemmascope_plugin.graphs.adjacency import Adjacency
from gemmascope_plugin.graphs.components_json import (
    Selection,
    components_from_json,
    is_of_components,
)
from gemmascope_plugin.graphs.defects import TRACE_COLUMNS, Parts, node_defect
from gemmascope_plugin.graphs.node import table_columns
from gemmascope_plugin.graphs.viewer_files import changed_labels, read_view
from gemmascope_plugin.graphs.write_json import (
    EMBEDDING,
    FEATURE,
    LOGIT,
    SHIFT,
    SITES,
    has_word,
)

if TYPE_CHECKING:
    import pandas as pd

_KINDS = {EMBEDDING: "token", FEATURE: "feature", LOGIT: "target"}
_TYPES = {"layer": "int64", "pos": "int64", "index": "int64"}
_WORDS = {
    "token": re.compile(r'Emb: "(.*)"', re.DOTALL),
    "target": re.compile(r'Output "(.*)" \(p=[^()]*\)', re.DOTALL),
}
"""What the viewers put around a label."""
_DIGITS = re.compile(r"-?[0-9]{1,15}")
MAX_SIZE, FIX = 1 << 30, "write the graph again"
_ORDER = {"token": 0, "feature": 1, "error": 2, "target": 3}


def read_graph(source: str | Path | Mapping[str, Any]) -> tuple[Parts, Selection | None]:
    """A graph from a file, or from its content; of a circuit also what is kept."""
    if isinstance(source, Mapping):
        name = "the graph"
        content = _plain_copy(source)
    else:
        path = Path(source).expanduser()
        name = repr(str(path))
        if not path.is_file():
            raise MissingFileError(f"There is no graph at {name}", fix="graph.to_json(...)")
        content = read_json(path, max_size=MAX_SIZE, fix=FIX)
    try:
        if is_of_components(content):
            return components_from_json(content)
        return _decoded(content), None
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as fault:
        raise BadFileError(
            f"{name} is not a graph: {_shown(fault)}",
            exists="the JSON of circuit-tracer and of graph.to_json(...)",
        ) from fault


def _plain_copy(content: Mapping[str, Any]) -> Any:
    """Content that is not in a file, through the same gate as a file's."""
    try:
        text = json.dumps(dict(content), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as fault:
        raise bad_file("the graph", str(fault), FIX) from fault
    return parse_json(text, "the graph", fix=FIX)


def _shown(fault: Exception) -> str:
    text = f"{fault} is missing" if isinstance(fault, KeyError) else str(fault)
    return text if len(text) <= 200 else f"{text[:197]}..."


def _decoded(content: Mapping[str, Any]) -> Parts:
    """The graph."""
    import pandas as pd

    head = content["metadata"]
    extra = head.get("gemmascope")
    version = head.get("schema_version", 0)
    tokens = head["prompt_tokens"]
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise ValueError("prompt_tokens is not a list of texts")
    layers = [_layer(node) for node in content["nodes"]]
    top = max(layers, default=0)
    labels = changed_labels(content.get("qParams", {}))
    rows = [_row(node, version, top, labels) for node in content["nodes"]]
    if extra is None:
        rows.sort(key=_in_order)
    if not rows:
        raise ValueError("it has no nodes")
    rows = rows if extra is None else with_biases(rows, extra)
    nodes = pd.DataFrame(rows).astype(_TYPES)
    names = [*TRACE_COLUMNS, *(["influence"] if extra is None or extra["pruned"] else [])]
    columns = table_columns(nodes[names])
    if not nodes["id"].is_unique:
        twice = nodes.loc[nodes["id"].duplicated(), "id"].tolist()[0]
        raise ValueError(f"the node {twice!r} is there twice")
    defect = node_defect(columns, len(tokens))
    if defect is not None:
        raise ValueError(defect)
    dtype = "float32" if extra is None else extra["dtype"]
    if dtype not in ("float16", "float32", "float64"):
        raise ValueError(f"its dtype is {dtype!r}")
    links = content["links"]
    if extra is not None and "biases" in extra:
        links = [*links, *extra["biases"]["links"]]
    edges, ambiguous = _edges(nodes, links, dtype)
    metadata = _metadata(head, ambiguous) if extra is None else from_json_value(extra["metadata"])
    if not isinstance(metadata, dict):
        raise ValueError("its metadata are not an object")
    if extra is not None and not is_whole(extra, edges.n_edges):
        metadata = without_residual(metadata)
    ids = dict(zip(reversed(nodes["node_id"]), reversed(nodes["id"]), strict=True))
    metadata |= read_view(content.get("qParams", {}), ids)
    return Parts(columns, edges, tuple(tokens), metadata)


def _in_order(row: Mapping[str, Any]) -> tuple[int, int, int]:
    """Tokens, then layer by layer features before errors, then targets."""
    kind = row["kind"]
    outer = {"token": 0, "target": 2}.get(kind, 1)
    return outer, row["layer"] if outer == 1 else 0, _ORDER[kind]


def _row(
    node: Mapping[str, Any], version: int, top: int, labels: Mapping[str, str]
) -> dict[str, Any]:
    """A row of the table, with ``node_id`` and ``explained`` beside its columns."""
    kind = "error" if "error" in node["feature_type"] else _KINDS.get(node["feature_type"])
    if kind is None:
        raise ValueError(f"its node {node['node_id']!r} is of the type {node['feature_type']!r}")
    if not isinstance(node["node_id"], str) or not isinstance(node["clerp"], str):
        raise ValueError("a node has an id or a label that is not text")
    extra = node.get("gemmascope", {})
    layer, pos = _layer(node), _whole(node["ctx_idx"], "ctx_idx")
    index, activation = -1, node.get("activation")
    if kind == "token":
        index = _whole(node["node_id"].split("_")[1], "token")
    elif kind == "feature":
        index = _index(node, version) % (SHIFT if extra else sys.maxsize)
    elif kind == "target":
        index, layer = extra.get("token", node["feature"]), extra.get("layer", top - 1)
        activation = from_json_value(extra.get("value"))
    weight = node.get("token_prob") or 0.0 if kind == "target" else extra.get("weight", 0.0)
    site = "" if kind in ("token", "target") else f"blocks.{layer}.{SITES['mlp']}"
    site = extra.get("site", site)
    if kind in ("feature", "error") and not has_word(site):
        raise ValueError(f"its node {node['node_id']!r} has the site {site!r:.60}")
    influence, label = node.get("influence"), node["clerp"]
    if kind in _WORDS and "label" not in extra:
        match = _WORDS[kind].fullmatch(label)
        label = match[1] if match else label
    changed = labels.get(f"{node['layer']}_{node.get('feature')}_{pos}")
    explained = extra.get("explained", kind in ("feature", "target"))
    if not isinstance(explained, bool):
        raise ValueError(f"its node {node['node_id']!r} has explained {explained!r}")
    return {
        "id": extra.get("id", f"{kind}:{node['node_id']}"),
        "kind": kind,
        "site": site,
        "layer": _whole(layer, "layer"),
        "pos": pos,
        "index": _whole(index, "feature"),
        "activation": np.nan if activation is None else _number(activation, "activation"),
        "weight": _number(weight, "token_prob"),
        "label": extra.get("label", label) if changed is None or kind != "feature" else changed,
        "influence": 1.0 if influence is None else _number(influence, "influence"),
        "node_id": node["node_id"],
        "explained": explained,
    }


def _layer(node: Mapping[str, Any]) -> int:
    return -1 if node["layer"] == "E" else _whole(node["layer"], "layer")


def _whole(value: object, name: str) -> int:
    """A whole number, or a text of its digits, up to 2 ** 53, as JSON has them."""
    if isinstance(value, str) and _DIGITS.fullmatch(value):
        value = int(value)
    if type(value) is not int or abs(value) > 1 << 53:
        raise ValueError(f"{name} is {value!r:.60}, not a whole number")
    return value


def _number(value: Any, name: str) -> float:
    if type(value) not in (int, float):
        raise ValueError(f"{name} is {value!r:.60}, not a number")
    return float(value)


def _index(node: Mapping[str, Any], version: int) -> int:
    """The index of a feature in its dictionary."""
    if version < 1:
        return _whole(node["node_id"].split("_")[1], "feature")
    number = _whole(node["feature"], "feature")
    if number < 0:
        raise ValueError(f"feature is {number}")
    return from_cantor(number)[1]


def _edges(
    nodes: pd.DataFrame, links: Iterable[Mapping[str, Any]], dtype: str
) -> tuple[Adjacency, int]:
    """The matrix, and how many links could begin at two nodes."""
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
                raise ValueError(f"a link ends at {end!r}, which is not a node")
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
        entries[target, free[0]] = _number(link["weight"], "the weight of a link")
    rows = explained.nonzero()[0]
    row_of = {int(node): row for row, node in enumerate(rows)}
    order = sorted(entries)
    cells = ([row_of[target] for target, _ in order], [source for _, source in order])
    with np.errstate(over="ignore"):  # found out just below
        data = np.array([entries[key] for key in order], dtype=np.float64).astype(dtype)
    if not np.isfinite(data).all():
        raise ValueError(f"a link has a weight that {dtype} does not have")
    matrix = sp.csr_array((data, cells), shape=(len(rows), len(nodes)))
    return Adjacency(matrix, rows), ambiguous


def _metadata(head: Mapping[str, Any], ambiguous: int) -> dict[str, Any]:
    named = {"prompt": head["prompt"], "model": head["scan"]}
    settings = {**head.get("generation_settings", {}), **head.get("pruning_settings", {})}
    if head.get("node_threshold") is not None:
        settings["node_threshold"] = head["node_threshold"]
    return {**from_json_value({**named, **settings}), "ambiguous_links": ambiguous}


def from_cantor(number: int) -> tuple[int, int]:
    """Layer and index of a number."""
    diagonal = (math.isqrt(8 * number + 1) - 1) // 2
    index = number - diagonal * (diagonal + 1) // 2
    return diagonal - index, index


# ------------------------------------------------------------------------------------------ biases
def with_biases(rows: Sequence[dict[str, Any]], extra: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a table with those of biases where they were."""
    whole = list(rows)
    for record in extra.get("biases", {"nodes": []})["nodes"]:
        row = from_json_value(record)
        place = row.pop("place")
        if type(place) is not int or not 0 <= place <= len(whole):
            raise ValueError(f"a bias has the place {place!r:.60}")
        if row["kind"] != "bias" or not isinstance(row["id"], str):
            raise ValueError(f"{row['id']!r:.60} stands among the biases")
        for name in ("layer", "pos", "index"):
            if type(row[name]) is not int:
                raise ValueError(f"the {name} of {row['id']!r:.60} is not a whole number")
        for name in ("activation", "weight"):
            if type(row[name]) not in (int, float):
                raise ValueError(f"the {name} of {row['id']!r:.60} is not a number")
        whole.insert(place, {"influence": 1.0, **row, "node_id": row["id"], "explained": False})
    return whole


def is_whole(extra: Mapping[str, Any], n_edges: int) -> bool:
    """Whether a graph that was read has all that it was written with."""
    if "biases" not in extra:
        return not extra.get("bias_sums")
    return extra.get("n_edges") == n_edges


def without_residual(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata that no longer say how far rows are from their sums."""
    unknown = {"residual": math.nan} if "residual" in metadata else {}
    return {**metadata, **unknown}
