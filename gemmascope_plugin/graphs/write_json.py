"""An attribution graph as the JSON that circuit-tracer's viewer and Neuronpedia show.

============================ ======================== ================================ ==================
node                         ``feature_type``         ``node_id``                      ``feature``
============================ ======================== ================================ ==================
feature of an MLP            cross layer transcoder   ``{layer}_{index}_{pos}``        Cantor pair
feature elsewhere            cross layer transcoder   ``{layer}_{site}_{index}_{pos}`` the same, shifted
error                        mlp reconstruction error ``{layer}_error_{site}_{pos}``   -1
token                        embedding                ``E_{token}_{pos}``              position
target                       logit                    ``{n_layers + 1}_{token}_{pos}`` token
============================ ======================== ================================ ==================

The keys are those of circuit-tracer's ``frontend/graph_models.py`` and of Neuronpedia's
``graph-schema.json`` 1.0.0.

1. The Cantor pair is of layer and index; dictionaries beside the MLPs' shift their index by ``SHIFT``
   each, so that no two features share a number. Targets other than tokens are virtual ones, numbered from
   ``VIRTUAL``, which no vocabulary reaches. ``token_prob`` is a target's weight, from which the viewers
   compute the same scores as we; on graphs with transcoders only they are ours.
2. Biases are not among the nodes, as viewers would take them for targets. Without them rows do not sum to
   what they explain, so a record of each with its place among all nodes, and their links, stand in
   ``metadata.gemmascope``, beside all else that the format has no place for, and what a viewer will not
   show (``limits``).
3. The view that a viewer has saved (``qParams``: pins, supernodes, the rest) is in the metadata, where
   reading has put it, and goes back into the file (``viewer_files.py``).

Cost: about 75 bytes an edge and 400 a node.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gemmascope_plugin.errors import GemmaScopeError
from gemmascope_plugin.files.bundle import as_json
from gemmascope_plugin.graphs.defects import TRACE_COLUMNS
from gemmascope_plugin.graphs.graph_arrays import GraphArrays
from gemmascope_plugin.graphs.pruning import TraceScores
from gemmascope_plugin.graphs.viewer_files import VIEW, check_slug, saved_view

if TYPE_CHECKING:
    import pandas as pd


FEATURE, ERROR = "cross layer transcoder", "mlp reconstruction error"
EMBEDDING, LOGIT = "embedding", "logit"
TYPES = {"feature": FEATURE, "error": ERROR, "token": EMBEDDING, "target": LOGIT}
SHIFT, VIRTUAL = 1 << 21, 1 << 20
SITES = {"mlp": "hook_mlp_out", "att": "attn.hook_z", "res": "hook_resid_post"}
"""Words of sites, the main set first; a place is the number of shifts."""
_WORDS = {hook: word for word, hook in SITES.items()}
_PLACE = re.compile(r"blocks\.\d+\.(.+)")

Row = Mapping[str, Any]


def to_json(
    graph: GraphArrays,
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
        graph: The graph of a prompt.
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
    if "supernodes" in graph.metadata:
        raise GemmaScopeError(
            "The graph has grouped nodes, whose members this format wants to know",
            fix="graph.to_json(slug, groups=...) of the graph before collapse",
        )
    is_node = (graph.nodes["kind"] != "bias").to_numpy()
    rows = graph.nodes.assign(share=shares).loc[is_node].to_dict("records")
    explained = (graph.rows.row_of >= 0)[is_node].tolist()
    nodes = node_records(rows, explained, graph.tokens, _n_layers(graph))
    names = graph.nodes["id"].to_numpy(dtype=object, copy=True)
    names[is_node] = [node["node_id"] for node in nodes]
    names_of = dict(zip(graph.nodes["id"][is_node], names[is_node], strict=True))
    view = saved_view(graph.metadata, names_of, groups, pinned)
    head = {"slug": slug, "scan": scan or str(graph.metadata.get("model", "model"))}
    biases = {"nodes": bias_records(graph.nodes), "links": _links(graph, names, ~is_node)}
    details = {**_private_metadata(graph, scores), "biases": biases, "limits": _limits(rows)}
    shown = _metadata(graph, description, source_set, transcoder_list)
    return {
        "metadata": {**head, **shown, "gemmascope": details},
        "qParams": view,
        "nodes": nodes,
        "links": _links(graph, names, is_node),
    }


def _links(graph: GraphArrays, names: np.ndarray, is_shown: np.ndarray) -> list[dict[str, Any]]:
    """Links from some nodes."""
    edges = graph.rows
    entries = np.flatnonzero(is_shown[edges.source])
    weights = shortest(edges.weight[entries]).tolist()
    ends = names[edges.source[entries]], names[edges.target[entries]]
    return [{"source": s, "target": t, "weight": w} for s, t, w in zip(*ends, weights, strict=True)]


def shortest(weights: np.ndarray) -> np.ndarray:
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
    graph: GraphArrays, description: str, source_set: str | None, transcoder_list: Sequence[str]
) -> dict[str, Any]:
    details = graph.metadata
    settings = ("max_feature_nodes", "min_share")
    thresholds = ("node_threshold", "edge_threshold")
    return {
        "schema_version": 1,
        "prompt": str(details.get("prompt", "".join(graph.tokens))),
        "prompt_tokens": list(graph.tokens),
        "transcoder_list": list(transcoder_list),
        "node_threshold": details.get("node_threshold"),
        "feature_details": {} if source_set is None else {"neuronpedia_source_set": source_set},
        "info": {"description": description, "generator": {"name": "gemmascope_plugin"}},
        "generation_settings": {name: as_json(details.get(name)) for name in settings},
        "pruning_settings": {name: details.get(name) for name in thresholds},
    }


def _private_metadata(graph: GraphArrays, scores: TraceScores) -> dict[str, Any]:
    sums = np.asarray(graph.rows.matrix.sum(0)).ravel()
    biases = (graph.nodes["kind"] == "bias").to_numpy()
    names = graph.nodes["id"].to_numpy()[biases]
    return {
        # the view stands where the viewers have it, and may change there
        "metadata": as_json({k: v for k, v in graph.metadata.items() if k != VIEW}),
        "replacement_score": scores.replacement,
        "completeness_score": scores.completeness,
        "residual": as_json(graph.metadata.get("residual")),
        "bias_sums": dict(zip(names, map(float, sums[biases]), strict=True)),
        "pruned": "influence" in graph.nodes,
        "n_edges": graph.rows.n_edges,
        "dtype": str(graph.rows.matrix.dtype),
    }


def _limits(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a viewer will not show as it is."""
    limits = []
    if max((row["layer"] for row in rows if row["kind"] != "target"), default=0) < 1:
        limits.append("Neuronpedia shows no graph without a node above layer 0")
    if any(row["kind"] == "feature" and row["weight"] for row in rows):
        limits.append("features are targets, from which the viewers start no scores")
    if any(row["site"] and not row["site"].endswith("hook_mlp_out") for row in rows):
        limits.append("dictionaries beside the MLPs' are shown without examples")
    return limits


