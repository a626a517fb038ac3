"""The difference of the attribution graphs of two prompts: what a change of the prompt changes.

1. Nodes of both prompts are matched by kind, site, index and position (``combine.py``); a feature that
   is active in one prompt alone has activation 0 and no effects in the other.
2. An edge is the clean direct effect minus the corrupted one, an activation the clean one minus the
   corrupted one. A row therefore sums to the difference of its node's pre-activations: of features that
   are active in one prompt alone, to the pre-activation there, as nothing explains inactive features.
3. A node that both prompts have, but only one graph explains (``max_feature_nodes``), has no row.

Each graph is linear with the attention patterns and norm scales *of its own prompt*. With ``a`` a
source's activation and ``p`` what a unit of it does to the target, an edge is ``a p - a' p'``, that is
``(a - a') p + a' (p - p')``: it holds what the source changed *and* what attention and norms changed on
the way. An edge from a node with equal activations (a token that both prompts have) is of the second
sort alone: the model attends differently. No edge says what follows when a corrupted activation is put
into the clean prompt; that is what ``activation_patching`` does.

Influence, pruning and scores work as on any graph, by the absolute differences and the weights of the
clean graph's targets.

Cost: one pass over the entries of both graphs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, get_args

import numpy as np

from gemmascope_plugin.errors import GemmaScopeError, TaskError, check_choice, nearest, shorten
from gemmascope_plugin.graphs.combine import (
    SHARED,
    Aligned,
    GraphSum,
    Targets,
    check_alike,
    combine,
    either,
    is_whole,
    keyed,
    largest_gap,
    pass_order,
    positions_of,
)
from gemmascope_plugin.graphs.defects import TRACE_COLUMNS
from gemmascope_plugin.graphs.graph import Graph
from gemmascope_plugin.graphs.graph_arrays import check_graph
from gemmascope_plugin.graphs.node import table_columns
from gemmascope_plugin.models.gate import gate

if TYPE_CHECKING:
    import pandas as pd


@gate(clean=check_graph, corrupt=check_graph)
def contrast(clean: Graph, corrupt: Graph, *, targets: Targets = "label") -> Graph:
    """Clean minus corrupted graph.

    Args:
        clean: Of the clean prompt, as ``trace`` or ``union`` gives it.
        corrupt: Of a prompt of equal length, with the same dictionaries and targets; targets that only
            this graph has are left out.
        targets: ``label``: targets are the same by token and position; ``order``: the n-th of one with
            the n-th of the other, such as each prompt's own answer.

    Returns:
        A graph whose ``activation`` is the difference of ``activation_clean`` and
        ``activation_corrupt``, which its table has too. Labels of tokens and targets say both words.
        ``metadata["residual"]``: the largest gap between a row's sum and that difference, as a share of
        the largest pre-activation; not a number if one of the graphs had none.

    Raises:
        TaskError: Different lengths, models or dictionaries, or a target that the corrupted graph lacks.
        GemmaScopeError: A graph that is pruned, grouped, or a contrast.
        UnknownNameError: An unknown way to match targets.

    Example:
        >>> suite = gs.tiny()
        >>> saes = [suite.load("transcoder", layer) for layer in range(4)]
        >>> graph = gs.trace(suite.model, "the capital of the state containing dallas is", saes)
        >>> other = gs.trace(suite.model, "the capital of the state containing greeley is", saes)
        >>> gs.contrast(graph, other, targets="order")
        Graph('<bos>thecapitalofthestatecontainingdallas | greeleyis': 9 tokens, 13 biases, 427
          features, 32 errors, 1 target, 22147 edges)
    """
    check_choice("way to match targets", targets, get_args(Targets))
    _check(clean, corrupt)
    names, places = positions_of(clean), np.arange(len(clean.tokens), dtype=float)
    graphs = (clean, corrupt)
    frames = [keyed(graph, names, targets) for graph in graphs]
    _check_targets(frames[0], frames[1], targets)
    parts = [Aligned(graph, names, places) for graph in graphs]
    total = combine(parts, (1.0, -1.0), targets)
    at = [total.places_of(frame) for frame in frames]
    nodes = _table(total, graphs, at)
    is_node, is_explained = np.zeros((2, 2, len(total)), dtype=bool)
    for i, graph in enumerate(graphs):
        is_node[i, at[i]] = True
        is_explained[i, at[i][graph.rows.nodes]] = True
    is_row = is_explained.any(0) & (is_explained == is_node).all(0)
    order = pass_order(nodes)
    order = order[((nodes["kind"] != "target").to_numpy() | is_node[0])[order]]
    edges = total.edges(total.matrix, is_row, order)
    nodes = nodes.iloc[order].reset_index(drop=True)
    values = nodes["activation"].to_numpy()[edges.nodes]
    gap = largest_gap(edges, values, _scale(nodes)) if total.sums_hold else math.nan
    details = {
        **{name: clean.metadata[name] for name in (*SHARED, "positions") if name in clean.metadata},
        "prompt": total.prompts[0],
        "corrupt_prompt": total.prompts[1],
        "rows_left_out": int((is_explained.any(0) & ~is_row).sum()),
        "residual": gap,
    }
    tokens = tuple(either(pair) for pair in zip(clean.tokens, corrupt.tokens, strict=True))
    return Graph(table_columns(nodes), edges, tokens, details)


def _table(
    total: GraphSum, graphs: tuple[Graph, Graph], places: Sequence[np.ndarray]
) -> pd.DataFrame:
    """The table of all nodes in common numbers, activations and words of both."""
    # counts of a mean graph are of one side only
    nodes = total.table().loc[:, list(TRACE_COLUMNS)]
    is_valued = nodes["kind"].isin(["feature", "target"]).to_numpy()
    values = np.where(is_valued, np.zeros((2, len(total))), np.nan)
    labels = np.full((2, len(total)), "", dtype=object)
    for i, (graph, at) in enumerate(zip(graphs, places, strict=True)):
        values[i, at] = np.where(is_valued[at], graph.columns["activation"], np.nan)
        labels[i, at] = graph.columns["label"]
    weights = np.zeros(len(total))
    weights[places[0]] = graphs[0].weights
    has_words = nodes["kind"].isin(["token", "target"])
    both = [
        either([text for text in pair if text]) if differs else pair[0] or pair[1]
        for *pair, differs in zip(*labels, has_words, strict=True)
    ]
    pair = {"activation_clean": values[0], "activation_corrupt": values[1]}
    return nodes.assign(activation=values[0] - values[1], weight=weights, label=both, **pair)


def _scale(nodes: pd.DataFrame) -> float:
    values = nodes[["activation_clean", "activation_corrupt"]].abs().max().max()
    return float(np.nan_to_num(values))


def _check(clean: Graph, corrupt: Graph) -> None:
    """Refuses graphs that cannot be subtracted from one another."""
    for name, graph in (("The clean graph", clean), ("The corrupted graph", corrupt)):
        check_alike(graph, clean, name)
        if not is_whole(graph):
            raise GemmaScopeError(
                f"{name} is pruned or lacks rare nodes: what is missing there is not zero",
                fix="contrast(trace(...), trace(...)).prune()",
            )
        if "activation_clean" in graph.nodes:
            raise GemmaScopeError(f"{name} is a contrast itself", fix="graphs of single prompts")
    lengths = len(clean.tokens), len(corrupt.tokens)
    if positions_of(clean) != positions_of(corrupt):
        raise TaskError(
            f"The prompts have {lengths[0]} and {lengths[1]} tokens, so their positions do not match"
            if lengths[0] != lengths[1]
            else "The positions of the two graphs have other names",
            fix="prompts of equal length, or union([...], labels=[...]) of each with equal labels",
        )


def _check_targets(clean: pd.DataFrame, corrupt: pd.DataFrame, targets: Targets) -> None:
    """The corrupted graph has all targets of the clean one."""
    wanted, present = (frame.loc[frame["kind"] == "target"] for frame in (clean, corrupt))
    missing = wanted.loc[~wanted["key"].isin(present["key"])]
    if not len(missing):
        return
    first = str(missing["label"].iloc[0])
    words = [str(label) for label in present["label"]]
    raise TaskError(
        f"The corrupted graph lacks {len(missing)} of the clean graph's {len(wanted)} targets: "
        f"{shorten(missing['label'])}",
        exists=f"targets {shorten(words)}" if words else None,
        nearest=nearest(first, words) if targets == "label" else None,
        fix="trace(..., targets=[...]) with the same targets for both prompts"
        + (', or contrast(..., targets="order")' if len(wanted) == len(present) else ""),
    )
