"""The mean of the attribution graphs of many prompts, aligned by the positions of a template.

1. Every position of every prompt has a name: its number, its number from the end, or a word such as
   ``subject``. Nodes with the same kind, site, index and name are one node (``matching.py``).
2. An edge is the mean over *all* prompts, 0 where it is not there; activations and weights likewise. A
   row sums to the mean of its node's pre-activations, 0 where a prompt does not explain it.
3. Graphs come one by one: what is kept is the sum so far. The mean of contrasts is the contrast of the
   means, so ``union(contrast(a, b) for ...)`` averages contrasts over a data set.

Each graph has the attention patterns and norm scales of its own prompt: the mean is no graph of a mean
prompt. Opposite effects in different prompts cancel each other.

Cost: per graph one pass over its entries and those of the sum; memory for the sum and one graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Literal, get_args

import numpy as np

from gemmascope_plugin.errors import (
    EmptySelectionError,
    InputError,
    TaskError,
    UnknownNameError,
    check_choice,
)
from gemmascope_plugin.graphs.graph import Graph
from gemmascope_plugin.graphs.graph_arrays import check_graph
from gemmascope_plugin.graphs.graph_sum import GraphSum
from gemmascope_plugin.graphs.matching import Targets, positions_of
from gemmascope_plugin.models.gate import gate


@gate()
def union(
    graphs: Iterable[Graph],
    *,
    align: Literal["position", "end"] = "position",
    labels: Iterable[Sequence[str]] | None = None,
    targets: Targets = "label",
    min_share: float = 0.0,
) -> Graph:
    """The mean graph of many prompts.

    Args:
        graphs: Of ``trace``, ``contrast`` or ``prune``, all of one kind; an iterator is read once, one
            graph at a time.
        align: Positions are the same counted from the start, for prompts of equal length, or from the
            end.
        labels: Instead, a name for every token of every graph, each once in a graph: ``["bos",
            "subject", "verb"]``. Positions stand in the order in which prompts have them on average.
        targets: ``label``: targets are the same by token and position; ``order``: the n-th of each
            prompt, such as its own answer.
        min_share: Features and errors in a smaller share of the graphs are left out; rows then lack
            their effects.

    Returns:
        A graph whose table says in how many graphs a node occurs (``count``), in what share of them
        (``share``), and how many explain it (``explained``). ``metadata["residual"]``: the largest gap
        between a row's sum and the mean of what it explains; not a number if anything was left out.

    Raises:
        InputError: A single graph.
        EmptySelectionError: No graph, or ``min_share`` leaves no feature and no error.
        TaskError: Different models or dictionaries, different lengths without labels, labels that do
            not fit.
        UnknownNameError: An unknown alignment, or a share outside [0, 1].
        GemmaScopeError: A graph with grouped nodes.

    Example:
        >>> suite = gs.tiny()
        >>> saes = [suite.load("transcoder", layer) for layer in range(4)]
        >>> graph = gs.trace(suite.model, "the capital of the state containing dallas is", saes)
        >>> other = gs.trace(suite.model, "the capital of the state containing greeley is", saes)
        >>> gs.union([graph, other])
        Graph('<bos>thecapitalofthestatecontainingdallas | greeleyis': 9 tokens, 13 biases, 427
          features, 32 errors, 2 targets, 46515 edges)
    """
    check_choice("alignment", align, ("position", "end"))
    check_choice("way to match targets", targets, get_args(Targets))
    if not 0 <= min_share <= 1:
        raise UnknownNameError(f"min_share={min_share} is no share", exists="shares from 0 to 1")
    if labels is not None and align == "end":
        raise TaskError('labels= and align="end" both align', fix="one of them")
    if isinstance(graphs, (str, Mapping)) or not isinstance(graphs, Iterable):
        check_graph(graphs, "union(graphs)")
        raise InputError("union() got a single graph", fix="union([graph, other])")
    if labels is not None and (isinstance(labels, str) or not isinstance(labels, Iterable)):
        raise _no_labels("union()", labels)
    total = GraphSum(targets)
    if labels is None:
        for graph in graphs:
            check_graph(graph, "union(graphs)")
            total.add(graph, *_counted(graph, align, total))
    else:
        for graph, given in _paired(graphs, labels):
            check_graph(graph, "union(graphs)")
            _check_labels(given, len(graph.tokens), f"Graph {total.n_graphs}")
            total.add(graph, tuple(given), np.linspace(0, 1, len(given)))
    if total.first is None:
        raise EmptySelectionError("No graph was given", fix="[trace(...), ...]")
    return total.mean(min_share, align if labels is None else "labels")


def _paired(
    graphs: Iterable[Graph], labels: Iterable[Sequence[str]]
) -> Iterator[tuple[Graph, Sequence[str]]]:
    """Graphs with their labels.

    Raises:
        TaskError: More of one than of the other.
    """
    for number, (graph, given) in enumerate(zip_longest(graphs, labels)):
        if graph is None or given is None:
            few, many = ("graph", "labels") if graph is None else ("labels", "graph")
            raise TaskError(
                f"There are {many} number {number} without {few}",
                fix="one list of labels per graph",
            )
        yield graph, given


def _counted(graph: Graph, align: str, total: GraphSum) -> tuple[tuple[str, ...], np.ndarray]:
    """Names of the positions of a graph, and where they stand beside others, ``[pos]``.

    Raises:
        TaskError: Another length than the first graph's.
    """
    n_pos, name = len(graph.tokens), f"Graph {total.n_graphs}"
    places = np.arange(n_pos, dtype=float)
    if align == "end":
        return tuple(str(i - n_pos) for i in range(n_pos)), places - n_pos
    names = positions_of(graph)
    if total.first is not None and names != positions_of(total.first):
        raise TaskError(
            f"{name} has {n_pos} tokens, the first graph {len(total.first.tokens)}"
            if n_pos != len(total.first.tokens)
            else f"The positions of {name} have other names than those of the first graph",
            fix='align="end", or labels=[["bos", "subject", ...], ...]',
        )
    return names, places


def _check_labels(given: Sequence[str], n_pos: int, name: str) -> None:
    """A text for every token, each once.

    Raises:
        TaskError: With what is wrong.
    """
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise _no_labels(name, given)
    if not all(isinstance(label, str) for label in given):
        raise _no_labels(name, given)
    if len(given) != n_pos:
        raise TaskError(f"{name} has {n_pos} tokens and {len(given)} labels")
    label, times = Counter(given).most_common(1)[0]
    if times > 1:
        raise TaskError(
            f"{name} has the label {label!r} {times} times", fix=f"'{label} 1', '{label} 2'"
        )


def _no_labels(name: str, given: object) -> TaskError:
    return TaskError(f"{name} has the labels {given!r}", exists="lists of texts")
