"""Graphs of random models with many equal scores, and what makes two circuits equal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from hypothesis import strategies as st

from gemmascope_plugin.causes import FeatureId
from gemmascope_plugin.graphs import Circuit, Graph
from gemmascope_plugin.graphs.edge_map import EdgeMap
from gemmascope_plugin.graphs.graph_arrays import Rank
from gemmascope_plugin.graphs.node import Node

META = {"task": "t", "metric": "LogitDiff", "method": "eap"}
EDGE_MAP = EdgeMap(2, 4, 2)


def edge_graph(edge_map: EdgeMap = EDGE_MAP, seed: int = 0, n_pos: int | None = None) -> Graph:
    """All edges of a model, with whole numbers from -3 to 3 as scores."""
    shape = edge_map.mask.shape if n_pos is None else (*edge_map.mask.shape, n_pos)
    scores = torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed))
    return Graph.of_edges(edge_map, scores.float(), META)


def node_graph(seed: int = 0) -> Graph:
    """Heads, an MLP and a feature."""
    nodes = [Node.head(1, i) for i in range(4)] + [Node.mlp(0)]
    nodes.append(Node.of_feature(FeatureId("blocks.0.hook_resid_post", 7)))
    generator = torch.Generator().manual_seed(seed)
    return Graph.of_nodes(nodes, torch.randn(len(nodes), generator=generator), META)


@dataclass(frozen=True)
class Recipe:
    """What a random graph is made from; made in the test, as type checkers draw random numbers."""

    heads: tuple[int, int] | None
    """Heads and key-value heads; None for a graph of nodes."""
    n_layers: int
    n_pos: int | None
    seed: int
    density: float

    def graph(self) -> Graph:
        if self.heads is None:
            return node_graph(self.seed)
        return edge_graph(EdgeMap(self.n_layers, *self.heads), self.seed, self.n_pos)

    def kept(self, n: int, seed: int = 0) -> torch.Tensor:
        """A random selection, sparse or dense."""
        generator = torch.Generator().manual_seed(self.seed + seed)
        return torch.rand(n, generator=generator) < self.density

    def circuit(self) -> Circuit:
        graph = self.graph()
        return Circuit(graph, self.kept(len(graph.unit_scores)), rank=get_args(Rank)[self.seed % 3])


def recipes(*heads: tuple[int, int] | None) -> st.SearchStrategy[Recipe]:
    return st.builds(
        Recipe,
        heads=st.sampled_from(heads),
        n_layers=st.integers(1, 3),
        n_pos=st.sampled_from([None, 2]),
        seed=st.integers(0, 2**31),
        density=st.floats(0, 1),
    )


EDGES = recipes((1, 1), (2, 1), (2, 2), (4, 2))
"""Random graphs of edges."""
ANY = recipes(None, (2, 1), (4, 2))
"""The same, and graphs of nodes."""


def equal(first: Circuit, second: Circuit) -> bool:
    """Whether two circuits are the same in everything, bit for bit."""
    names = ("node_scores", "source", "target", "port", "pos", "edge_scores")
    pairs = [(getattr(first.graph, name), getattr(second.graph, name)) for name in names]
    return (
        first.graph.components == second.graph.components
        and all(same_array(*pair) for pair in [*pairs, (first.is_kept, second.is_kept)])
        and first.rank == second.rank
        and first.metadata == second.metadata
    )


def same_array(first: torch.Tensor | None, second: torch.Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return first.dtype == second.dtype and torch.equal(first, second)
