"""The edges of a model: who writes to the residual stream, who reads from it, who can reach whom.

1. Writers in the order of the forward pass: the embedding, then per layer its heads and its MLP.
2. Readers in that order: per layer the queries of every head, keys and values of every *key-value* head
   (``n_kv``, shared by a group of query heads), the MLP; then the logits.
3. A writer reaches the readers after it; an MLP also reads the heads of its own layer.

With ``H`` heads, ``K`` key-value heads and ``L`` layers there are ``1 + L (H + 1)`` writers and
``L (H + 2 K + 1) + 1`` readers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int, Int64

from gemmascope_plugin.errors import GemmaScopeError, ModelError, UnknownNameError
from gemmascope_plugin.graphs.adjacency import EdgeList
from gemmascope_plugin.graphs.node import PORTS, Node, Reader
from gemmascope_plugin.models.anatomy import Anatomy

if TYPE_CHECKING:
    from gemmascope_plugin.graphs.graph_arrays import GraphArrays

Places = tuple[Int64[torch.Tensor, " edge"], Int64[torch.Tensor, " edge"]]
"""Row of the writer and column of the reader of every edge."""


@dataclass(frozen=True)
class EdgeMap:
    """Writers, readers and the edges between them."""

    n_layers: int
    n_heads: int
    """Query heads of each layer."""
    n_kv: int
    """Key-value heads of each layer."""

    @classmethod
    def of(cls, anatomy: Anatomy) -> EdgeMap:
        """That of a model."""
        return cls(anatomy.n_layers, anatomy.n_heads, anatomy.n_kv)

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        """All nodes: embedding; per layer heads, key-value heads, MLP; logits."""
        nodes = [Node.embed()]
        for layer in range(self.n_layers):
            nodes += [Node.head(layer, head) for head in range(self.n_heads)]
            nodes += [Node.kv(layer, head) for head in range(self.n_kv)]
            nodes.append(Node.mlp(layer))
        return (*nodes, Node.logits())

    @cached_property
    def writers(self) -> tuple[Node, ...]:
        """All nodes that write, in the order of the forward pass."""
        layers = [
            (*(Node.head(layer, head) for head in range(self.n_heads)), Node.mlp(layer))
            for layer in range(self.n_layers)
        ]
        return (Node.embed(), *(node for layer in layers for node in layer))

    @cached_property
    def readers(self) -> tuple[Reader, ...]:
        """All inputs, in the order of the forward pass."""
        layers = [
            (
                *(Reader(Node.head(layer, head), "q") for head in range(self.n_heads)),
                *(Reader(Node.kv(layer, head), "k") for head in range(self.n_kv)),
                *(Reader(Node.kv(layer, head), "v") for head in range(self.n_kv)),
                Reader(Node.mlp(layer)),
            )
            for layer in range(self.n_layers)
        ]
        return (*(reader for layer in layers for reader in layer), Reader(Node.logits()))

    @cached_property
    def mask(self) -> Bool[torch.Tensor, "writer reader"]:
        """True where an edge exists."""
        return mask_between(self.writers, self.readers)

    @property
    def n_edges(self) -> int:
        """Number of edges."""
        return int(self.mask.sum())

    def edge_list(self, scores: Float[torch.Tensor, "writer reader *pos"]) -> EdgeList:
        """All edges between places in ``nodes``, ordered by writer, reader, position."""
        assert scores.shape[:2] == self.mask.shape and scores.ndim <= 3, "not of this edge map"
        place = {node: i for i, node in enumerate(self.nodes)}
        sources = torch.tensor([place[node] for node in self.writers])
        targets = torch.tensor([place[reader.node] for reader in self.readers])
        ports = torch.tensor([PORTS.index(reader.port) for reader in self.readers])
        rows, columns = self.mask.nonzero(as_tuple=True)
        values, pos = finite_scores(scores.detach().cpu()[rows, columns].float()), None
        if values.ndim == 2:
            n_pos = values.shape[1]
            pos = torch.arange(n_pos).repeat(len(rows))
            rows, columns = (index.repeat_interleave(n_pos) for index in (rows, columns))
        return EdgeList.of(
            sources[rows], targets[columns], values.flatten(), port=ports[columns], pos=pos
        )

    def writer(self, node: Node) -> int:
        """Its row."""
        return self._rows[node]

    def reader(self, reader: Reader) -> int:
        """Its column."""
        return self._columns[reader]

    def heads(self, layer: int) -> slice:
        """Rows of the heads of a layer."""
        start = 1 + layer * (self.n_heads + 1)
        return slice(start, start + self.n_heads)

    def mlp(self, layer: int) -> int:
        """Row of an MLP."""
        return (layer + 1) * (self.n_heads + 1)

    def inputs(self, layer: int, port: str) -> slice:
        """Columns of a layer's ``q``, ``k``, ``v`` or ``mlp``; ``logits`` whatever the layer."""
        if port == "logits":
            return slice(len(self.readers) - 1, len(self.readers))
        start = layer * (self.n_heads + 2 * self.n_kv + 1)
        offset, n = {
            "q": (0, self.n_heads),
            "k": (self.n_heads, self.n_kv),
            "v": (self.n_heads + self.n_kv, self.n_kv),
            "mlp": (self.n_heads + 2 * self.n_kv, 1),
        }[port]
        return slice(start + offset, start + offset + n)

    @cached_property
    def feeds(self) -> Int[torch.Tensor, "reader two"]:
        """First and one past the last writer that a reader feeds; empty for the logits."""
        spans = []
        for node, port in self.readers:
            if node.kind == "logits":
                spans.append((0, 0))
            elif node.kind == "mlp":
                row = self.mlp(node.layer)
                spans.append((row, row + 1))
            else:
                group = 1 if port == "q" else self.n_heads // self.n_kv
                row = self.heads(node.layer).start + node.index * group
                spans.append((row, row + group))
        return torch.tensor(spans)

    @cached_property
    def _rows(self) -> dict[Node, int]:
        return {node: row for row, node in enumerate(self.writers)}

    @cached_property
    def _columns(self) -> dict[Reader, int]:
        return {reader: column for column, reader in enumerate(self.readers)}


