"""The matrix of a trace: rows of targets and of features, chunk by chunk of the sweep.

1. Targets that enter at one place are sorted by token and taken in chunks, see ``chunks``.
2. Each thread takes whole chunks: a product of one chunk is too small for many threads, which would wait
   for each other at every step; with a chunk per thread they meet once.
3. With a limit on the number of feature rows the most influential ones are taken, as found from the rows
   made so far, some at a time (as circuit-tracer does).
4. What a row can hold at most is known before it is filled, so nothing is moved if it does. Rows that
   hold less leave gaps, which are closed once.

Cost: that of the sweep, which is bound by its products. Of 16 tokens on 18 layers of Gemma 3 270M's
shape with 60 active features a token and layer (15,929 features, 65 million edges, one thread), of
17.2 s of CPU

    gradients to what heads write 55 %, over tokens and through values 21 %, effects of features 12 %,
    rows to their place 4 %, forward pass 2 %, encoding 1 %, row sums 1 %, all else 4 %

so that 88 % are products: 1.9 * 10^12 operations, in 1.3 to 1.7 times what a large product takes for as
many (``tests/benchmarks/trace.py bound``). Narrow models (``d_model`` 64) are bound by what is moved
instead: 8 bytes an edge, written once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from tqdm.auto import tqdm

from gemmascope_plugin.graphs.adjacency import Adjacency, rows_of
from gemmascope_plugin.tracing.linear.sweep import Sweep, chunks, n_workers
from gemmascope_plugin.tracing.linear.targets import Seed
from gemmascope_plugin.tracing.linear.trace_nodes import Reach
from gemmascope_plugin.tracing.linear.transport import Entry

ROUNDS = 8
"""Times that the most influential features are chosen anew."""


def matrix(
    sweep: Sweep,
    seeds: Sequence[Seed],
    features: Sequence[int],
    weights: Float[np.ndarray, " node"],
    *,
    max_features: int | None,
    min_share: float,
    progress: bool,
) -> Adjacency:
    """Rows of targets and of features; ``max_features`` are the most rows of features, None for all.

    Nodes of seeds come last, in their order. ``weights`` are the importance of every target, as influence
    starts from; entries that are a smaller share than ``min_share`` of their row are dropped.
    """
    sweep.prepare()
    n_features = sweep.layout.n_features
    total = n_features if max_features is None else max_features
    with tqdm(total=total + len(seeds), disable=not progress, desc="rows") as bar:
        rows = Rows(sweep, len(weights), min_share, bar)
        if max_features is None or max_features >= n_features:
            rows.add(np.flatnonzero(rows.is_target), seeds)
            return rows.adjacency()
        rows.add(np.array(sorted(features), dtype=np.int64), seeds)
        step = -(-max_features // ROUNDS)
        while (missing := max_features - rows.n_features) > 0:
            best = rows.most_influential(weights, min(step, missing))
            if not len(best):
                break
            rows.add(best)
        return rows.adjacency()


_Job = tuple[np.ndarray, int, np.ndarray, Callable[[], Entry]]
"""Rows that enter at one place: which, when, at which tokens, and how they read."""


class Rows:
    """Rows as they are made; ``bar`` counts them."""

    def __init__(self, sweep: Sweep, n_nodes: int, min_share: float, bar: tqdm) -> None:
        self._sweep, self._layout, self._n_nodes = sweep, sweep.layout, n_nodes
        self._reach = Reach(sweep.frozen, sweep.layout)
        self._min_share, self._bar = min_share, bar
        self._parts: list[Part] = []
        self.n_features = 0

    @property
    def is_target(self) -> Bool[np.ndarray, " node"]:
        """Features that may have a row."""
        is_target = np.zeros(self._n_nodes, dtype=bool)
        for site, activity in enumerate(self._layout.activities):
            is_target[self._layout.features(site)] = activity.site.is_target
        return is_target

    def add(self, features: Int64[np.ndarray, " some"], seeds: Sequence[Seed] = ()) -> None:
        """Rows of features, which must be ascending, and of non-feature targets."""
        self.n_features += len(features)
        nodes = np.concatenate([features, self._layout.n_nodes + np.arange(len(seeds))])
        jobs = [*self._of_features(features), *self._of_seeds(len(features), seeds)]
        room = np.zeros(len(nodes), dtype=np.int64)
        for rows, after, positions, _ in jobs:
            room[rows] = self._reach.room(after, positions)
        store = self._store(room) if self._min_share == 0 else None
        for rows, _, _, make in jobs:
            self._fill(make(), rows, store, room, nodes)
        if store is not None:
            self._parts.append(store.part(nodes))

    def adjacency(self) -> Adjacency:
        """All rows made so far."""
        return stacked(self._parts, self._n_nodes)

    def most_influential(
        self, weights: Float[np.ndarray, " node"], count: int
    ) -> Int64[np.ndarray, " some"]:
        """The features without a row that influence the targets most; biases take no influence."""
        edges = self.adjacency()
        is_counted = np.ones(self._n_nodes, dtype=bool)
        is_counted[self._layout.n_pos : self._layout.n_fixed] = False
        influence = edges.restricted(is_counted).normalised.influence(weights) + weights
        is_candidate = self.is_target & (influence > 0)
        is_candidate[edges.nodes] = False
        candidates = np.flatnonzero(is_candidate)
        best = candidates[np.argsort(-influence[candidates], kind="stable")[:count]]
        return np.sort(best)

    def _of_features(self, features: np.ndarray) -> Iterator[_Job]:
        sites = self._layout.sites_of(features)
        for site in np.unique(sites).tolist():
            rows = np.flatnonzero(sites == site)
            activity, start = self._layout.activities[site], self._layout.starts[site]
            positions = activity.acts.rows.cpu().numpy()[features[rows] - start]
            make = partial(self._sweep.feature_entry, site, features[rows])
            yield rows, activity.site.time, positions, make

    def _of_seeds(self, first: int, seeds: Sequence[Seed]) -> Iterator[_Job]:
        for after in sorted({seed.after for seed in seeds}):
            order = [i for i, seed in enumerate(seeds) if seed.after == after]
            order.sort(key=lambda i: seeds[i].position)
            entering = [seeds[i] for i in order]
            positions = np.array([seed.position for seed in entering])
            make = partial(self._sweep.seed_entry, after, entering)
            yield np.array(order) + first, after, positions, make

    def _store(self, room: np.ndarray) -> Store:
        dtype = torch.empty(0, dtype=self._sweep.frozen.dtype).numpy().dtype
        return Store(room, dtype, self._min_share)

    def _fill(
        self,
        entry: Entry,
        rows: np.ndarray,
        whole: Store | None,
        room: np.ndarray,
        nodes: np.ndarray,
    ) -> None:
        """One entry, chunk by chunk; where there is no store for all of them each has its own."""
        reach, sweep = self._reach, self._sweep

        def fill(part: Entry, places: np.ndarray) -> Part | None:
            effects, positions = sweep(part).cpu().numpy(), part.positions.cpu().numpy()
            store, at = whole, places
            if store is None:
                store, at = self._store(room[places]), np.arange(len(places))
            cuts = np.flatnonzero((np.diff(positions) != 0) | (np.diff(at) != 1)) + 1
            for first, last in pairwise([0, *cuts.tolist(), len(at)]):
                columns = reach.columns(entry.after, int(positions[first]))
                store.put(int(at[first]), effects[first:last], columns)
            return store.part(nodes[places]).copy() if whole is None else None

        count = n_workers(sweep, entry)
        parts = list(chunks(sweep, entry, count))
        ends = np.cumsum([len(part.positions) for part in parts])
        places = np.split(rows, ends[:-1])
        with _workers(count) as pool:
            for done, part in zip(places, pool.map(fill, parts, places), strict=True):
                self._bar.update(len(done))
                if part is not None:
                    self._parts.append(part)


@contextmanager
def _workers(count: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads that share those of PyTorch, whose number is put back at the end."""
    before = torch.get_num_threads()
    each = max(1, before // count)
    with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(each,)) as pool:
        try:
            yield pool
        finally:
            torch.set_num_threads(before)


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
        for first, last in pairwise([0, *cuts.tolist(), len(starts)]):
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
