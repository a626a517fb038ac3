"""Nodes and edges as DataFrames, and where nodes stand in a figure.

Cost: indexing; one Python object per node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float32, Int64

from gemmascope_plugin.graphs.node import Node

if TYPE_CHECKING:
    import numpy as np


def node_frame(
    nodes: Sequence[Node],
    chosen: Int64[torch.Tensor, " some"],
    scores: Float32[torch.Tensor, " some"],
    meanings: Mapping[Node, str],
) -> Any:
    """One row per node: ``node, kind, layer, score``, ``pos`` and ``meaning`` if there are any.

    Args:
        nodes: All nodes.
        chosen: Which of them, in which order.
        scores: Of those.
        meanings: What some nodes stand for.
    """
    import pandas as pd

    own = [nodes[i] for i in chosen.tolist()]
    columns: dict[str, Any] = {
        "node": [node.label for node in own],
        "kind": [node.kind for node in own],
        "layer": pd.array([layer_of(node) for node in own], dtype="Int64"),
    }
    if any(node.pos is not None for node in nodes):
        columns["pos"] = pd.array([node.pos for node in own], dtype="Int64")
    if meanings:
        columns["meaning"] = [meanings.get(node, "") for node in own]
    return pd.DataFrame({**columns, "score": scores.numpy()})


def edge_frame(
    nodes: Sequence[Node],
    labels: np.ndarray,
    ends: tuple[Int64[torch.Tensor, " some"], Int64[torch.Tensor, " some"]],
    more: Mapping[str, Any],
    scores: Float32[torch.Tensor, " some"],
    meanings: Mapping[Node, str],
) -> Any:
    """One row per edge: its ends, ``more``, their meanings if there are any, their layers, ``score``.

    Args:
        nodes: All nodes.
        labels: Their labels.
        ends: Where edges begin and end.
        more: Further columns.
        scores: Of the edges.
        meanings: What some nodes stand for.
    """
    import numpy as np
    import pandas as pd

    places = dict(zip(("source", "target"), (end.numpy() for end in ends), strict=True))
    columns: dict[str, Any] = {name: labels[place] for name, place in places.items()}
    columns |= more
    if meanings:
        words = np.array([meanings.get(node, "") for node in nodes], dtype=object)
        columns |= {f"{name}_meaning": words[place] for name, place in places.items()}
    layers = pd.array([layer_of(node) for node in nodes], dtype="Int64")
    columns |= {f"{name}_layer": layers[place] for name, place in places.items()}
    return pd.DataFrame({**columns, "score": scores.numpy()})


def caption(node: Node, meanings: Mapping[Node, str]) -> str:
    """Name of a node in a figure: what it stands for, and which it is."""
    words = meanings.get(node)
    return f"{words} · {node.label}" if words else node.label


def layer_of(node: Node) -> int | None:
    """Layer of a node; None for the logits, which have none."""
    return None if node.kind == "logits" else node.layer


def row_of(node: Node) -> str:
    """Kind of a node, and of what its dictionary takes apart: they stand in rows of their own."""
    if node.kind not in ("feature", "error"):
        return node.kind
    for part, where in (("attn", "attention"), ("mlp", "MLP")):
        if f".{part}." in node.site or f"hook_{part}_" in node.site:
            return f"{where} {node.kind}"
    return f"residual {node.kind}"
