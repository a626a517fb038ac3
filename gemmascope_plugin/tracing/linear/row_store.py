"""Rows of a trace in their final place, and parts of them as one matrix.

1. What a row can hold at most is known before it is filled: nothing is moved if it does.
2. Rows that hold less leave gaps, which are closed once.

Cost: one pass over the entries.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from gemmascope_plugin.graphs.adjacency import Adjacency, rows_of


class Store:
    """Rows in their final place: ``room`` is what each can hold at most; nothing moves if it does.

    Entries that are a smaller share than ``min_share`` of their row's absolute sum are dropped.
    """

    def __init__(self, room: np.ndarray, dtype: np.dtype, min_share: float = 0.0) -> None:
        self._starts = np.concatenate([[0], np.cumsum(room, dtype=np.int64)])
        self._data = np.empty(self._starts[-1], dtype)
        self._columns = np.empty(self._starts[-1], np.int32)
        self._min_share = min_share
        self.counts = np.zeros(len(room), dtype=np.int64)
        """Entries of each row."""

    def put(self, row: int, effects: np.ndarray, columns: np.ndarray) -> None:
        """Fills some rows that follow one another and have the same room, from effects of the first nodes
        and the nodes that can reach them.
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
        """The rows, without gaps, with the node of each."""
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
