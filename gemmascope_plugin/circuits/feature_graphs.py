"""Graphs of features: how to tell them, and how to find their sites in a model again.

``metadata["sites"]`` says of every site its kind and how many features its dictionary has;
``metadata["per_position"]`` whether nodes have positions, ``metadata["level"]`` which prefix of nested
dictionaries they are of.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gemmascope_plugin.causes.bound_task import BoundTask
from gemmascope_plugin.causes.gradient.task_site import sites_of
from gemmascope_plugin.circuits.feature_layout import SiteNodes, layout_of
from gemmascope_plugin.errors import TaskError, UnknownNameError, WidthMismatchError
from gemmascope_plugin.graphs.graph import Graph
from gemmascope_plugin.models.points import n_heads
from gemmascope_plugin.models.protocol import HookedModel


def is_feature_graph(graph: Graph) -> bool:
    """Whether nodes are parts of sites, as ``discover(..., nodes="features")`` makes them."""
    return "sites" in graph.metadata


def layout_of_graph(graph: Graph, model: HookedModel, saes: Any) -> tuple[SiteNodes, ...]:
    """The nodes of a graph of features by site.

    Args:
        graph: The graph.
        model: The model that it was found in.
        saes: The dictionaries that it was found with.

    Raises:
        UnknownNameError: No dictionaries, or others than those of the graph's sites.
        WidthMismatchError: A dictionary with another number of features than the graph's.
    """
    if saes is None:
        raise UnknownNameError(
            "The circuit has features", fix="evaluate(..., saes=[the same dictionaries])"
        )
    known: Mapping[str, tuple[str, int]] = graph.metadata["sites"]
    raw = sorted({kind for kind, _ in known.values() if kind != "feature"})
    sites = sites_of(model, saes, raw, level=graph.metadata["level"])
    there = {site.hook: (site.kind, site.d_sae) for site in sites}
    if there.keys() != known.keys() or any(there[h][0] != known[h][0] for h in known):
        wrong = sorted(set(there.items()) ^ {(hook, tuple(one)) for hook, one in known.items()})
        raise UnknownNameError(
            f"The dictionaries are not those of the circuit, which differ at {wrong[0][0]}",
            exists=", ".join(hook for hook, (kind, _) in known.items() if kind == "feature"),
            fix="saes=[the dictionaries that the circuit was found with]",
        )
    for hook, (_, d_sae) in known.items():
        if there[hook][1] != d_sae:
            raise WidthMismatchError(
                f"The dictionary for {hook} has {there[hook][1]} features, the circuit's has {d_sae}",
                fix="the dictionaries, and the level, that the circuit was found with",
            )
    return layout_of(graph.components, sites, n_heads(model), graph.metadata["per_position"])


def check_prompts(graph: Graph, bound: BoundTask) -> None:
    """Refuses prompts that the positions of a graph do not fit.

    Raises:
        TaskError: They are longer or shorter than those of the graph, or of several lengths.
    """
    if not graph.metadata["per_position"]:
        return
    lengths = bound.prompt_lengths.unique().tolist()
    n_pos = graph.metadata["n_pos"]
    if lengths != [n_pos]:
        raise TaskError(
            f"The nodes of the circuit have positions in prompts of {n_pos} tokens, and these have "
            f"{' or '.join(map(str, lengths))}",
            fix="prompts of the same template and length, or a circuit with per_position=False",
        )
