"""A circuit: a graph and which of its units are kept.

The units are what the graph ranks: its edges, or its nodes. They are ranked by the absolute
value of their scores (or by the signed scores, ``rank``), equal ones in the order of the graph.
Circuits come from :func:`~gemmascope_plugin.circuits.select.top_n`, ``greedy`` and ``threshold``; another
size, pruning and so on make new ones that share the graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int64

import gemmascope_plugin.figures as figures
from gemmascope_plugin.errors import BadFileError, EmptySelectionError, GemmaScopeError
from gemmascope_plugin.graphs.components_json import components_to_json
from gemmascope_plugin.graphs.edge_map import EdgeMap, places_in
from gemmascope_plugin.graphs.frames import (
    SHOWN,
    conservation_text,
    edge_frame,
    unit_figure,
    units_to_networkx,
)
from gemmascope_plugin.graphs.graph import Graph
from gemmascope_plugin.graphs.graph_arrays import Labels, Rank, wrong_type
from gemmascope_plugin.graphs.graph_file import RANKS, load_circuit, save_graph
from gemmascope_plugin.graphs.node import PORTS, Node, Reader
from gemmascope_plugin.graphs.pruning import without_dead_ends
from gemmascope_plugin.graphs.read_json import read_graph
from gemmascope_plugin.models.gate import gate

if TYPE_CHECKING:
    import networkx as nx
    import pandas as pd

    from gemmascope_plugin.figures.layered_graph import Figure

ROLES = {1: "supports", 0: "", -1: "opposes"}
"""What the sign of a score says of a unit and the metric."""
SIGNS = {1: "+", 0: "", -1: "-"}


@dataclass(frozen=True, eq=False, repr=False)
class Circuit:
    """The kept units of a graph; immutable.

    Example:
        >>> suite = gs.tiny()
        >>> task = suite.task("agreement", n=8)
        >>> circuit = gs.discover(suite.model, task, method="exact", size=4)
        >>> [node.label for node in circuit.nodes]
        ['L2H3', 'MLP3', 'MLP2', 'L3H2']
        >>> circuit.top(2).size
        2
    """

    graph: Graph
    is_kept: Bool[torch.Tensor, " unit"]
    """True where an edge (or node, where nodes are ranked) is kept."""
    rank: Rank = "absolute"
    """Which units come first: the largest, or, by sign, those for or those against the metric."""

    def __post_init__(self) -> None:
        assert len(self.is_kept) == len(self.graph.unit_scores), "not of this graph"

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Task, metric, method, sign convention."""
        return self.graph.metadata

    @property
    def n_units(self) -> int:
        """How many edges (or nodes) there are to choose from."""
        return len(self.is_kept)

    @cached_property
    def size(self) -> int:
        """How many of them are kept."""
        return int(self.is_kept.sum())

    @property
    def share(self) -> float:
        """``size / n_units``."""
        return self.size / self.n_units

    @property
    def order(self) -> Int64[torch.Tensor, " unit"]:
        """All units, most important first, as places in the graph."""
        return self.graph.order(self.rank)

    @property
    def kept_order(self) -> Int64[torch.Tensor, " kept"]:
        """The kept units, most important first, as places in the graph."""
        return self.order[self.is_kept[self.order]]

    @property
    def scores(self) -> tuple[float, ...]:
        """Scores of all units, most important first."""
        return tuple(self.graph.unit_scores[self.order].tolist())

    @cached_property
    def ranking(self) -> tuple[Node, ...]:
        """All nodes, most important first.

        Raises:
            GemmaScopeError: The circuit ranks edges.
        """
        if self.graph.ranks_edges:
            raise GemmaScopeError(
                f"{self!r} ranks edges, not nodes",
                fix="circuit.edges, circuit.order, or circuit.to_frame()",
            )
        return tuple(self.graph.components[i] for i in self.order.tolist())

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        """The kept nodes, most important first; of edges, all their ends in the order of the graph."""
        places = self.kept_order
        if self.graph.ranks_edges:
            ends = torch.cat([self.graph.source[places], self.graph.target[places]])
            places = ends.unique()
        return tuple(self.graph.components[i] for i in places.tolist())

    @cached_property
    def edges(self) -> tuple[tuple[Node, Reader], ...]:
        """The kept edges, most important first; where nodes are ranked, all edges between kept ones."""
        graph, places = self.graph, self.kept_edges
        ends = torch.stack(
            [graph.source[places], graph.target[places], graph.port[places].long()], 1
        )
        nodes = graph.components
        return tuple((nodes[s], Reader(nodes[t], PORTS[p])) for s, t, p in ends.tolist())

    @property
    def kept_edges(self) -> Int64[torch.Tensor, " edge"]:
        """The same, as places in the graph."""
        return self.kept_order if self.graph.ranks_edges else self.graph.joins(self.is_kept)

    def mask(self, edge_map: EdgeMap) -> Bool[torch.Tensor, "writer reader"]:
        """True where an edge of a model is kept.

        Args:
            edge_map: The model's edges.

        Raises:
            GemmaScopeError: The circuit is one of nodes, or its edges have positions.
            UnknownNameError: An edge does not exist in the model.
        """
        rows, columns = places_in(self.graph, edge_map)
        mask = torch.zeros(edge_map.mask.shape, dtype=torch.bool)
        mask[rows[self.is_kept], columns[self.is_kept]] = True
        return mask

    def top(self, n: int) -> Circuit:
        """The circuit of the ``n`` most important units.

        Raises:
            EmptySelectionError: ``n`` is negative or larger than the number of units.
        """
        if not 0 <= n <= self.n_units:
            unit = self.graph.unit
            raise EmptySelectionError(
                f"A circuit of {n} {unit}s was asked for", exists=f"{self.n_units} {unit}s"
            )
        is_kept = torch.zeros(self.n_units, dtype=torch.bool)
        is_kept[self.order[:n]] = True
        return replace(self, is_kept=is_kept)

    def pruned(self) -> Circuit:
        """Without dead ends; see :func:`~gemmascope_plugin.graphs.pruning.without_dead_ends`.

        Raises:
            GemmaScopeError: The circuit is one of nodes, or the graph has no embedding or no logits.
        """
        return replace(self, is_kept=without_dead_ends(self.graph, self.is_kept))

    @gate()
    def save(self, path: str | Path) -> Path:
        """Writes graph and selection into one file, exactly; see ``graph_file.py``.

        Returns:
            The path.

        Raises:
            GemmaScopeError: The file cannot be written, or the metadata do not fit into JSON.
        """
        return save_graph(path, self.graph.parts, self.is_kept.numpy(), self.rank)

    @classmethod
    @gate()
    def load(cls, path: str | Path) -> Circuit:
        """Reads what :meth:`save` has written.

        Raises:
            MissingFileError: There is no such file.
            BadFileError: It is damaged, contradicts itself, or is of another version.
        """
        parts, is_kept, rank = load_circuit(path)
        return cls(Graph.of_parts(parts), torch.from_numpy(is_kept), rank)

    def to_json(self, slug: str = "circuit") -> dict[str, Any]:
        """Graph and selection as JSON for other programs; see ``components_json.py``.

        Args:
            slug: Name of its file, without ``.json``.

        Raises:
            UnknownNameError: The slug is not a file name.
            GemmaScopeError: The metadata do not fit into JSON.
        """
        return components_to_json(self.graph, slug, (self.is_kept.numpy(), self.rank))

    @classmethod
    @gate()
    def from_json(cls, source: str | Path | Mapping[str, Any]) -> Circuit:
        """Reads what :meth:`to_json` gives, from a file or as it is.

        Raises:
            MissingFileError: There is no such file.
            BadFileError: It is damaged, or a graph without a selection.
        """
        parts, selection = read_graph(source)
        if selection is None or selection[1] not in RANKS:
            raise BadFileError(
                "The JSON has a graph without a selection",
                fix="Graph.from_json, or circuit.to_json()",
            )
        rank: Any = selection[1]
        return cls(Graph(*parts), torch.from_numpy(selection[0]), rank)

    def to_networkx(self) -> nx.MultiDiGraph:
        """A ``networkx.MultiDiGraph``; see ``frames.py``.

        Raises:
            MissingExtraError: networkx is not installed.
        """
        return units_to_networkx(self.graph, self.is_kept)

    def to_frame(self, n: int | None = None) -> pd.DataFrame:
        """A DataFrame, one row per unit, most important first.

        Its ``role`` says whether a unit supports the metric or opposes it, by the sign of its score.

        Args:
            n: Only the first ``n`` rows.
        """
        order = self.order[:n]
        frame = self._frame(order)
        frame.insert(0, "rank", range(1, len(order) + 1))
        frame["kept"] = self.is_kept[order].numpy()
        return frame

    def edges_to_frame(self, n: int | None = None) -> pd.DataFrame:
        """A DataFrame of :attr:`edges`, one row each, most important first.

        Args:
            n: Only the first ``n`` rows.
        """
        return edge_frame(self.graph, self.kept_edges[:n])

    def with_labels(self, labels: Labels) -> Circuit:
        """The same circuit, whose nodes say in tables and figures what they mean.

        Args:
            labels: A mapping from dictionary site (its output hook) to feature to text, as
                ``suite.meanings(saes)`` makes, from (site, feature) or from :class:`Node` to text; or a
                function of a node, None where there is none. Earlier texts of the same nodes are
                replaced.
        """
        return replace(self, graph=self.graph.with_labels(labels))

    def plot(self) -> Figure:
        """A plotly figure of what is kept: edges between layers, nodes with their edges, or bars."""
        title = f"Circuit for {self.metadata.get('task')}: {self._count}"
        title += f", {self.n_against} against the metric" if self.n_against else ""
        return unit_figure(self.graph, self.kept_order, title)

    @cached_property
    def n_against(self) -> int:
        """How many of the kept units work against the metric; 0 where scores are sizes."""
        against = self.graph.unit_scores[self.is_kept] < 0
        return int(against.sum()) if self.graph.has_signs else 0

    def _frame(self, units: Int64[torch.Tensor, " some"]) -> pd.DataFrame:
        """Rows of some units, with what their sign means where scores have one."""
        frame = self.graph.to_frame(units)
        if self.graph.has_signs:
            signs = self.graph.unit_scores[units].sign().int().tolist()
            frame["role"] = [ROLES[sign] for sign in signs]
        return frame

    def _signed(self, units: Int64[torch.Tensor, " some"], labels: Sequence[str]) -> list[str]:
        """Labels with the sign of their scores, as ``+L1H3`` and ``-MLP2``."""
        if not self.graph.has_signs:
            return list(labels)
        signs = self.graph.unit_scores[units].sign().int().tolist()
        return [f"{SIGNS[sign]}{label}" for sign, label in zip(signs, labels, strict=True)]

    @property
    def _count(self) -> str:
        return f"{self.size} of {self.n_units} {self.graph.unit}s"

    @property
    def _way(self) -> str:
        """How it was ranked, and how many units work the other way."""
        first = "" if self.rank == "absolute" else f", {self.rank} scores first"
        against = f", {self.n_against} against the metric" if self.n_against else ""
        return f"{self.metadata.get('method')}{first}{against}"

    def _named(self, node: Node) -> str:
        words = self.graph.meanings.get(node)
        return f"{node.label} ({words})" if words else node.label

    def __repr__(self) -> str:
        first = self.kept_order[:6]
        if self.graph.ranks_edges:
            labels = self.graph.labels_of(first).tolist()
        else:
            labels = [self._named(self.graph.components[i]) for i in first.tolist()]
        more = f", and {self.size - 6} more" if self.size > 6 else ""
        return (
            f"Circuit({self.metadata.get('task')}, {self._count} by {self._way}: "
            f"{', '.join(self._signed(first, labels))}{more}{conservation_text(self.metadata)})"
        )

    def _repr_html_(self) -> str:
        frame = self._frame(self.kept_order[:SHOWN])
        return f"<p>{escape(repr(self))}</p>{figures.frame_html(frame, SHOWN)}"


def check_circuit(circuit: object, call: str = "") -> None:
    """Refuses what is not a circuit, with what to type."""
    if not isinstance(circuit, Circuit):
        fix = "circuit = gemmascope_plugin.discover(model, task)"
        raise wrong_type(circuit, call, "circuit", fix)
