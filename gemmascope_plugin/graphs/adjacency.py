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

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch

MIN_SUM = 1e-10
"""Smallest sum that a row is divided by."""
BLOCK = 1 << 17
"""Entries that are added up at a time."""


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
        left = np.flatnonzero(keep)
        ends = np.searchsorted(left, matrix.indptr)
        cut = rows_of(matrix.data[left], matrix.indices[left], ends, matrix.shape)
        return Adjacency(cut, self.nodes)

    def subset(self, nodes: np.ndarray) -> Adjacency:
        """The same with only the entries between some nodes.

        Args:
            nodes: True for those, ``[node]``.
        """
        keep = np.zeros(self.n_edges, dtype=bool)
        starts, columns = self.matrix.indptr.tolist(), self.matrix.indices
        for row in np.flatnonzero(nodes[self.nodes]).tolist():
            entries = slice(starts[row], starts[row + 1])
            keep[entries] = nodes[columns[entries]]
        return self.entries(keep)

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


class Store:
    """Rows in their final place: what a row can hold at most is known, and nothing is moved if it does.

    Args:
        room: Entries that each row may have.
        dtype: Of the entries.
        min_share: Entries that are a smaller share of their row's absolute sum are dropped.
    """

    def __init__(self, room: np.ndarray, dtype: Any, min_share: float = 0.0) -> None:
        self._starts = np.concatenate([[0], np.cumsum(room, dtype=np.int64)])
        self._data = np.empty(self._starts[-1], dtype)
        self._columns = np.empty(self._starts[-1], np.int32)
        self._min_share = min_share
        self.counts = np.zeros(len(room), dtype=np.int64)
        """Entries of each row."""

    def put(self, row: int, effects: np.ndarray, columns: np.ndarray) -> None:
        """Fills some rows that follow one another and have the same room.

        Args:
            row: The first.
            effects: ``[row, node]`` of the first nodes.
            columns: The nodes that can reach them, as many as there is room for.
        """
        n, size = effects.shape[0], len(columns)
        start = self._starts[row]
        assert self._starts[row + n] - start == n * size, "rows and columns disagree"
        data = self._data[start : start + n * size].reshape(n, size)
        np.take(effects, columns, axis=1, out=data, mode="clip")
        places = self._columns[start : start + n * size].reshape(n, size)
        places[:] = columns
        self.counts[row : row + n] = size
        if self._min_share == 0 and int(torch.from_numpy(data).count_nonzero()) == data.size:
            return
        mask = data != 0
        if self._min_share > 0:
            sizes = np.abs(data)
            mask &= sizes >= self._min_share * sizes.sum(1, keepdims=True)
        self.counts[row : row + n] = mask.sum(1)
        # of a flat mask, which numpy searches several times faster than one of two axes
        flat = np.flatnonzero(mask.ravel())
        for whole in (self._data, self._columns):
            whole[start : start + len(flat)] = whole[start : start + n * size][flat]
        # only the first of them now begins where its room does
        self._starts[row + 1 : row + n] = start + np.cumsum(self.counts[row : row + n - 1])

    def part(self, nodes: np.ndarray) -> Part:
        """The rows, without gaps.

        Args:
            nodes: The node of each.
        """
        ends = np.cumsum(self.counts)
        total = int(ends[-1]) if len(ends) else 0
        if total < len(self._data):
            self._close(ends)
        return Part(self._data[:total], self._columns[:total], self.counts, nodes)

    def _close(self, ends: np.ndarray) -> None:
        """Moves rows down over gaps, runs of rows without a gap between them at once."""
        starts = self._starts[:-1]
        cuts = np.flatnonzero(starts[1:] != starts[:-1] + self.counts[:-1]) + 1
        for first, last in itertools.pairwise([0, *cuts.tolist(), len(starts)]):
            size = int(self.counts[first:last].sum())
            start, to = int(starts[first]), int(ends[last - 1]) - size
            for whole in (self._data, self._columns):
                whole[to : to + size] = whole[start : start + size]


class Part(NamedTuple):
    """Rows of some targets."""

    data: np.ndarray
    columns: np.ndarray
    counts: np.ndarray
    """Entries of each row."""
    nodes: np.ndarray
    """The node of each row."""

    def copy(self) -> Part:
        """In memory of its own, no larger than it needs."""
        return Part(*(array.copy() for array in self))


def stacked(parts: Sequence[Part], n_nodes: int) -> Adjacency:
    """Parts as one matrix, in the order of their nodes; a single one that is in order is not copied."""
    parts = sorted((part for part in parts if len(part.nodes)), key=lambda part: int(part.nodes[0]))
    joined = parts[0] if len(parts) == 1 else Part(*map(np.concatenate, zip(*parts, strict=True)))
    data, columns, counts, nodes = joined
    ends = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    matrix = rows_of(data, columns, ends, (len(nodes), n_nodes))
    if (np.diff(nodes) < 0).any():
        by_node = np.argsort(nodes, kind="stable")
        matrix, nodes = matrix[by_node], nodes[by_node]
    return Adjacency(matrix, nodes)
