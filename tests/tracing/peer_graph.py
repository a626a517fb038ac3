"""A small graph as circuit-tracer writes it."""

from __future__ import annotations

from typing import Any

from gemmascope_plugin.graphs.write_json import cantor


def peer_file() -> dict[str, Any]:
    """As circuit-tracer 0.5.0 writes it, with an error that is called as a feature is."""
    common = {"ctx_idx": 1, "influence": 0.5, "activation": 1.0, "run_idx": 0}
    feature = {**common, "feature_type": "cross layer transcoder", "clerp": "", "jsNodeId": "1_2-0"}
    error = {**common, "feature_type": "mlp reconstruction error", "clerp": "", "feature": -1}
    token = {**common, "feature_type": "embedding", "feature": 1, "clerp": 'Emb: "a"', "layer": "E"}
    logit = {**common, "feature_type": "logit", "feature": 9, "layer": "3", "token_prob": 0.25}
    nodes = [
        {**feature, "node_id": "0_1_1", "layer": "0", "feature": cantor(0, 1)},
        {**feature, "node_id": "1_7_1", "layer": "1", "feature": cantor(1, 7)},
        {**error, "node_id": "0_1_1", "layer": "1", "jsNodeId": "0_1-1"},
        {**token, "node_id": "E_4_1", "jsNodeId": "E_4-1"},
        {**logit, "node_id": "3_9_1", "jsNodeId": "L_9-1", "clerp": 'Output "b" (p=0.250)'},
    ]
    ends = [("E_4_1", "0_1_1", 1.0), ("0_1_1", "1_7_1", 2.0), ("1_7_1", "3_9_1", 3.0)]
    # of the feature and of the error, in this order
    ends += [("0_1_1", "3_9_1", 4.0), ("0_1_1", "3_9_1", -5.0)]
    return {
        "metadata": {
            "slug": "peer",
            "scan": "gemma-2-2b",
            "prompt": "a",
            "prompt_tokens": ["<bos>", "a"],
            "transcoder_list": [],
            "node_threshold": 0.8,
            "schema_version": 1,
        },
        "qParams": {},
        "nodes": nodes,
        "links": [{"source": s, "target": t, "weight": w} for s, t, w in ends],
    }