def _n_layers(graph: GraphArrays) -> int:
    inner = graph.nodes.loc[graph.nodes["kind"] != "target", "layer"]
    return int(graph.metadata.get("n_layers", int(inner.max()) + 1))


# ------------------------------------------------------------------------------------------- nodes
def cantor(layer: int, index: int) -> int:
    """One number for a pair of them."""
    return (layer + index) * (layer + index + 1) // 2 + index


def has_word(site: object) -> bool:
    """Whether nodes of a site have a name in this format."""
    match = _PLACE.fullmatch(site) if isinstance(site, str) else None
    return match is not None and match[1] in _WORDS


def site_word(site: str) -> str:
    """``mlp``, ``att`` or ``res`` for an output hook."""
    if not has_word(site):
        raise GemmaScopeError(
            f"Nodes at {site!r} have no name in this format", exists=", ".join(_WORDS)
        )
    return _WORDS[site.split(".", 2)[2]]


def node_records(
    rows: Iterable[Row], explained: Iterable[bool], tokens: Sequence[str], n_layers: int
) -> list[dict[str, Any]]:
    """Nodes of the file, from rows with ``share``, the cumulative share of influence; no biases."""
    records, virtual, first = [], VIRTUAL, True
    for row, is_explained in zip(rows, explained, strict=True):
        kind, token, active = row["kind"], row["index"], row["activation"]
        if kind == "target" and token < 0:
            token, virtual = virtual, virtual + 1
        if kind == "token":
            shown = _token(row)
        elif kind == "feature":
            shown = _feature(row)
        elif kind == "error":
            shown = _error(row, tokens)
        else:
            shown = {**_target(row, token, n_layers), "is_target_logit": first}
            first = False
        shown |= {
            "ctx_idx": row["pos"],
            "feature_type": TYPES[kind],
            # null is shown whatever the threshold is, a missing key never
            "influence": None if kind == "target" else row["share"],
            # null is unknown, as in files of others; JSON has no NaN
            "activation": active if kind == "feature" and not math.isnan(active) else None,
            "run_idx": 0,
            "reverse_ctx_idx": 0,
        }
        records.append({**shown, "gemmascope": _details(row, shown["clerp"], is_explained)})
    return records


