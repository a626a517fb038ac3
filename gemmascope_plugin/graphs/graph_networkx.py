"""An attribution graph as a graph of networkx, for its algorithms and file formats.

Cost: a loop over nodes and edges.
"""

from __future__ import annotations

import math
from typing import Any

from gemmascope_plugin.errors import MissingExtraError
from gemmascope_plugin.graphs.parts import Parts, ends


def to_networkx(parts: Parts) -> Any:
    """A ``DiGraph``: node ids with the columns of ``graph.nodes`` (unknown numbers left out), edges with
    ``weight``; the graph has ``prompt`` and ``tokens``.

    Args:
        parts: The graph.

    Raises:
        MissingExtraError: networkx is not installed.
    """
    try:
        import networkx as nx
    except ImportError as fault:
        raise MissingExtraError(
            "An attribution graph was asked for as one of networkx, which is not installed",
            fix="pip install networkx",
        ) from fault
    result = nx.DiGraph(prompt=str(parts.metadata.get("prompt", "")), tokens=" ".join(parts.tokens))
    ids = parts.nodes["id"].tolist()
    for name, row in zip(ids, parts.nodes.drop(columns="id").to_dict("records"), strict=True):
        known = {k: v for k, v in row.items() if not (isinstance(v, float) and math.isnan(v))}
        result.add_node(name, **known)
    source, target, weight = (array.tolist() for array in ends(parts.edges))
    for i, j, w in zip(source, target, weight, strict=True):
        result.add_edge(ids[i], ids[j], weight=w)
    return result
