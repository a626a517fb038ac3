"""Which nodes of several attribution graphs are the same, and which graphs can be put together.

1. A node is known by kind, site, index and the *name* of its position: its number, or a word such as
   ``subject`` where prompts of several lengths are put together. Biases are known by their id, targets by
   token and position, or by their number where prompts have targets of their own.
2. Graphs that are put together are of one model and the same dictionaries, and all contrasts or none.

Cost: a loop over the nodes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from gemmascope_plugin.errors import GemmaScopeError, TaskError
from gemmascope_plugin.graphs.graph import Graph

if TYPE_CHECKING:
    import pandas as pd

Targets = Literal["label", "order"]
"""Whether targets are the same by token (or name) and position, or the n-th with the n-th."""
SHARED = (
    "model",
    "n_layers",
    "exclude",
    "logits",
    "dictionaries",
    "max_feature_nodes",
    "min_share",
)
"""Metadata that graphs of several prompts share."""
PRUNED = ("node_threshold", "edge_threshold")
"""Metadata that say that a graph is pruned."""


def positions_of(graph: Graph) -> tuple[str, ...]:
    """Names of the positions of a graph: their numbers, unless ``union`` gave others."""
    return tuple(graph.metadata.get("positions", map(str, range(len(graph.tokens)))))


def activations_of(graph: Graph) -> list[str]:
    """Columns of activations; a contrast has three."""
    return [name for name in graph.columns if name.startswith("activation")]


def is_whole(graph: Graph) -> bool:
    """Whether no node was left out: by pruning, or for occurring in too few graphs."""
    return "node_threshold" not in graph.metadata and not graph.metadata.get("min_occurrence")


def sums_hold(graph: Graph) -> bool:
    """Whether rows sum to pre-activations: no node or effect was left out, and biases are there."""
    is_known = math.isfinite(graph.metadata.get("residual", math.nan))
    return is_known and is_whole(graph) and bool(graph.where("bias").any())


def check_alike(graph: Graph, first: Graph, name: str) -> None:
    """Refuses graphs whose nodes do not mean the same; ``name`` is what an error calls the first."""
    if "supernodes" in graph.metadata:
        raise GemmaScopeError(
            f"{name} has grouped nodes, which match no node of another graph",
            fix="the graph before collapse(...)",
        )
    expected, model = first.metadata.get("model"), graph.metadata.get("model")
    if model != expected:
        raise TaskError(f"{name} is of the model {model!r}, the first graph of {expected!r}")
    before, after = dictionaries_of(first), dictionaries_of(graph)
    are_whole = is_whole(first) and is_whole(graph)
    for site in sorted({*before, *after}):
        old, new = before.get(site), after.get(site)
        # a site without nodes in a pruned graph may have a dictionary all the same
        if old != new and (are_whole or (old and new)):
            raise TaskError(
                f"{name} has other dictionaries than the first graph: at {site} "
                f"{_named(new)} and not {_named(old)}",
                exists=f"dictionaries at {', '.join(before)}",
                fix="trace all prompts with the same transcoders",
            )
    if activations_of(graph) != activations_of(first):
        raise TaskError(
            f"{name} has the columns {', '.join(activations_of(graph))}, the first graph "
            f"{', '.join(activations_of(first))}",
            fix="contrasts only, or graphs of single prompts only",
        )


def dictionaries_of(graph: Graph) -> dict[str, str]:
    """The dictionary at each site; empty text where a graph does not say which."""
    sites = graph.nodes.loc[graph.nodes["site"] != "", "site"].unique()
    return {**dict.fromkeys(map(str, sites), ""), **graph.metadata.get("dictionaries", {})}


def _named(dictionary: str | None) -> str:
    return "none" if dictionary is None else dictionary or "one without a name"


def keyed(graph: Graph, names: Sequence[str], targets: Targets) -> pd.DataFrame:
    """The nodes with ``key``, what they are known by, and ids that say the names of positions."""
    columns = [graph.nodes[name] for name in ("id", "kind", "site", "index", "pos")]
    ids = [_id(names, *row) for row in zip(*columns, strict=True)]
    keys = np.array(ids, dtype=object)
    if targets == "order":
        last = graph.where("target").nonzero()[0]
        keys[last] = [f"target {number}" for number in range(len(last))]
    return graph.nodes.drop(columns="influence", errors="ignore").assign(id=ids, key=keys)


def _id(names: Sequence[str], old: str, kind: str, site: str, index: int, pos: int) -> str:
    if kind == "bias":
        return old
    if kind == "target":
        # by their numbers: two tokens may look alike
        stem = f"target:logit:{index}" if index >= 0 else old.rpartition("@")[0] or old
        return f"{stem}@{names[pos]}"
    stem = {"token": "token", "feature": f"{site}/{index}", "error": f"{site}/error"}[kind]
    return f"{stem}@{names[pos]}"


def either(texts: Sequence[str]) -> str:
    """Different texts as one: the first three of them."""
    different = list(dict.fromkeys(text.strip() or repr(text) for text in texts))
    if len(different) == 1:
        return texts[0]
    return " | ".join(different[:3]) + (" | ..." if len(different) > 3 else "")
