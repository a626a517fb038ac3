"""A graph: nodes and weighted edges between them, as arrays.

It serves components of a model, features of dictionaries and traces of prompts (``tokens``); ``node.py``
has the kinds of nodes.

1. Nodes are columns of arrays; ``nodes`` is a DataFrame of them, ``components`` are objects, both made
   when asked for. What is ranked, edges or nodes, are the *units* of a graph: edges where there are any,
   unless ``ranked="node"``. Scores are signed; ``metadata["sign"]`` says how to read them.
2. Edges of components go from a node that writes to a port of a node that reads: queries of a head, keys
   or values of a key-value head.
3. Edges of a trace are rows, one per explained node: the direct effect of each node on its
   pre-activation, everything frozen that makes the stream linear. A row sums to it, biases included:
   ``residual`` is the largest difference. Influence, pruning and scores are in ``pruning.py`` and leave
   biases out, as circuit-tracer does.

Cost: indexing only, no loop over edges; 5 million edges are read in a fraction of a second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int64

from gemmascope_plugin.errors import EmptySelectionError, UnknownNameError
from gemmascope_plugin.graphs.adjacency import Adjacency, EdgeList
from gemmascope_plugin.graphs.components_json import components_to_json
from gemmascope_plugin.graphs.edge_map import EdgeMap, finite_scores
from gemmascope_plugin.graphs.frames import (
    SHOWN,
    edge_frame,
    graph_html,
    graph_text,
    token_figure,
    trace_to_networkx,
    unit_figure,
    unit_frame,
    units_to_networkx,
    weight_frame,
)
from gemmascope_plugin.graphs.graph_arrays import GraphArrays
from gemmascope_plugin.graphs.graph_file import load_graph, save_graph
from gemmascope_plugin.graphs.node import Node, node_columns
from gemmascope_plugin.graphs.pruning import (
    Pruned,
    TraceScores,
    cumulative,
    prune_masks,
    scores_of,
)
from gemmascope_plugin.graphs.read_json import read_graph
from gemmascope_plugin.graphs.write_json import to_json
from gemmascope_plugin.models.gate import gate

if TYPE_CHECKING:
    import networkx as nx
    import pandas as pd
    import scipy.sparse as sp

    from gemmascope_plugin.figures.layered_graph import Figure

SIGN = "positive = supports the metric"


class Graph(GraphArrays):
    """Nodes and weighted edges; immutable.

    Made with :meth:`of_nodes` or :meth:`of_edges`; the graph of a prompt with ``trace``.

    Example:
        >>> suite = gs.tiny()
        >>> task = suite.task("agreement", n=8)
        >>> graph = gs.discover(suite.model, task, method="eap-ig", steps=5).graph
        >>> graph
        Graph(agreement, 30 nodes, 343 edges by eap-ig, positive = supports the metric)
        >>> graph.edge_labels[:2]
        ['embed->L0H0.q', 'embed->L0H1.q']
    """

    @classmethod
    def of_nodes(
        cls,
        nodes: Sequence[Node],
        scores: Sequence[float] | Float[torch.Tensor, " node"] | None,
        metadata: Mapping[str, Any] | None = None,
        *,
        edges: EdgeList | None = None,
    ) -> Graph:
        """A graph of components or features.

        Args:
            nodes: The nodes.
            scores: One each; None where only edges have scores.
            metadata: What to know about them; ``sign`` is filled in.
            edges: Edges between places in ``nodes``, see ``EdgeList.of``.

        Raises:
            ModelError: A score is NaN or infinite.
        """
        columns = node_columns(nodes)
        if scores is not None:
            values = torch.as_tensor(scores, dtype=torch.float32).detach().cpu()
            columns["score"] = finite_scores(values).numpy().copy()
        details = {"sign": SIGN, **(metadata or {})}
        graph = cls(columns, edges or EdgeList(), (), details)
        # need not be made from the columns
        graph.__dict__["components"] = tuple(nodes)
        return graph

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
        edges = edge_map.edge_list(scores)
        return cls.of_nodes(edge_map.nodes, None, metadata, edges=edges)

    # ----------------------------------------------------------------------------------- influence
    @property
    def adjacency(self) -> sp.csr_array:
        """``[node, node]``, rows are targets: a ``scipy.sparse.csr_array``; ``.toarray()`` is dense."""
        import scipy.sparse as sp

        n, matrix = len(self), self.rows.matrix
        counts = np.zeros(n + 1, dtype=np.int64)
        counts[self.rows.nodes + 1] = np.diff(matrix.indptr)
        return sp.csr_array((matrix.data, matrix.indices, counts.cumsum()), shape=(n, n))

    @property
    def weights(self) -> np.ndarray:
        """Importance that each node of a trace has of its own: probabilities of target tokens."""
        _ = self.rows  # refuses a graph without a prompt
        return self.columns["weight"]

    @cached_property
    def targets(self) -> np.ndarray:
        """Places of what is explained."""
        return self.weights.nonzero()[0]

    @cached_property
    def influence(self) -> np.ndarray:
        """Influence of each node on the targets, over all paths, ``[node]``."""
        return self._counted.normalised.influence(self.weights)

    @cached_property
    def _counted(self) -> Adjacency:
        return self.rows.restricted(~self.where("bias"))

    @cached_property
    def scores(self) -> TraceScores:
        """Replacement and completeness, as circuit-tracer defines them."""
        return scores_of(self._counted, self.influence, self.weights, self.where)

    @cached_property
    def shares(self) -> np.ndarray:
        """Cumulative share of influence, small for what is important; that before any pruning."""
        if "influence" in self.columns:
            return self.columns["influence"]
        return cumulative(self.influence)

    @gate()
    def prune(self, node_threshold: float = 0.8, edge_threshold: float = 0.98) -> Graph:
        """The nodes that hold most of the influence, and the edges that do.

        Args:
            node_threshold: Share of all influence that the kept nodes have.
            edge_threshold: Share of the influence among them that the kept edges carry.

        Returns:
            A smaller graph without biases; tokens and targets always stay.

        Raises:
            EmptySelectionError: No feature or error is left.
            UnknownNameError: A threshold outside (0, 1].
        """
        masks = self.prune_masks(node_threshold, edge_threshold)
        if not (masks.nodes & (self.where("feature") | self.where("error"))).any():
            raise EmptySelectionError(
                f"node_threshold={node_threshold} and edge_threshold={edge_threshold} leave no feature "
                f"and no error of {len(self)} nodes",
                fix="node_threshold=0.9, edge_threshold=0.99",
            )
        columns = {**self.columns, "influence": masks.shares}
        columns = {name: column[masks.nodes] for name, column in columns.items()}
        sizes = {"n_nodes": int((~self.where("bias")).sum()), "n_edges": self._counted.n_edges}
        thresholds = {"node_threshold": node_threshold, "edge_threshold": edge_threshold}
        # pruned twice, it still says where it comes from
        details = {"whole": {**sizes, **self.scores._asdict()}, **self.metadata, **thresholds}
        return replace(
            self, columns=columns, edges=masks.edges.compacted(masks.nodes), metadata=details
        )

    @gate()
    def prune_masks(self, node_threshold: float = 0.8, edge_threshold: float = 0.98) -> Pruned:
        """What :meth:`prune` keeps.

        Raises:
            UnknownNameError: A threshold outside (0, 1].
        """
        return prune_masks(
            self._counted, self.influence, self.weights, self.where, node_threshold, edge_threshold
        )

    def sources_of(self, node: str | int, top: int | None = SHOWN) -> pd.DataFrame:
        """What reaches a node of a trace directly, by size: ``id, label, kind, layer, pos, weight``.

        Raises:
            UnknownNameError: No such node, or one that is not explained.
        """
        place, matrix = self.find(node), self.rows.matrix
        row = int(self.rows.row_of[place])
        if row < 0:
            raise UnknownNameError(
                f"Nothing is known of what reaches {self.columns['id'][place]!r}",
                exists="rows for features and targets",
                fix="max_feature_nodes=None in trace(...)",
            )
        entries = slice(matrix.indptr[row], matrix.indptr[row + 1])
        sources, values = matrix.indices[entries], matrix.data[entries]
        order = np.argsort(-np.abs(values), kind="stable")[:top]
        nodes = self.nodes.iloc[sources[order]][["id", "label", "kind", "layer", "pos"]]
        return nodes.assign(weight=values[order]).reset_index(drop=True)

    # -------------------------------------------------------------------------- tables and figures
    def to_frame(self, units: Int64[torch.Tensor, " some"] | None = None) -> pd.DataFrame:
        """A DataFrame, one row per unit.

        Args:
            units: Which of them, in which order; all by default.
        """
        return unit_frame(self, torch.arange(len(self.unit_scores)) if units is None else units)

    def edge_frame(self, top: int | None = None) -> pd.DataFrame:
        """Edges as rows, by size: of a trace ``source, target, weight``, ids of nodes.

        Args:
            top: Only so many.
        """
        order = np.argsort(-np.abs(self.edges.weight), kind="stable")[:top]
        return (
            weight_frame(self, order)
            if self.is_trace
            else edge_frame(self, torch.from_numpy(order))
        )

    def plot(self, max_edges: int = 150) -> Figure:
        """A plotly figure: of a trace, tokens from left to right and layers from the bottom up (prune
        first); else all units, the largest of them if there are many.

        Args:
            max_edges: Draw only so many edges of a trace, the largest, and the nodes that they touch.
        """
        if self.is_trace:
            return token_figure(self, max_edges)
        units = torch.arange(len(self.unit_scores))
        return unit_figure(self, units, f"{len(units)} {self.unit}s of {self.metadata.get('task')}")

    def to_networkx(self) -> nx.Graph:
        """A graph of networkx; see ``frames.py``.

        Raises:
            MissingExtraError: networkx is not installed.
        """
        if self.is_trace:
            return trace_to_networkx(self)
        return units_to_networkx(self, torch.ones_like(self.unit_scores, dtype=torch.bool))

    # --------------------------------------------------------------------------------------- files
    @gate()
    def save(self, path: str | Path) -> Path:
        """Writes the graph into one file, exactly; see ``graph_file.py``.

        Returns:
            The path.

        Raises:
            GemmaScopeError: The file cannot be written, the metadata do not fit into JSON, or the graph
                has numbers that are not finite.
        """
        return save_graph(path, self.parts)

    @classmethod
    @gate()
    def load(cls, path: str | Path) -> Graph:
        """Reads what :meth:`save` has written, or the graph of a saved circuit.

        Raises:
            MissingFileError: There is no such file.
            BadFileError: It is damaged, contradicts itself, or is of another version.
        """
        return cls.of_parts(load_graph(path))

    def to_json(self, slug: str, **options: Any) -> dict[str, Any]:
        """What circuit-tracer's viewer and Neuronpedia show of a trace; for options see
        ``write_json.to_json``. Graphs of components are for other programs, see ``components_json.py``.
        """
        if not self.is_trace:
            return components_to_json(self, slug, **options)
        return to_json(self, self.scores, self.shares, slug=slug, **options)

    @classmethod
    @gate()
    def from_json(cls, source: str | Path | Mapping[str, Any]) -> Graph:
        """Reads such JSON from a file or as it is; circuit-tracer's own too, which has no biases.

        Raises:
            MissingFileError: There is no such file.
            BadFileError: It is damaged, or has kinds of nodes that a trace does not have.
        """
        return cls(*read_graph(source)[0])

    def __repr__(self) -> str:
        return graph_text(self)

    def _repr_html_(self) -> str:
        return graph_html(self, self.influence if self.is_trace else None)