def _details(row: Row, shown: str, explained: bool) -> dict[str, Any]:
    details = {"id": row["id"], "site": row["site"]}
    if shown != row["label"]:
        details["label"] = row["label"]
    if row["kind"] == "target":
        details |= {"value": as_json(row["activation"]), "layer": row["layer"]}
        details |= {"token": row["index"]}
    if row["kind"] == "feature" and row["weight"]:
        details["weight"] = row["weight"]
    if row["kind"] in ("feature", "target") and not explained:
        details["explained"] = False
    return details


def _token(row: Row) -> dict[str, Any]:
    token, pos = row["index"], row["pos"]
    names = {"node_id": f"E_{token}_{pos}", "jsNodeId": f"E_{token}-{pos}"}
    return {**names, "layer": "E", "feature": pos, "clerp": f'Emb: "{_quotable(row["label"])}"'}


def _feature(row: Row) -> dict[str, Any]:
    layer, index, pos, word = row["layer"], row["index"], row["pos"], site_word(row["site"])
    number = cantor(layer, index + list(SITES).index(word) * SHIFT)
    if word == "mlp":
        names = {"node_id": f"{layer}_{index}_{pos}", "jsNodeId": f"{layer}_{index}-0"}
        label = row["label"]
    else:
        name = f"{layer}_{word}_{index}_{pos}"
        names = {"node_id": name, "jsNodeId": name}
        label = f"{word}:{index} {row['label']}"
    return {**names, "layer": str(layer), "feature": number, "clerp": label}


def _error(row: Row, tokens: Sequence[str]) -> dict[str, Any]:
    word, pos = site_word(row["site"]), row["pos"]
    name = f"{row['layer']}_error_{word}_{pos}"
    names = {"node_id": name, "jsNodeId": name, "layer": str(row["layer"])}
    return {**names, "feature": -1, "clerp": f'Err: {word} "{_quotable(str(tokens[pos]))}"'}


def _target(row: Row, token: int, n_layers: int) -> dict[str, Any]:
    layer, pos, weight = n_layers + 1, row["pos"], row["weight"]
    names = {"node_id": f"{layer}_{token}_{pos}", "jsNodeId": f"L_{token}-{pos}"}
    label = f'Output "{_quotable(row["label"])}" (p={weight:.3f})'
    place = {"layer": str(layer), "feature": token}
    return {**names, **place, "clerp": label, "token_prob": weight}


def _quotable(text: str) -> str:
    """Text that the viewers can find in a label: up to the next quote."""
    return text.replace('"', "\N{RIGHT DOUBLE QUOTATION MARK}").replace("(p=", "(p =")


def bias_records(nodes: pd.DataFrame) -> list[dict[str, Any]]:
    """Every bias of a table of nodes, with its place in it."""
    places = np.flatnonzero((nodes["kind"] == "bias").to_numpy()).tolist()
    columns = [*TRACE_COLUMNS, *(["influence"] if "influence" in nodes else [])]
    rows = nodes.iloc[places][columns].to_dict("records")
    return [{"place": place, **as_json(row)} for place, row in zip(places, rows, strict=True)]
