"""The matrix of a trace: one row per target, one column per node, most entries zero.

Rows are stored sparsely (compressed, 8 bytes an entry in float32): what comes after a target in the pass,
or at a later token, cannot reach it. Nodes are numbered in the order of the pass, so influence flows from
larger to smaller numbers and one walk over the rows finds it.

1. ``Abar``: absolute values, each row divided by its sum (clamped at 1e-10), bias columns left out.
2. ``influence = sum_k w Abar^k``, ``k >= 1`` (Ameisen et al., "Circuit Tracing", 2025), in one pass over
   the rows from the last to the first: a row's own influence is complete when it is reached.

Cost: one pass over the entries for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from jaxtyping import Float

MIN_SUM = 1e-10
"""Smallest sum that a row is divided by."""


@dataclass(frozen=True, eq=False)
class Adjacency:
    """Direct effects."""

    matrix: Any
    """``scipy.sparse.csr_array [row, node]``."""
    nodes: np.ndarray
    """The node of each row, ascending."""

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
        found = np.full(self.n_nodes, -1)
        found[self.nodes] = np.arange(len(self.nodes))
        return found

    def entries(self, keep: np.ndarray) -> Adjacency:
        """The same with only some entries left.

        Args:
            keep: True for those that stay, one per entry.
        """
        matrix = self.matrix
        ends = np.concatenate([[0], np.cumsum(keep)])[matrix.indptr]
        cut = rows_of(matrix.data[keep], matrix.indices[keep], ends, matrix.shape)
        return Adjacency(cut, self.nodes)

    def subset(self, nodes: np.ndarray) -> Adjacency:
        """The same with only the entries between some nodes.

        Args:
            nodes: True for those, ``[node]``.
        """
        rows = np.repeat(nodes[self.nodes], np.diff(self.matrix.indptr))
        return self.entries(rows & nodes[self.matrix.indices])

    def compacted(self, nodes: np.ndarray) -> Adjacency:
        """Only some nodes, numbered anew.

        Args:
            nodes: True for those, ``[node]``.
        """
        rows = nodes[self.nodes]
        places = np.cumsum(nodes) - 1
        return Adjacency(self.subset(nodes).matrix[rows][:, nodes], places[self.nodes[rows]])

    def restricted(self, columns: np.ndarray) -> Adjacency:
        """The same with only some columns left, the others empty.

        Args:
            columns: True for those that stay, ``[node]``.
        """
        return self.entries(columns[self.matrix.indices])

    @cached_property
    def normalised(self) -> Adjacency:
        """``Abar`` of all columns."""
        matrix = self.matrix
        size = np.abs(matrix.data)
        sums = np.asarray(abs(matrix).sum(1)).ravel()
        scale = 1 / np.maximum(sums, MIN_SUM)
        data = size * np.repeat(scale, np.diff(matrix.indptr)).astype(size.dtype)
        return Adjacency(rows_of(data, matrix.indices, matrix.indptr, matrix.shape), self.nodes)

    def influence(self, weights: np.ndarray) -> np.ndarray:
        """``sum_k w M^k`` of this matrix as it is, ``k >= 1``.

        Args:
            weights: Of the nodes, ``[node]``.
        """
        found = np.zeros(self.n_nodes)
        for start, stop in reversed(self.levels):
            own = self.nodes[start:stop]
            found += (found[own] + weights[own]) @ self.run(start, stop)
        return found

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
        own = slice(matrix.indptr[start], matrix.indptr[stop])
        ends = matrix.indptr[start : stop + 1] - matrix.indptr[start]
        shape = (stop - start, self.n_nodes)
        return rows_of(matrix.data[own], matrix.indices[own], ends, shape)


def rows_of(data: np.ndarray, columns: np.ndarray, ends: np.ndarray, shape: tuple[int, int]) -> Any:
    """Compressed rows with the narrowest numbers that hold them; scipy would widen all to the widest.

    Args:
        data: Entries.
        columns: Their columns.
        ends: Where each row begins, and the last one ends.
        shape: Rows and columns.
    """
    narrow = np.int32 if len(data) < 2**31 else np.int64
    parts = (data, columns.astype(narrow, copy=False), ends.astype(narrow, copy=False))
    return sp.csr_array(parts, shape=shape)


def compressed(effects: Float[torch.Tensor, "node target"], n_nodes: int, min_share: float) -> Any:
    """Rows of some targets.

    Args:
        effects: Of the first nodes on each target.
        n_nodes: Number of all nodes.
        min_share: Entries that are a smaller share of their row's absolute sum are dropped.
    """
    dense = effects.T.contiguous().cpu().numpy()
    mask = dense != 0
    if min_share > 0:
        size = np.abs(dense)
        mask &= size >= min_share * size.sum(1, keepdims=True)
    counts = mask.sum(1)
    # of a flat mask, which numpy searches several times faster than one of two axes
    flat = np.flatnonzero(mask.ravel())
    columns = flat - np.repeat(np.arange(len(dense)) * dense.shape[1], counts)
    ends = np.concatenate([[0], np.cumsum(counts)])
    shape = (len(dense), n_nodes)
    return rows_of(dense.ravel()[flat], columns, ends, shape)


def stacked(parts: Sequence[Any], nodes: Sequence[np.ndarray]) -> Adjacency:
    """Rows of several chunks as one matrix, in the order of their nodes."""
    order = sorted(range(len(parts)), key=lambda i: int(nodes[i][0]))
    joined = np.concatenate([nodes[i] for i in order])
    data = np.concatenate([parts[i].data for i in order])
    columns = np.concatenate([parts[i].indices for i in order])
    counts = np.concatenate([np.diff(parts[i].indptr) for i in order])
    ends = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    shape = (len(joined), parts[0].shape[1])
    matrix = rows_of(data, columns, ends, shape)
    if len(joined) > 1 and (np.diff(joined) < 0).any():
        by_node = np.argsort(joined, kind="stable")
        matrix, joined = matrix[by_node], joined[by_node]
    return Adjacency(matrix, joined)
