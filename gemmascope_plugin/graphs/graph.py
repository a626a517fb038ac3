"""A graph: components of a model and the scored edges between them, as parallel arrays.

1. Nodes are heads, key-value heads, MLPs, features, the embedding and the logits. Edges go from a node
   that writes to a port of a node that reads: queries of a head, keys or values of a key-value head.
2. A key-value head has no output edges of its own: it *feeds* the heads of its group (``feeds``), so what
   reaches it reaches them.
3. Scores are signed; ``metadata["sign"]`` says how to read them. What is ranked, edges or nodes, are its
   *units*: edges where there are any, unless ``ranked="node"``. Then edges join nodes and are no units.

Cost: indexing only, no loop over edges; 500,000 edges take a fraction of a second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Float32, Int64, UInt8

import gemmascope_plugin.figures as figures
from gemmascope_plugin.errors import ModelError, check_choice
from gemmascope_plugin.figures.layered_graph import layered_graph
from gemmascope_plugin.graphs.edge_map import EdgeMap
from gemmascope_plugin.graphs.frames import caption, edge_frame, layer_of, node_frame, row_of
from gemmascope_plugin.graphs.node import Node, Port
from gemmascope_plugin.graphs.soundness import content_fault, group_rows

if TYPE_CHECKING:
    import numpy as np

PORTS: tuple[Port, ...] = ("", "q", "k", "v")
"""Ports by their number in ``Graph.port``."""
SIGN = "positive = supports the metric"
MAGNITUDES = "magnitude: no direction"
"""``metadata["sign"]`` of methods that know sizes only."""
Rank = Literal["absolute", "positive", "negative"]
"""What comes first: the largest, what supports the metric most, or what works against it most."""
MAX_BARS = 40
"""Bars of a figure of nodes."""
SHOWN = 12
"""Rows of a graph in a notebook."""


def _empty(dtype: torch.dtype) -> Any:
    return field(default_factory=lambda: torch.empty(0, dtype=dtype))


@dataclass(frozen=True, eq=False, repr=False)
class Graph:
    """Nodes and scored edges; immutable."""

    nodes: tuple[Node, ...]
    """Each once."""
    node_scores: Float32[torch.Tensor, " node"] | None = None
    source: Int64[torch.Tensor, " edge"] = _empty(torch.int64)
    """Node that writes, as a place in ``nodes``."""
    target: Int64[torch.Tensor, " edge"] = _empty(torch.int64)
    """Node that reads."""
    port: UInt8[torch.Tensor, " edge"] = _empty(torch.uint8)
    """Which input it reads through, as a place in ``PORTS``."""
    pos: Int64[torch.Tensor, " edge"] | None = None
    """Position of each edge; None where edges stand for all positions."""
    edge_scores: Float32[torch.Tensor, " edge"] = _empty(torch.float32)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Task, metric, method, sign convention; lists become tuples."""
    ranked: Literal["edge", "node"] | None = None
    """The unit; None for edges where there are any, else nodes."""
    meanings: Mapping[Node, str] = field(default_factory=dict)
    """What some of the nodes stand for, in words."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "metadata", _frozen(self.metadata))
        object.__setattr__(self, "meanings", dict(self.meanings))
        if self.ranked is None:
            object.__setattr__(self, "ranked", "edge" if self.n_edges else "node")
        arrays = [self.target, self.port, self.edge_scores]
        arrays += [self.pos] if self.pos is not None else []
        assert all(len(array) == self.n_edges for array in arrays), "edge arrays differ in length"
        assert self.node_scores is None or len(self.node_scores) == len(self.nodes)
        fault = content_fault(
            self.nodes,
            self.node_scores,
            self.source,
            self.target,
            self.port,
            self.pos,
            self.edge_scores,
            self.ranked,
        )
        assert fault is None, fault

    @classmethod
    def of_nodes(
        cls,
        nodes: Sequence[Node],
        scores: Sequence[float] | Float[torch.Tensor, " node"],
        metadata: Mapping[str, Any] | None = None,
    ) -> Graph:
        """A graph of nodes only.

        Args:
            nodes: The nodes.
            scores: One each.
            metadata: What to know about them; ``sign`` is filled in.

        Raises:
            ModelError: A score is NaN or infinite.
        """
        values = _finite(torch.as_tensor(scores, dtype=torch.float32).detach().cpu().clone())
        return cls(tuple(nodes), values, metadata={"sign": SIGN, **(metadata or {})})

    @classmethod
    def of_edges(
        cls,
        edge_map: EdgeMap,
        scores: Float[torch.Tensor, "writer reader *pos"],
        metadata: Mapping[str, Any] | None = None,
    ) -> Graph:
        """All edges of a model.

        Args:
            edge_map: The model's edges.
            scores: ``[writer, reader]`` or, for an edge per position, ``[writer, reader, pos]``; entries
                where no edge exists are ignored.
            metadata: What to know about them; ``sign`` is filled in.

        Returns:
            Nodes in the order of the forward pass; edges ordered by writer, reader, position.

        Raises:
            ModelError: A score of an edge is NaN or infinite.
        """
        assert scores.shape[:2] == edge_map.mask.shape and scores.ndim <= 3, "not of this edge map"
        nodes = _forward_order(edge_map)
        place = {node: i for i, node in enumerate(nodes)}
        sources = torch.tensor([place[node] for node in edge_map.writers])
        targets = torch.tensor([place[reader.node] for reader in edge_map.readers])
        ports = [PORTS.index(reader.port) for reader in edge_map.readers]
        rows, columns = edge_map.mask.nonzero(as_tuple=True)
        values, pos = _finite(scores.detach().cpu()[rows, columns].float()), None
        if values.ndim == 2:
            n_pos = values.shape[1]
            pos = torch.arange(n_pos).repeat(len(rows))
            rows, columns = (index.repeat_interleave(n_pos) for index in (rows, columns))
        return cls(
            nodes=nodes,
            source=sources[rows],
            target=targets[columns],
            port=torch.tensor(ports, dtype=torch.uint8)[columns],
            pos=pos,
            edge_scores=values.flatten(),
            metadata={"sign": SIGN, **(metadata or {})},
        )

    @property
    def n_edges(self) -> int:
        """Number of edges."""
        return len(self.source)

    @property
    def has_edges(self) -> bool:
        """Whether there are edges, ranked or not."""
        return self.n_edges > 0

    @property
    def ranks_edges(self) -> bool:
        """Whether edges are ranked, not nodes."""
        return self.ranked == "edge"

    @property
    def unit(self) -> Literal["edge", "node"]:
        """What is ranked."""
        return "edge" if self.ranks_edges else "node"

    @property
    def unit_scores(self) -> Float32[torch.Tensor, " unit"]:
        """Score of every edge, or of every node where nodes are ranked."""
        scores = self.edge_scores if self.ranks_edges else self.node_scores
        assert scores is not None
        return scores

    def joins(self, kept: Bool[torch.Tensor, " node"]) -> Int64[torch.Tensor, " edge"]:
        """The edges between some nodes, the largest first.

        Args:
            kept: True for these nodes.
        """
        inside = (kept[self.source] & kept[self.target]).nonzero().flatten()
        return inside[self.edge_scores[inside].abs().argsort(descending=True, stable=True)]

    @property
    def has_signs(self) -> bool:
        """Whether scores say more than a size."""
        return self.metadata.get("sign") != MAGNITUDES

    def ranked_by(self, rank: Rank) -> Float32[torch.Tensor, " unit"]:
        """What units are ranked by, the largest first.

        Args:
            rank: The ``absolute`` score, the score (``positive``) or its opposite (``negative``).

        Raises:
            UnknownNameError: Another rank.
        """
        check_choice("rank", rank, get_args(Rank))
        scores = self.unit_scores
        return {"absolute": scores.abs(), "positive": scores, "negative": -scores}[rank]

    def order(self, rank: Rank = "absolute") -> Int64[torch.Tensor, " unit"]:
        """All units, most important first; equal ones in the order of the graph.

        Args:
            rank: See :meth:`ranked_by`.
        """
        if rank not in self._orders:
            self._orders[rank] = self.ranked_by(rank).argsort(descending=True, stable=True)
        return self._orders[rank]

    @cached_property
    def _orders(self) -> dict[Rank, Int64[torch.Tensor, " unit"]]:
        return {}

    @cached_property
    def feeds(self) -> Int64[torch.Tensor, "pair two"]:
        """Every key-value head with every head of its group, as places in ``nodes``."""
        return torch.tensor(group_rows(self.nodes), dtype=torch.int64).reshape(-1, 2)

    @property
    def edge_labels(self) -> list[str]:
        """``L0H1->L1KV0.k``, with ``@3`` at a position of its own; in the order of the edges."""
        return self.labels_of(torch.arange(self.n_edges)).tolist()

    def labels_of(self, edges: Int64[torch.Tensor, " some"]) -> np.ndarray:
        """Labels of some edges, as an array of strings."""
        import numpy as np

        ports = np.array([f".{port}" if port else "" for port in PORTS], dtype=object)
        labels = self._labels[self.source[edges].numpy()] + "->"
        labels = labels + self._labels[self.target[edges].numpy()] + ports[self.port[edges].numpy()]
        if self.pos is not None:
            labels = labels + "@" + self.pos[edges].numpy().astype(str).astype(object)
        return labels

    @cached_property
    def _labels(self) -> np.ndarray:
        import numpy as np

        return np.array([node.label for node in self.nodes], dtype=object)

    def to_frame(self, units: Int64[torch.Tensor, " some"] | None = None) -> Any:
        """A DataFrame, one row per unit.

        Args:
            units: Which of them, in which order; all by default.
        """
        units = torch.arange(len(self.unit_scores)) if units is None else units
        if self.ranks_edges:
            return self.edge_frame(units)
        return node_frame(self.nodes, units, self.unit_scores[units], self.meanings)

    def edge_frame(self, edges: Int64[torch.Tensor, " some"]) -> Any:
        """A DataFrame, one row per edge.

        Args:
            edges: Which of them, in which order.
        """
        import numpy as np

        more: dict[str, Any] = {}
        if self.ranks_edges:
            more["port"] = np.array(PORTS, dtype=object)[self.port[edges].numpy()]
        if self.pos is not None:
            more["pos"] = self.pos[edges].numpy()
        ends, scores = (self.source[edges], self.target[edges]), self.edge_scores[edges]
        return edge_frame(self.nodes, self._labels, ends, more, scores, self.meanings)

    def draw(self, units: Int64[torch.Tensor, " some"], title: str) -> Any:
        """A plotly figure of some units: edges between layers, nodes with their edges, or bars.

        Args:
            units: Which.
            title: Title; says so itself when only the largest are drawn.
        """
        if self.ranks_edges:
            return self._layers(units, title)
        if self.has_edges:
            kept = torch.zeros(len(self.nodes), dtype=torch.bool)
            kept[units] = True
            return self._layers(self.joins(kept), title, units)
        scores = self.unit_scores[units]
        largest = scores.abs().argsort(descending=True, stable=True)[:MAX_BARS]
        if len(largest) < len(units):
            title += f", the {len(largest)} largest"
        names = [caption(self.nodes[i], self.meanings) for i in units[largest].tolist()]
        # in two lines: a figure is half as wide as a page
        sign = f"<br>{self.metadata['sign']}" if "sign" in self.metadata else ""
        x_title = f"effect on {self.metadata.get('metric')}{sign}"
        return figures.bars(names, scores[largest].tolist(), title=title, x_title=x_title)

    def _layers(
        self,
        edges: Int64[torch.Tensor, " some"],
        title: str,
        nodes: Int64[torch.Tensor, " other"] | None = None,
    ) -> Any:
        """Edges between layers, and nodes that are drawn whether they have edges or not."""
        scores = None if nodes is None or not self.has_signs else self.node_scores
        return layered_graph(
            [caption(node, self.meanings) for node in self.nodes],
            [row_of(node) for node in self.nodes],
            [layer_of(node) for node in self.nodes],
            source=self.source[edges].numpy(),
            target=self.target[edges].numpy(),
            weights=self.edge_scores[edges].numpy(),
            edge_labels=self.labels_of(edges),
            links=self.feeds.numpy(),
            nodes=None if nodes is None else nodes.numpy(),
            node_weights=None if scores is None else scores.numpy(),
            title=title,
        )

    def plot(self) -> Any:
        """A plotly figure of all units; the largest of them if there are many."""
        units = torch.arange(len(self.unit_scores))
        return self.draw(units, f"{len(units)} {self.unit}s of {self.metadata.get('task')}")

    def __repr__(self) -> str:
        edges = f", {self.n_edges} edges" if self.has_edges else ""
        return (
            f"Graph({self.metadata.get('task')}, {len(self.nodes)} nodes{edges} by "
            f"{self.metadata.get('method')}, {self.metadata.get('sign')})"
        )

    def _repr_html_(self) -> str:
        table = figures.frame_html(self.to_frame(self.order()[:SHOWN]), SHOWN)
        return f"<p>{escape(repr(self))}; the largest scores:</p>{table}"


def _forward_order(edge_map: EdgeMap) -> tuple[Node, ...]:
    """All nodes of a model: embedding; per layer heads, key-value heads, MLP; logits."""
    nodes = [Node.embed()]
    for layer in range(edge_map.n_layers):
        nodes += [Node.head(layer, head) for head in range(edge_map.n_heads)]
        nodes += [Node.kv(layer, head) for head in range(edge_map.n_kv)]
        nodes.append(Node.mlp(layer))
    return (*nodes, Node.logits())


def _finite(scores: Float32[torch.Tensor, "*shape"]) -> Float32[torch.Tensor, "*shape"]:
    bad = scores.numel() - int(scores.isfinite().sum())
    if bad:
        raise ModelError(
            f"{bad} of {scores.numel()} scores are NaN or infinite",
            fix="a model in float32 or bfloat16, and a metric that is finite on all prompts",
        )
    return scores


def _frozen(value: Any) -> Any:
    """A copy that nobody else can change: mappings copied, lists and tuples made tuples."""
    if isinstance(value, Mapping):
        return {key: _frozen(each) for key, each in value.items()}
    return tuple(_frozen(each) for each in value) if isinstance(value, list | tuple) else value
