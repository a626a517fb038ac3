"""What a graph holds: nodes as columns of arrays, weighted edges between them, and what is read off them.

1. ``nodes`` is a DataFrame of the columns, ``components`` are objects; both are made when asked for.
2. Edges are numpy arrays (``adjacency.py``); ``source, target, port, pos, edge_scores`` are the same as
   tensors, which share their memory.
3. A key-value head has no output edges of its own: it *feeds* the heads of its group (``feeds``), so what
   reaches it reaches them.

Cost: indexing only, no loop over edges.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64, UInt8

from gemmascope_plugin.arguments import as_index
from gemmascope_plugin.errors import (
    GemmaScopeError,
    InputError,
    UnknownNameError,
    check_choice,
    nearest,
)
from gemmascope_plugin.files.json_file import MAX_DEPTH
from gemmascope_plugin.graphs.adjacency import Adjacency, EdgeList
from gemmascope_plugin.graphs.defects import Parts, find_defect, rows_of_layers
from gemmascope_plugin.graphs.node import PORTS, Node, NodeColumns, nodes_of
from gemmascope_plugin.models.protocol import describe, is_model, with_call

if TYPE_CHECKING:
    import pandas as pd

G = TypeVar("G", bound="GraphArrays")
MAGNITUDES = "magnitude: no direction"
"""``metadata["sign"]`` of methods that know sizes only."""
Rank = Literal["absolute", "positive", "negative"]
"""What comes first: the largest, what supports the metric most, or what works against it most."""
Labels = Mapping[Any, Any] | Callable[[Node], str | None]
"""What nodes mean: by node, by (site, feature), by site and feature, or as a function."""


@dataclass(frozen=True, eq=False, repr=False)
class GraphArrays:
    """Nodes and weighted edges; immutable."""

    columns: NodeColumns
    """Arrays with an entry per node: ``kind, site, layer, pos, index``; ``score`` where
    nodes have one, ``meaning``; of a prompt also ``id, activation, weight, label``, and after pruning
    ``influence``, the share of all influence that the more important nodes have, this one included."""
    edges: Adjacency | EdgeList = field(default_factory=EdgeList)
    """Rows of explained nodes, or a list."""
    tokens: tuple[str, ...] = ()
    """The prompt; empty in a graph of none."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Task, metric, method, sign convention, model, residual; lists become tuples."""
    ranked: Literal["edge", "node"] | None = None
    """The unit; None for edges where there are any, else nodes."""

    def __post_init__(self) -> None:
        columns = dict(self.columns)
        are_arrays = all(isinstance(column, np.ndarray) for column in columns.values())
        assert are_arrays, "columns are arrays; table_columns(table) makes them"
        object.__setattr__(self, "columns", columns)
        object.__setattr__(self, "metadata", _frozen(self.metadata))
        if self.ranked is None:
            object.__setattr__(self, "ranked", "edge" if self.n_edges else "node")
        if isinstance(self.edges, Adjacency):
            assert self.edges.n_nodes == len(self), "the matrix has another number of nodes"
            assert len(set(columns["id"])) == len(self), "node ids are not unique"
        else:
            defect = find_defect(self.parts)
            assert defect is None, defect

    @classmethod
    def of_parts(cls: type[G], parts: Parts) -> G:
        """A graph of parts that were checked."""
        graph = cls.__new__(cls)
        for name, value in parts._asdict().items():
            object.__setattr__(graph, name, value)
        return graph

    @property
    def parts(self) -> Parts:
        """All fields."""
        return Parts(self.columns, self.edges, self.tokens, self.metadata, self.ranked)

    def __len__(self) -> int:
        return len(self.columns["kind"])

    # --------------------------------------------------------------------------------------- nodes
    @cached_property
    def nodes(self) -> pd.DataFrame:
        """One row a node, in the order of the forward pass."""
        import pandas as pd

        return pd.DataFrame(dict(self.columns))

    @cached_property
    def components(self) -> tuple[Node, ...]:
        """The nodes as objects."""
        return nodes_of(self.columns)

    @property
    def is_trace(self) -> bool:
        """Whether it is the graph of a prompt."""
        return bool(self.tokens)

    @cached_property
    def labels(self) -> np.ndarray:
        """What nodes are called, ``[node]``."""
        if "label" in self.columns:
            return self.columns["label"]
        return np.array([node.label for node in self.components], dtype=object)

    @cached_property
    def meanings(self) -> dict[Node, str]:
        """What some of the components stand for, in words."""
        words = self.columns.get("meaning", ())
        return {self.components[i]: text for i, text in enumerate(words) if text}

    @cached_property
    def node_scores(self) -> Float32[torch.Tensor, " node"] | None:
        """A score for every node, or None."""
        return torch.from_numpy(self.columns["score"]) if "score" in self.columns else None

    def where(self, kind: str) -> np.ndarray:
        """True at the nodes of a kind, ``[node]``."""
        return self.columns["kind"] == kind

    def find(self, node: str | int) -> int:
        """Place of a node.

        Args:
            node: Its id, or its place.

        Raises:
            UnknownNameError: With the nearest id.
        """
        place = as_index(node)
        if place is not None and 0 <= place < len(self):
            return place
        if not isinstance(node, str) or node not in self._places:
            raise UnknownNameError(
                f"The graph has no node {node!r}",
                exists=f"{len(self)} nodes",
                nearest=nearest(str(node), self._places),
                fix="graph.nodes.id",
            )
        return self._places[node]

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.columns.get("id", self.labels))}

    def with_labels(self: G, labels: Labels) -> G:
        """The same graph, whose nodes say in tables and figures what they mean: beside what a node is
        known by, which is its id in a trace (the texts are its ``label``), else its label (they are its
        ``meaning``).

        Args:
            labels: A mapping from dictionary site (its output hook) to feature to text, as
                ``suite.meanings(saes)`` makes, from (site, feature) or from :class:`Node` to text; or a
                function of a node, None where there is none. Earlier texts of the same nodes are
                replaced.
        """
        name = "label" if self.is_trace else "meaning"
        words = self.columns.get(name, np.full(len(self), "", dtype=object)).copy()
        for place, node in enumerate(self.components):
            text = _text_of(labels, node)
            if text:
                words[place] = str(text)
        return replace(self, columns={**self.columns, name: words}) if any(words) else self

    # --------------------------------------------------------------------------------------- edges
    @property
    def n_edges(self) -> int:
        """Number of edges: direct effects that are not zero."""
        return self.edges.n_edges

    @property
    def has_edges(self) -> bool:
        """Whether there are edges, ranked or not."""
        return self.n_edges > 0

    @cached_property
    def source(self) -> Int64[torch.Tensor, " edge"]:
        """Node that writes, as a place in ``nodes``."""
        return torch.from_numpy(self.edges.source).long()

    @cached_property
    def target(self) -> Int64[torch.Tensor, " edge"]:
        """Node that reads."""
        return torch.from_numpy(self.edges.target).long()

    @cached_property
    def port(self) -> UInt8[torch.Tensor, " edge"]:
        """Which input it reads through, as a place in ``PORTS``."""
        port = self.edges.port
        return torch.zeros(self.n_edges).byte() if port is None else torch.from_numpy(port)

    @cached_property
    def pos(self) -> Int64[torch.Tensor, " edge"] | None:
        """Position of each edge; None where edges stand for all positions."""
        return None if self.edges.pos is None else torch.from_numpy(self.edges.pos)

    @cached_property
    def edge_scores(self) -> Float[torch.Tensor, " edge"]:
        """Weight of every edge."""
        return torch.from_numpy(self.edges.weight)

    @property
    def edge_labels(self) -> list[str]:
        """``L0H1->L1KV0.k``, with ``@3`` at a position of its own; in the order of the edges."""
        return self.labels_of(torch.arange(self.n_edges)).tolist()

    def labels_of(self, edges: Int64[torch.Tensor, " some"]) -> np.ndarray:
        """Labels of some edges, as an array of strings."""
        ports = np.array([f".{port}" if port else "" for port in PORTS], dtype=object)
        labels = self.labels[self.source[edges].numpy()] + "->"
        labels = labels + self.labels[self.target[edges].numpy()] + ports[self.port[edges].numpy()]
        if self.pos is not None:
            labels = labels + "@" + self.pos[edges].numpy().astype(str).astype(object)
        return labels

    @cached_property
    def feeds(self) -> Int64[torch.Tensor, "pair two"]:
        """Every key-value head with every head of its group, as places in ``nodes``."""
        heads, pairs = rows_of_layers(self.columns, "head"), []
        for layer, rows in rows_of_layers(self.columns, "kv").items():
            group = len(heads[layer]) // len(rows)
            pairs += [(rows[head // group], row) for head, row in heads[layer].items()]
        return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)

    def joins(self, is_inside: Bool[torch.Tensor, " node"]) -> Int64[torch.Tensor, " edge"]:
        """The edges between some nodes, the largest first."""
        inside = (is_inside[self.source] & is_inside[self.target]).nonzero().flatten()
        return inside[self.edge_scores[inside].abs().argsort(descending=True, stable=True)]

    @property
    def rows(self) -> Adjacency:
        """The edges of a trace.

        Raises:
            GemmaScopeError: The graph is not a trace.
        """
        if not isinstance(self.edges, Adjacency):
            raise GemmaScopeError(
                f"{self!r} explains no targets", fix="gemmascope_plugin.trace(model, prompt, saes)"
            )
        return self.edges

    # --------------------------------------------------------------------------------------- units
    @property
    def ranks_edges(self) -> bool:
        """Whether edges are ranked, not nodes."""
        return self.ranked == "edge"

    @property
    def unit(self) -> Literal["edge", "node"]:
        """What is ranked."""
        return "edge" if self.ranks_edges else "node"

    @property
    def unit_scores(self) -> Float[torch.Tensor, " unit"]:
        """Score of every edge, or of every node where nodes are ranked."""
        scores = self.edge_scores if self.ranks_edges else self.node_scores
        assert scores is not None
        return scores

    @property
    def has_signs(self) -> bool:
        """Whether scores say more than a size."""
        return self.metadata.get("sign") != MAGNITUDES

    def ranked_by(self, rank: Rank) -> Float[torch.Tensor, " unit"]:
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
        """All units, most important first, as :meth:`ranked_by` ranks them; equal ones in the order of
        the graph.
        """
        if rank not in self._orders:
            self._orders[rank] = self.ranked_by(rank).argsort(descending=True, stable=True)
        return self._orders[rank]

    @cached_property
    def _orders(self) -> dict[Rank, Int64[torch.Tensor, " unit"]]:
        return {}


def _text_of(labels: Labels, node: Node) -> str | None:
    """What a node means, in whatever form that is said."""
    if not isinstance(labels, Mapping):
        return labels(node)
    text = labels.get(node)
    if text is None and node.kind == "feature":
        text = labels.get((node.site, node.index))
        text = labels.get(node.site, {}).get(node.index) if text is None else text
    return text


def check_graph(graph: object, call: str = "") -> None:
    """Refuses what is not the graph of a prompt, with what to type."""
    if not isinstance(graph, GraphArrays) or not graph.is_trace:
        fix = "graph = gemmascope_plugin.trace(model, prompt, saes)"
        raise wrong_type(graph, call, "attribution graph", fix)


def check_ranking(graph: object, call: str = "") -> None:
    """Refuses what is not a graph of components or features."""
    if not isinstance(graph, GraphArrays) or graph.is_trace:
        raise wrong_type(graph, call, "graph", "circuit.graph")


def wrong_type(value: object, call: str, noun: str, fix: str) -> InputError:
    """An error that says what a value is, and what was expected."""
    article = "an" if noun[0] in "aeiou" else "a"
    problem = "The model" if is_model(value) else describe(value)
    return InputError(f"{problem} is not {article} {noun}", fix=with_call(fix, call))


def _frozen(value: Any, depth: int = 0) -> Any:
    """A copy that nobody else can change: mappings copied, lists and tuples made tuples."""
    if depth > MAX_DEPTH:  # no file takes it
        return value
    if isinstance(value, Mapping):
        return {key: _frozen(each, depth + 1) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_frozen(each, depth + 1) for each in value)
    return value
