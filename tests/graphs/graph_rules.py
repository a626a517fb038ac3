"""Rules of the JSON of attribution graphs that the viewers of circuit-tracer and Neuronpedia rely on.

``circuit_graph_rules(content)`` asserts all of them; the numbers are those of ``graph-schema.json`` 1.0.0
and of the viewers' source.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

from gemmascope_plugin.graphs.read_json import from_cantor

REQUIRED = {
    "node_id": str,
    "jsNodeId": str,
    "feature": int,
    "layer": str,
    "ctx_idx": int,
    "feature_type": str,
    "clerp": str,
}
LOGIT_LABEL = re.compile(r'^Output "([^"]*)" \(p=(\d\.\d{3})\)$')
NODE_ID = re.compile(r"\d+_\d+_\d+|E_\d+_\d+|\d+_(att|res)_\d+_\d+|\d+_error_(mlp|att|res)_\d+")
TYPES = {"cross layer transcoder", "mlp reconstruction error", "embedding", "logit"}


def check_rules(content: dict[str, Any]) -> None:
    """Asserts what the viewers need of a graph file."""
    text = json.dumps(content, allow_nan=False)
    assert json.loads(text) == content
    assert {"metadata", "qParams", "nodes", "links"} <= set(content)
    _check_head(content["metadata"], content["qParams"])
    nodes = {node["node_id"]: node for node in content["nodes"]}
    assert len(nodes) == len(content["nodes"]), "node ids are not unique"
    for node in content["nodes"]:
        _check_node(node, len(content["metadata"]["prompt_tokens"]))
    cells = Counter(
        (n["layer"], n["feature"], n["ctx_idx"])
        for n in content["nodes"]
        if n["feature_type"] == "cross layer transcoder"
    )
    assert max(cells.values(), default=1) == 1, "two features share a label in the viewers"
    for link in content["links"]:
        assert set(link) == {"source", "target", "weight"}
        assert link["source"] in nodes and link["target"] in nodes
        assert isinstance(link["weight"], float)
    for name, *members in content["qParams"]["supernodes"]:
        assert isinstance(name, str) and set(members) <= set(nodes)


def _check_head(metadata: dict[str, Any], saved: dict[str, Any]) -> None:
    assert re.fullmatch(r"[\w.-]+", metadata["slug"])
    assert isinstance(metadata["scan"], str) and isinstance(metadata["prompt"], str)
    assert all(isinstance(token, str) for token in metadata["prompt_tokens"])
    assert metadata["schema_version"] == 1
    assert metadata["node_threshold"] is None or metadata["node_threshold"] > 0
    assert isinstance(metadata["transcoder_list"], list)
    # a JSON string for one viewer and a list for the other
    assert "clerps" not in saved
    assert saved["linkType"] == "both" and isinstance(saved["pinnedIds"], list)


def _check_node(node: dict[str, Any], n_tokens: int) -> None:
    for name, kind in REQUIRED.items():
        assert isinstance(node[name], kind), (name, node)
    assert NODE_ID.fullmatch(node["node_id"]), node["node_id"]
    assert node["feature_type"] in TYPES
    assert 0 <= node["ctx_idx"] < n_tokens
    assert node["layer"] == "E" or int(node["layer"]) >= 0
    # a missing key hides the node in circuit-tracer's viewer
    assert "influence" in node and "activation" in node
    assert node["influence"] is None or 0 <= node["influence"] <= 1 + 1e-9
    kind = node["feature_type"]
    if kind == "logit":
        assert node["influence"] is None
        assert LOGIT_LABEL.fullmatch(node["clerp"]), node["clerp"]
        assert isinstance(node["token_prob"], float) and isinstance(node["is_target_logit"], bool)
    elif kind == "cross layer transcoder":
        layer, index = from_cantor(node["feature"])
        assert str(layer) == node["layer"]
        assert index % (1 << 21) == int(node["node_id"].split("_")[-2])
    else:
        assert node["feature"] == (-1 if "error" in kind else node["ctx_idx"])


def scores_from_file(content: dict[str, Any]) -> tuple[float, float]:
    """Replacement and completeness as Neuronpedia computes them, from nodes and links alone."""
    order = ["cross layer transcoder", "mlp reconstruction error", "embedding", "logit"]
    nodes = sorted(content["nodes"], key=lambda node: order.index(node["feature_type"]))
    place = {node["node_id"]: i for i, node in enumerate(nodes)}
    inputs: list[dict[int, float]] = [{} for _ in nodes]
    for link in content["links"]:
        inputs[place[link["target"]]][place[link["source"]]] = abs(link["weight"])
    shares = [{i: w / max(sum(row.values()), 1e-10) for i, w in row.items()} for row in inputs]
    weights = [node.get("token_prob") or 0.0 for node in nodes]
    influence, last = [0.0] * len(nodes), weights
    while any(last):
        new = [0.0] * len(nodes)
        for target, amount in enumerate(last):
            for source, share in shares[target].items() if amount else ():
                new[source] += amount * share
        influence, last = [a + b for a, b in zip(influence, new, strict=True)], new
    kinds = [node["feature_type"] for node in nodes]
    of_tokens = sum(x for x, kind in zip(influence, kinds, strict=True) if kind == "embedding")
    of_errors = sum(x for x, kind in zip(influence, kinds, strict=True) if "error" in kind)
    output = [a + b for a, b in zip(influence, weights, strict=True)]
    from_errors = [sum(w for i, w in row.items() if "error" in kinds[i]) for row in shares]
    explained = sum((1 - e) * o for e, o in zip(from_errors, output, strict=True))
    return of_tokens / (of_tokens + of_errors), explained / sum(output)