def mask_between(
    writers: Sequence[Node], readers: Sequence[Reader]
) -> Bool[torch.Tensor, "writer reader"]:
    """True where an edge exists: the writer has written before the reader reads."""
    written = torch.tensor([_written(node) for node in writers])
    return written[:, None] < torch.tensor([_read(reader.node) for reader in readers])


def _read(node: Node) -> float:
    """When a node reads, in half layers; the logits after everything."""
    return math.inf if node.kind == "logits" else 2.0 * node.layer + (node.kind == "mlp")


def _written(node: Node) -> int:
    """When a node has written, in half layers."""
    return -1 if node.kind == "embed" else 2 * node.layer + (node.kind == "mlp")


def places_in(graph: GraphArrays, edge_map: EdgeMap) -> Places:
    """Rows and columns of all edges of a graph, in its order."""
    if not graph.ranks_edges or graph.pos is not None:
        has = "edges at single positions" if graph.ranks_edges else "nodes only"
        raise GemmaScopeError(
            f"{graph!r} has {has}, and no mask over edges",
            fix="a graph of edges without positions",
        )
    writes, reads = _ends(graph, edge_map)
    rows, columns = writes[graph.source], reads[graph.target, graph.port.long()]
    bad = (rows < 0) | (columns < 0)
    bad |= ~edge_map.mask[rows.clamp(min=0), columns.clamp(min=0)]
    if bool(bad.any()):
        label = graph.labels_of(bad.nonzero().flatten()[:1])[0]
        raise UnknownNameError(
            f"The model has no edge {label!r}",
            exists=f"{edge_map.n_edges} edges of {edge_map.n_layers} layers with "
            f"{edge_map.n_heads} heads and {edge_map.n_kv} key-value heads",
            fix="the model that the circuit was discovered in",
        )
    return rows, columns


def _ends(
    graph: GraphArrays, edge_map: EdgeMap
) -> tuple[Int64[torch.Tensor, " node"], Int64[torch.Tensor, "node port"]]:
    """Row of every node that writes and column of every port that reads; -1 for those of no model."""
    place = {node: i for i, node in enumerate(graph.components)}
    rows = torch.full((len(graph.nodes),), -1)
    columns = torch.full((len(graph.nodes), len(PORTS)), -1)
    for row, node in enumerate(edge_map.writers):
        if node in place:
            rows[place[node]] = row
    for column, (node, port) in enumerate(edge_map.readers):
        if node in place:
            columns[place[node], PORTS.index(port)] = column
    return rows, columns


def finite_scores(scores: Float[torch.Tensor, "*shape"]) -> Float[torch.Tensor, "*shape"]:
    """Scores, none of which is NaN or infinite."""
    bad = scores.numel() - int(scores.isfinite().sum())
    if bad:
        raise ModelError(
            f"{bad} of {scores.numel()} scores are NaN or infinite",
            fix="a model in float32 or bfloat16, and a metric that is finite on all prompts",
        )
    return scores
