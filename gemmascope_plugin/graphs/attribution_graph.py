"""An attribution graph: every node of one prompt and the direct effects between them.

======== =============================================== ==================== =========================
kind     what it is                                      ``index``            ``pos``
======== =============================================== ==================== =========================
token    an embedded token                               token id             its own
bias     constants, summed over tokens, see ``layout``   -1                   -1
feature  an active feature of a dictionary               feature              its token
error    what a dictionary misses at a token             -1                   its token
target   a logit, a difference, a direction              token id, or -1      where it is read
======== =============================================== ==================== =========================

1. ``edges`` has one row per explained node and one column per node: the direct effect of the column's
   node on the row's pre-activation, everything frozen that makes the stream linear.
2. A row sums to its node's pre-activation, biases included: ``residual`` is the largest difference.
3. Influence, pruning and scores are in ``influence.py`` and leave biases out, as circuit-tracer does.

Cost: indexing; frames of nodes and edges are made when asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import gemmascope_plugin.figures as figures
from gemmascope_plugin.errors import EmptySelectionError, UnknownNameError, nearest
from gemmascope_plugin.graphs.adjacency import Adjacency
from gemmascope_plugin.graphs.graph_file import load_graph, save_graph
from gemmascope_plugin.graphs.graph_json import to_json
from gemmascope_plugin.graphs.graph_json_reading import read_graph
from gemmascope_plugin.graphs.graph_networkx import to_networkx
from gemmascope_plugin.graphs.influence import (
    Pruned,
    TraceScores,
    cumulative,
    prune_masks,
    scores_of,
)
from gemmascope_plugin.graphs.parts import KINDS, Parts, ends
from gemmascope_plugin.indices import as_index
from gemmascope_plugin.models.gate import gate

if TYPE_CHECKING:
    import pandas as pd

SHOWN = 12
"""Rows of a graph in a notebook."""


@dataclass(frozen=True, eq=False, repr=False)
class AttributionGraph:
    """The graph of one prompt; immutable."""

    nodes: pd.DataFrame
    """One row a node, in the order of the forward pass: ``id, kind, site, layer, pos, index, activation,
    weight, label``; after pruning also ``influence``, the share of all influence that the more
    important nodes have, this one included."""
    edges: Adjacency
    """Rows and columns are places in ``nodes``."""
    tokens: tuple[str, ...]
    """The prompt."""
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.edges.n_nodes == len(self.nodes), "the matrix has another number of nodes"
        assert self.nodes["id"].is_unique, "node ids are not unique"

    @property
    def adjacency(self) -> Any:
        """``[node, node]``, rows are targets: a ``scipy.sparse.csr_array``; ``.toarray()`` is dense."""
        import scipy.sparse as sp

        n, edges = len(self.nodes), self.edges
        counts = np.zeros(n + 1, dtype=np.int64)
        counts[edges.nodes + 1] = np.diff(edges.matrix.indptr)
        parts = (edges.matrix.data, edges.matrix.indices, counts.cumsum())
        return sp.csr_array(parts, shape=(n, n))

    @property
    def n_edges(self) -> int:
        """Direct effects that are not zero."""
        return self.edges.n_edges

    def where(self, kind: str) -> np.ndarray:
        """True at the nodes of a kind, ``[node]``."""
        return (self.nodes["kind"] == kind).to_numpy()

    @cached_property
    def weights(self) -> np.ndarray:
        """Importance that each node has of its own: probabilities of target tokens."""
        return self.nodes["weight"].to_numpy()

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
        return self.edges.restricted(~self.where("bias"))

    @cached_property
    def scores(self) -> TraceScores:
        """Replacement and completeness, as circuit-tracer defines them."""
        return scores_of(self._counted, self.influence, self.weights, self.where)

    @gate()
    def prune(self, node_threshold: float = 0.8, edge_threshold: float = 0.98) -> AttributionGraph:
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
                f"and no error of {len(self.nodes)} nodes",
                fix="node_threshold=0.9, edge_threshold=0.99",
            )
        nodes = self.nodes.assign(influence=masks.shares)[masks.nodes].reset_index(drop=True)
        sizes = {"n_nodes": int((~self.where("bias")).sum()), "n_edges": self._counted.n_edges}
        thresholds = {"node_threshold": node_threshold, "edge_threshold": edge_threshold}
        # pruned twice, it still says where it comes from
        details = {"whole": {**sizes, **self.scores._asdict()}, **self.metadata, **thresholds}
        return replace(
            self, nodes=nodes, edges=masks.edges.compacted(masks.nodes), metadata=details
        )

    @gate()
    def prune_masks(self, node_threshold: float = 0.8, edge_threshold: float = 0.98) -> Pruned:
        """What :meth:`prune` keeps.

        Raises:
            UnknownNameError: A threshold outside (0, 1].
        """
        for name, value in (("node", node_threshold), ("edge", edge_threshold)):
            if not 0 < value <= 1:
                raise UnknownNameError(
                    f"{name}_threshold={value} is no share", exists="shares above 0, up to 1"
                )
        return prune_masks(
            self._counted, self.influence, self.weights, self.where, node_threshold, edge_threshold
        )

    def find(self, node: str | int) -> int:
        """Place of a node.

        Args:
            node: Its id, or its place.

        Raises:
            UnknownNameError: With the nearest id.
        """
        place = as_index(node)
        if place is not None and 0 <= place < len(self.nodes):
            return place
        if not isinstance(node, str) or node not in self._places:
            raise UnknownNameError(
                f"The graph has no node {node!r}",
                exists=f"{len(self.nodes)} nodes",
                nearest=nearest(str(node), self._places),
                fix="graph.nodes.id",
            )
        return self._places[node]

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.nodes["id"])}

    def edge_frame(self, top: int | None = None) -> pd.DataFrame:
        """Edges as rows: ``source, target, weight``, by size.

        Args:
            top: Only so many.
        """
        import pandas as pd

        matrix = self.edges.matrix
        order = np.argsort(-np.abs(matrix.data), kind="stable")[:top]
        rows = np.repeat(self.edges.nodes, np.diff(matrix.indptr))[order]
        ids = self.nodes["id"].to_numpy()
        columns = {"source": ids[matrix.indices[order]], "target": ids[rows]}
        return pd.DataFrame({**columns, "weight": matrix.data[order]})

    def sources_of(self, node: str | int, top: int | None = SHOWN) -> pd.DataFrame:
        """What reaches a node directly, by size: ``id, label, weight``.

        Raises:
            UnknownNameError: No such node, or one that is not explained.
        """
        place = self.find(node)
        row = int(self.edges.row_of[place])
        if row < 0:
            raise UnknownNameError(
                f"Nothing is known of what reaches {self.nodes['id'][place]!r}",
                exists="rows for features and targets",
                fix="max_feature_nodes=None in trace(...)",
            )
        matrix = self.edges.matrix
        own = slice(matrix.indptr[row], matrix.indptr[row + 1])
        columns, values = matrix.indices[own], matrix.data[own]
        order = np.argsort(-np.abs(values), kind="stable")[:top]
        found = self.nodes.iloc[columns[order]][["id", "label", "kind", "layer", "pos"]]
        return found.assign(weight=values[order]).reset_index(drop=True)

    def with_labels(self, labels: Any) -> AttributionGraph:
        """The same with words on features.

        Args:
            labels: A function of (site, feature), or a mapping from (site, feature), that gives a text
                or None.
        """
        ask = labels.get if isinstance(labels, Mapping) else lambda key: labels(*key)
        nodes = self.nodes.copy()
        rows = nodes.index[nodes["kind"] == "feature"]
        for row in rows:
            found = ask((nodes.at[row, "site"], int(nodes.at[row, "index"])))
            if found:
                nodes.at[row, "label"] = str(found)
        return replace(self, nodes=nodes)

    @cached_property
    def shares(self) -> np.ndarray:
        """Cumulative share of influence, small for what is important; that before any pruning."""
        if "influence" in self.nodes:
            return self.nodes["influence"].to_numpy()
        return cumulative(self.influence)

    @property
    def _parts(self) -> Parts:
        return Parts(self.nodes, self.edges, self.tokens, self.metadata)

    @gate()
    def save(self, path: str | Path) -> Path:
        """Writes the graph into one file, exactly; see ``graph_file.py``."""
        return save_graph(path, self._parts)

    @classmethod
    @gate()
    def load(cls, path: str | Path) -> AttributionGraph:
        """Reads what :meth:`save` has written."""
        return cls(*load_graph(path))

    def to_json(self, slug: str, **options: Any) -> dict[str, Any]:
        """What circuit-tracer's viewer and Neuronpedia show; for options see ``graph_json.to_json``."""
        return to_json(self._parts, self.scores, self.shares, slug=slug, **options)

    @classmethod
    @gate()
    def from_json(cls, source: str | Path | Mapping[str, Any]) -> AttributionGraph:
        """Reads such JSON from a file or as it is; circuit-tracer's own too, which has no biases."""
        return cls(*read_graph(source))

    def to_networkx(self) -> Any:
        """A ``DiGraph`` of networkx; see ``graph_networkx.py``."""
        return to_networkx(self._parts)

    def plot(self, max_edges: int = 150) -> Any:
        """A plotly figure: tokens from left to right, layers from the bottom up; prune first.

        Args:
            max_edges: Draw only so many edges, the largest, and the nodes that they touch.
        """
        from gemmascope_plugin.figures.token_graph import token_graph

        return token_graph(self.nodes, self.tokens, *ends(self.edges), max_edges)

    def __len__(self) -> int:
        return len(self.nodes)

    def __repr__(self) -> str:
        counts: dict[str, int] = self.nodes["kind"].value_counts().to_dict()
        parts = ", ".join(_number_of(counts[kind], kind) for kind in KINDS if kind in counts)
        text = "".join(self.tokens)
        shown = text if len(text) <= 60 else f"{text[:57]}..."
        return f"AttributionGraph({shown!r}: {parts}, {_number_of(self.n_edges, 'edge')})"

    def _repr_html_(self) -> str:
        best = np.argsort(-self.influence, kind="stable")[:SHOWN]
        frame = self.nodes.iloc[best][["id", "kind", "label", "layer", "pos", "activation"]]
        frame = frame.assign(influence=self.influence[best])
        table = figures.frame_html(frame.reset_index(drop=True), SHOWN)
        return f"<p>{escape(repr(self))}; the most influential nodes:</p>{table}"


def _number_of(n: int, noun: str) -> str:
    """``1 target``, ``13 biases``."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}{'es' if noun.endswith('s') else 's'}"
