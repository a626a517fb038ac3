"""Edges of a graph: as compressed rows, one per explained node, or as a list in an order of its own.

Rows (``Adjacency``, 8 bytes an entry in float32) are what a trace gives: what comes after a target in
the pass, or at a later token, cannot reach it. Nodes are numbered in the order of the pass, so influence
flows from larger to smaller numbers and one walk over the rows finds it.

1. ``Abar``: absolute values, each row divided by its sum (clamped at 1e-10), bias columns left out.
2. ``influence = sum_k w Abar^k``, ``k >= 1`` (Ameisen et al., "Circuit Tracing", 2025), in one pass over
   the rows from the last to the first: a row's own influence is complete when it is reached.
3. Two groups of nodes can lead into each other, though their members never do. Then influence goes round,
   less of it each time: the sum is taken until what is left is too small to matter. It ends, as each time
   some of it reaches nodes that nothing explains.

A list (``EdgeList``) is what methods give that score all edges of a model: the order of the edges says
which of two equal scores comes first, and edges may have ports and positions.

Cost: one pass over the entries for each; some tens of passes where influence goes round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import scipy.sparse as sp
import torch

from gemmascope_plugin.errors import GemmaScopeError

MIN_SUM = 1e-10
"""Smallest sum that a row is divided by."""
BLOCK = 1 << 17
"""Entries that are added up at a time."""
MAX_STEPS = 10_000
"""A path that is longer goes round for ever."""
TOLERANCE = 1e-13
"""What is left of the influence, as a share of all."""
Values = np.ndarray | torch.Tensor | Sequence[int] | Sequence[float]


@dataclass(frozen=True, eq=False)
class EdgeList:
    """Edges in an order of their own; arrays with an entry each."""

    source: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """Node that writes, as a place among the nodes."""
    target: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """Node that reads."""
    weight: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.float32))
    port: np.ndarray | None = None
    """Which input the target reads through, as a place in ``PORTS``; None where it has one."""
    pos: np.ndarray | None = None
    """Position of each edge; None where edges stand for all positions."""

    @classmethod
    def of(
        cls,
        source: Values,
        target: Values,
        weight: Values,
        *,
        port: Values | None = None,
        pos: Values | None = None,
    ) -> EdgeList:
        """Edges from arrays, tensors or lists."""
        return cls(
            np.asarray(source, dtype=np.int64),
            np.asarray(target, dtype=np.int64),
            np.asarray(weight, dtype=np.float32),
            None if port is None else np.asarray(port, dtype=np.uint8),
            None if pos is None else np.asarray(pos, dtype=np.int64),
        )

    @property
    def n_edges(self) -> int:
        """How many there are."""
        return len(self.source)


@dataclass(frozen=True, eq=False)
class Adjacency:
    """Direct effects."""

    matrix: Any
    """``scipy.sparse.csr_array [row, node]``."""
    nodes: np.ndarray
    """The node of each row, ascending."""
    is_forward: bool = True
    """Whether every source stands before its target; false where groups lead into each other."""
    port: ClassVar[None] = None
    pos: ClassVar[None] = None

    @classmethod
    def in_any_order(cls, matrix: sp.csr_array, nodes: np.ndarray) -> Adjacency:
        """Rows whose sources may stand behind their targets; looks whether they do."""
        targets = np.repeat(nodes, np.diff(matrix.indptr))
        return cls(matrix, nodes, bool((matrix.indices < targets).all()))

    @property
    def source(self) -> np.ndarray:
        """Where each entry comes from, row by row."""
        return self.matrix.indices

    @cached_property
    def target(self) -> np.ndarray:
        """Where each entry leads to."""
        return np.repeat(self.nodes, np.diff(self.matrix.indptr))

    @property
    def weight(self) -> np.ndarray:
        """The entries."""
        return self.matrix.data

    @property
    def n_nodes(self) -> int:
        """Number of columns."""
        return self.matrix.shape[1]

    @property
    def n_edges(self) -> int:
        """Entries that are not zero."""
        return self.matrix.nnz

    @cached_property
    def row_of(self) -> np.ndarray:
        """The row of each node; -1 where it has none."""
        rows = np.full(self.n_nodes, -1)
        rows[self.nodes] = np.arange(len(self.nodes))
        return rows

    def entries(self, keep: np.ndarray) -> Adjacency:
        """The same with only some entries left, those where ``keep`` is true."""
        matrix = self.matrix
        left = np.flatnonzero(keep)
        ends = np.searchsorted(left, matrix.indptr)
        cut = rows_of(matrix.data[left], matrix.indices[left], ends, matrix.shape)
        return replace(self, matrix=cut)

    def subset(self, nodes: np.ndarray) -> Adjacency:
        """The same with only the entries between some nodes, ``[node]``."""
        keep = np.zeros(self.n_edges, dtype=bool)
        starts, columns = self.matrix.indptr.tolist(), self.matrix.indices
        for row in np.flatnonzero(nodes[self.nodes]).tolist():
            entries = slice(starts[row], starts[row + 1])
            keep[entries] = nodes[columns[entries]]
        return self.entries(keep)

    def compacted(self, nodes: np.ndarray) -> Adjacency:
        """Only some nodes, ``[node]``, numbered anew."""
        rows = nodes[self.nodes]
        places = np.cumsum(nodes) - 1
        matrix = self.subset(nodes).matrix[rows][:, nodes]
        return replace(self, matrix=matrix, nodes=places[self.nodes[rows]])

    def restricted(self, columns: np.ndarray) -> Adjacency:
        """The same with only some columns, ``[node]``, the others empty."""
        return self.entries(columns[self.matrix.indices])

    @property
    def sums(self) -> np.ndarray:
        """The sum of each row, ``[row]``."""
        return self._sums[0]

    @property
    def sizes(self) -> np.ndarray:
        """The sum of each row's absolute values, ``[row]``."""
        return self._sums[1]

    @cached_property
    def _sums(self) -> tuple[np.ndarray, np.ndarray]:
        """In float64, some rows at a time."""
        ends, n_rows = self.matrix.indptr, len(self.nodes)
        sums, sizes = np.zeros(n_rows), np.zeros(n_rows)
        step = max(1, BLOCK * n_rows // max(1, int(ends[-1])))
        for first in range(0, n_rows, step):
            starts = ends[first : first + step + 1]
            # reduceat would give a row without entries the entry that follows
            rows = np.flatnonzero(np.diff(starts))
            if not len(rows):
                continue
            block = self.matrix.data[starts[0] : starts[-1]].astype(np.float64)
            places = (starts - starts[0])[rows]
            sums[first + rows] = np.add.reduceat(block, places)
            sizes[first + rows] = np.add.reduceat(np.abs(block, out=block), places)
        return sums, sizes

    @cached_property
    def normalised(self) -> Adjacency:
        """``Abar`` of all columns."""
        matrix = self.matrix
        scale = (1 / np.maximum(self.sizes, MIN_SUM)).astype(matrix.dtype)
        data = np.abs(matrix.data)
        data *= np.repeat(scale, np.diff(matrix.indptr))
        return replace(self, matrix=rows_of(data, matrix.indices, matrix.indptr, matrix.shape))

    def influence(self, weights: np.ndarray) -> np.ndarray:
        """``sum_k w M^k`` of this matrix as it is, ``k >= 1``."""
        if not self.is_forward:
            return self._influence_round(weights)
        influence = np.zeros(self.n_nodes)
        for start, stop in reversed(self.levels):
            nodes = self.nodes[start:stop]
            influence += (influence[nodes] + weights[nodes]) @ self.run(start, stop)
        return influence

    def _influence_round(self, weights: np.ndarray) -> np.ndarray:
        matrix = self.matrix.astype(np.float64)
        influence, step = np.zeros(self.n_nodes), np.asarray(weights, dtype=np.float64)
        for _ in range(MAX_STEPS):
            step = step[self.nodes] @ matrix
            influence += step
            if np.abs(step).max(initial=0) <= TOLERANCE * np.abs(influence).max(initial=0):
                return influence
        raise GemmaScopeError(
            "Influence goes round in the graph for ever", fix="groups without a cycle between them"
        )

    @cached_property
    def levels(self) -> list[tuple[int, int]]:
        """Runs of rows that do not reach each other: a row's sources all lie before its run."""
        matrix = self.matrix
        last = np.full(len(self.nodes), -1)
        filled = np.diff(matrix.indptr) > 0
        # columns of a row are ascending, so its last entry is its latest source
        last[filled] = matrix.indices[matrix.indptr[1:][filled] - 1]
        runs, start = [], 0
        for row in range(1, len(self.nodes)):
            if last[row] >= self.nodes[start]:
                runs.append((start, row))
                start = row
        return [*runs, (start, len(self.nodes))] if len(self.nodes) else []

    def run(self, start: int, stop: int) -> Any:
        """Some rows that follow one another, without copying them."""
        matrix = self.matrix
        entries = slice(matrix.indptr[start], matrix.indptr[stop])
        ends = matrix.indptr[start : stop + 1] - matrix.indptr[start]
        shape = (stop - start, self.n_nodes)
        return rows_of(matrix.data[entries], matrix.indices[entries], ends, shape)


def rows_of(data: np.ndarray, columns: np.ndarray, ends: np.ndarray, shape: tuple[int, int]) -> Any:
    """Compressed rows with the narrowest numbers that hold them; scipy would widen all to the widest."""
    narrow = np.int32 if len(data) < 2**31 else np.int64
    parts = (data, columns.astype(narrow, copy=False), ends.astype(narrow, copy=False))
    return sp.csr_array(parts, shape=shape)
