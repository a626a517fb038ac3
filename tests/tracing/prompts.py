"""Attribution graphs of a few prompts of a tiny random model, and what they are, entry by entry."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch

from gemmascope_plugin.graphs import Graph
from gemmascope_plugin.tracing import trace
from tests import factories
from tests.tiny_models import random_tokens

CLEAN = random_tokens(batch_size=1, length=7, seed=5)
CORRUPT = CLEAN.clone()
CORRUPT[0, 3] = 77
OTHER = random_tokens(batch_size=1, length=7, seed=6)
LONG = torch.cat([CLEAN, OTHER[:, 3:5]], 1)
PROMPTS = {"clean": CLEAN, "corrupt": CORRUPT, "other": OTHER, "long": LONG}
TARGETS = (7, 8, (9, 10))


@cache
def model() -> Any:
    return factories.tiny_model("gemma2", "hooked")


@cache
def dictionaries() -> tuple[Any, ...]:
    """Of every MLP, and beside them of attention and the stream."""
    saes = [factories.transcoder(model(), layer, seed=layer) for layer in range(3)]
    return (*saes, factories.residual(model(), 1), factories.attention(model(), 2))


@cache
def graph(name: str, targets: Any = TARGETS, **options: Any) -> Graph:
    return trace(model(), PROMPTS[name], dictionaries(), targets=list(targets), **options)


def key(row: Any, names: Any = None) -> tuple[Any, ...]:
    """What a node is known by, written down on its own: not by way of its id."""
    if row.kind == "bias":
        return ("bias", row.label)
    pos = row.pos if names is None else names[row.pos]
    if row.kind == "target":
        return ("target", row.label, pos)
    return (row.kind, row.site, row.index if row.kind == "feature" else -1, pos)


def entries(graph: Graph, names: Any = None) -> dict[Any, float]:
    """Every effect that is not zero, by the keys of target and source."""
    keys = [key(row, names) for row in graph.nodes.itertuples()]
    dense = graph.adjacency.toarray()
    return {(keys[i], keys[j]): float(dense[i, j]) for i, j in zip(*dense.nonzero(), strict=True)}


def values(graph: Graph, names: Any = None) -> dict[Any, float]:
    """Activations of features and targets."""
    rows = graph.nodes[graph.where("feature") | graph.where("target")]
    return {key(row, names): row.activation for row in rows.itertuples()}


def assert_close(got: dict[Any, float], expected: dict[Any, float]) -> None:
    """Equal up to rounding of float32; a key that is missing stands for 0."""
    keys = sorted({*got, *expected}, key=repr)
    left, right = (np.array([d.get(k, 0.0) for k in keys]) for d in (got, expected))
    np.testing.assert_allclose(left, right, atol=1e-6 * np.abs(right).max())


def influence(graph: Graph) -> np.ndarray:
    """Over all paths, by powers of the dense matrix."""
    dense = np.abs(graph.adjacency.toarray().astype(np.float64))
    dense[:, graph.where("bias")] = 0
    sums = dense.sum(1, keepdims=True)
    dense /= np.where(sums == 0, 1, sums)
    total, step = np.zeros(len(dense)), graph.weights
    while step.sum() > 1e-12:
        step = step @ dense
        total = total + step
    return total
