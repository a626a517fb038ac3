"""What makes nodes and edge arrays a graph; asked when one is built and when one is read from a file.

1. There are nodes, each once. Key-value heads of a layer come with all heads of the layer, in equal
   groups.
2. Edges lie between nodes that exist, through ports that exist, and are there once.
3. Scores are finite; what is ranked is there, and nodes have scores where they are ranked.

Cost: a sort of the edges.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from jaxtyping import Float32, Int64, UInt8

from gemmascope_plugin.graphs.node import Node

N_PORTS = 4
"""Ports that there are: ``"", q, k, v``."""
MAX_LAYER, MAX_INDEX, MAX_POS = 1000, 1 << 31, 1 << 18
"""Beyond those of any model."""


def content_fault(
    nodes: Sequence[Node],
    node_scores: Float32[torch.Tensor, " node"] | None,
    source: Int64[torch.Tensor, " edge"],
    target: Int64[torch.Tensor, " edge"],
    port: UInt8[torch.Tensor, " edge"],
    pos: Int64[torch.Tensor, " edge"] | None,
    edge_scores: Float32[torch.Tensor, " edge"],
    ranked: str | None = None,
) -> str | None:
    """Why these arrays of right lengths are no graph; None if they are one."""
    if not nodes:
        return "there are no nodes"
    for node in nodes:
        if not 0 <= node.index < MAX_INDEX or not 0 <= (node.pos or 0) < MAX_POS:
            return f"the {node.kind} at {node.hook!r} has index {node.index}, position {node.pos}"
    if len(set(nodes)) < len(nodes):
        return "a node is there twice"
    fault = _group_fault(nodes)
    if fault is not None:
        return fault
    scores = [edge_scores] if node_scores is None else [edge_scores, node_scores]
    if not all(bool(each.isfinite().all()) for each in scores):
        return "a score is NaN or infinite"
    if ranked == "edge" and len(source) == 0:
        return "there are no edges to rank"
    if node_scores is None and (len(source) == 0 or ranked == "node"):
        nothing = "no" if ranked == "node" and len(source) else "neither edges nor"
        return f"there are {nothing} scores of nodes"
    if len(source) == 0:
        return None
    for name, ends in (("source", source), ("target", target)):
        if int(ends.min()) < 0 or int(ends.max()) >= len(nodes):
            return f"the {name} of an edge is not among the {len(nodes)} nodes"
    if int(port.max()) >= N_PORTS:
        return f"an edge has port number {int(port.max())}"
    if pos is not None and (int(pos.min()) < 0 or int(pos.max()) >= MAX_POS):
        return f"an edge has a position outside 0 to {MAX_POS - 1}"
    return _edge_fault(len(nodes), source, target, port, pos)


def _edge_fault(
    n: int,
    source: Int64[torch.Tensor, " edge"],
    target: Int64[torch.Tensor, " edge"],
    port: UInt8[torch.Tensor, " edge"],
    pos: Int64[torch.Tensor, " edge"] | None,
) -> str | None:
    if bool((source == target).any()):
        return "an edge ends where it begins"
    keys = (source * n + target) * N_PORTS + port
    if pos is not None:
        keys = keys * (pos.max() + 1) + pos
    return "an edge is there twice" if len(keys.unique()) < len(keys) else None


def group_rows(nodes: Sequence[Node]) -> list[tuple[int, int]]:
    """Every key-value head with every head that it feeds, as places in ``nodes``."""
    heads, shared = _rows(nodes, "head"), _rows(nodes, "kv")
    pairs = []
    for layer, rows in shared.items():
        group = len(heads[layer]) // len(rows)
        pairs += [(rows[head // group], row) for head, row in heads[layer].items()]
    return pairs


def _group_fault(nodes: Sequence[Node]) -> str | None:
    heads = _rows(nodes, "head")
    for layer, rows in _rows(nodes, "kv").items():
        n, n_kv = len(heads[layer]), len(rows)
        if set(heads[layer]) != set(range(n)) or set(rows) != set(range(n_kv)) or n % n_kv or not n:
            return (
                f"layer {layer} has heads {sorted(heads[layer])} and key-value heads "
                f"{sorted(rows)}, which cannot share them"
            )
    return None


def _rows(nodes: Sequence[Node], kind: str) -> dict[int, dict[int, int]]:
    """Layer to head to place in ``nodes``."""
    rows: dict[int, dict[int, int]] = defaultdict(dict)
    for row, node in enumerate(nodes):
        if node.kind == kind:
            rows[node.layer][node.index] = row
    return rows
