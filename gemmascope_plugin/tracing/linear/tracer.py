"""From a prompt and dictionaries to the rows of a trace: checks, nodes, chunks of targets.

1. One frozen pass; every site is encoded.
2. Targets that enter at one place are sorted by token and taken in chunks that fit the memory budget,
   and that end where one more token would cost those before it more than another chunk does.
3. With a limit on the number of feature rows the most influential ones are taken, as found from the rows
   known so far, some at a time (as circuit-tracer does).

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
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from gemmascope_plugin.errors import EmptySelectionError, ModelError
from gemmascope_plugin.graphs.adjacency import Adjacency
from gemmascope_plugin.models.points import hook_points, reading
from gemmascope_plugin.models.prompts import PromptLike
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.models.tokens import special_ids
from gemmascope_plugin.saes.coder import cross_layer_of
from gemmascope_plugin.saes.cross_layer import CrossLayerDictionary
from gemmascope_plugin.splice.check_saes import as_list
from gemmascope_plugin.splice.hooked_sae import HookedCrossLayer, HookedSAE
from gemmascope_plugin.tracing.linear.frozen_pass import FrozenPass
from gemmascope_plugin.tracing.linear.node_order import Layout
from gemmascope_plugin.tracing.linear.reach import Reach
from gemmascope_plugin.tracing.linear.row_store import Part, Store, stacked
from gemmascope_plugin.tracing.linear.sweep import Entry, Sweep
from gemmascope_plugin.tracing.linear.targets import Seed
from gemmascope_plugin.tracing.linear.trace_site import PER_LAYER, Site, activities, site_of
from gemmascope_plugin.tracing.linear.workers import workers

MAX_TARGETS = 256
"""Targets of a chunk at most: more are no faster, and their tokens lie further apart."""
MIN_CHUNK = 32
"""Targets of a chunk that may end before it is full."""
SMALL = 1 << 20
"""Operations in the time that a small product takes to be called, beside what it computes."""
MIN_TARGETS = 32
"""Targets that a thread needs to be worth its while."""
ROUNDS = 8
"""Times that the most influential features are chosen anew."""


@dataclass(frozen=True, eq=False)
class Tracer:
    """What can be asked of one prompt."""

    record: FrozenPass
    layout: Layout
    sweep: Sweep
    budget: int
    """Bytes that a chunk may take."""
    min_share: float = 0.0
    """Entries that are a smaller share of their row are dropped."""

    @classmethod
    def of(
        cls,
        model: HookedModel,
        prompt: PromptLike,
        dictionaries: Any,
        *,
        exclude: Any,
        budget: int,
        min_share: float = 0.0,
    ) -> Tracer:
        """Runs the model once and encodes the prompt at every site.

        Args:
            model: ``HookedTransformer`` or ``TransformerBridge`` of a Gemma.
            prompt: One text, or token ids.
            dictionaries: A transcoder (or SAE of the MLP's output) for every layer, or a CLT; SAEs of
                the stream and of attention beside them.
            exclude: Special tokens that dictionaries leave alone.
            budget: Bytes for all that is not the result.
            min_share: Entries that are a smaller share of their row are dropped.

        Raises:
            ModelError: A layer without a dictionary, two at one site, or one that cannot be traced.
            EmptySelectionError: No feature is active.
        """
        sites = sites_of(model, dictionaries, exclude)
        hooks = [name for site in sites for name in (site.hooked.hook_in, site.hooked.hook_out)]
        record = FrozenPass.of(model, prompt, _readable(model, hooks), budget // 2)
        found = activities(record, sites, lambda site: special_ids(model, site.hooked.exclude))
        if not any(one.n_features for one in found):
            raise EmptySelectionError(
                f"No feature of {len(found)} dictionaries is active on this prompt",
                fix="a longer prompt, exclude=(), or dictionaries of this model",
            )
        layout = Layout(record.n_pos, record.n_layers, tuple(found))
        sweep = Sweep(record, layout, budget // 4)
        return cls(record, layout, sweep, budget // 4, min_share)

    def rows(
        self,
        seeds: Sequence[Seed],
        features: Sequence[int],
        weights: np.ndarray,
        max_features: int | None,
        progress: bool,
    ) -> Adjacency:
        """The matrix: rows of targets and of features.

        Args:
            seeds: Targets that are no features; their nodes come last, in this order.
            features: Nodes of features that are targets.
            weights: Importance of every target, ``[node]``, as influence starts from.
            max_features: Most rows of features; None for all.
            progress: Show a progress bar.
        """
        self.sweep.prepare()
        n_nodes = self.layout.n_nodes + len(seeds)
        total = self.layout.n_features if max_features is None else max_features
        with tqdm(total=total + len(seeds), disable=not progress, desc="rows") as bar:
            known = _Rows(self, n_nodes, bar)
            if max_features is None or max_features >= self.layout.n_features:
                every = [self._feature_nodes(site) for site in self._targets()]
                known.add(np.concatenate([np.zeros(0, dtype=np.int64), *every]), seeds)
                return known.adjacency()
            known.add(np.array(sorted(features), dtype=np.int64), seeds)
            step = -(-max_features // ROUNDS)
            while (left := max_features - known.n_features) > 0:
                chosen = self._next(known.adjacency(), weights, min(step, left))
                if not len(chosen):
                    break
                known.add(chosen)
            return known.adjacency()

    @cached_property
    def reach(self) -> Reach:
        """Which nodes can reach a target."""
        return Reach(self.record, self.layout)

    def sites_of(self, nodes: np.ndarray) -> np.ndarray:
        """The sites that nodes of features and errors belong to."""
        return np.searchsorted(self.layout.starts, nodes, side="right") - 1

    def entry(self, site: int, nodes: np.ndarray) -> Entry:
        """Some features of one site as targets.

        Args:
            site: Which.
            nodes: Ascending, so that tokens are.
        """
        own = self.layout.activities[site]
        start = self.layout.starts[site]
        entries = torch.from_numpy(nodes).to(own.acts.indices.device) - start
        vectors, constant = own.readers(entries)
        positions = own.acts.rows[entries]
        return Entry(own.site.time, positions, vectors, constant, start)

    def seed_entry(self, after: int, seeds: Sequence[Seed]) -> Entry:
        """Targets that are no features.

        Args:
            after: When they enter.
            seeds: By token, ascending.
        """
        embed = self.record.embed
        return Entry(
            after,
            torch.tensor([seed.position for seed in seeds], device=embed.device),
            torch.stack([seed.vector for seed in seeds]).to(embed),
            torch.tensor([seed.own for seed in seeds]).to(embed),
            self.layout.n_below(after),
        )

    def _targets(self) -> list[int]:
        return [
            i for i, a in enumerate(self.layout.activities) if a.site.is_target and a.n_features
        ]

    def _feature_nodes(self, site: int) -> np.ndarray:
        own = self.layout.features(site)
        return np.arange(own.start, own.stop)

    def n_workers(self, entry: Entry) -> int:
        """Threads that take chunks of an entry side by side, each with enough targets."""
        if entry.positions.device.type != "cpu":
            return 1
        n_pos = int(entry.positions.max()) + 1
        each = self.sweep.bytes_per_target(n_pos, entry.n_below)
        fitting = self.budget // (each * MIN_TARGETS)
        wanted = len(entry.positions) // MIN_TARGETS
        return max(1, min(torch.get_num_threads(), fitting, wanted))

    def chunks(self, entry: Entry, n_workers: int) -> Iterator[Entry]:
        """An entry in parts that fit the budget, one for each of so many threads.

        Raises:
            GemmaScopeError: Not even one target fits.
        """
        n_pos = int(entry.positions.max()) + 1
        fitting = self.sweep.fitting(n_pos, entry.n_below, self.budget // n_workers)
        ends = self._ends(entry, min(MAX_TARGETS, fitting))
        for first, last in pairwise([0, *ends]):
            index = slice(first, last)
            yield Entry(
                entry.after,
                entry.positions[index],
                entry.vectors[index],
                entry.own[index],
                entry.n_below,
            )

    def _ends(self, entry: Entry, most: int) -> list[int]:
        """Where chunks end: a further token costs all targets before it one more token at every layer,
        another chunk costs as many small products as it has tokens.
        """
        tokens, counts = entry.positions.unique_consecutive(return_counts=True)
        small = SMALL if entry.positions.device.type == "cpu" else float("inf")
        ends, start, stop = [], 0, 0
        for pos, count in zip(tokens.tolist(), counts.tolist(), strict=True):
            held = stop - start
            wasteful = held >= MIN_CHUNK and held * self.sweep.work > (pos + 1) * small
            if held and (wasteful or held + count > most):
                ends.append(stop)
                start = stop
            while start + most < stop + count:
                start += most
                ends.append(start)
            stop += count
        return [*ends, stop]

    def _next(self, known: Adjacency, weights: np.ndarray, count: int) -> np.ndarray:
        """The most influential features without a row."""
        influence = known.restricted(self.counted(known.n_nodes)).normalised.influence(weights)
        influence = influence + weights
        wanted = np.zeros(known.n_nodes, dtype=bool)
        for site in self._targets():
            wanted[self._feature_nodes(site)] = True
        wanted[known.nodes] = False
        wanted &= influence > 0
        candidates = wanted.nonzero()[0]
        best = candidates[np.argsort(-influence[candidates], kind="stable")[:count]]
        return np.sort(best)

    def counted(self, n_nodes: int) -> np.ndarray:
        """True for nodes that influence is shared among: all but biases."""
        found = np.ones(n_nodes, dtype=bool)
        found[self.layout.n_pos : self.layout.n_fixed] = False
        return found


_Job = tuple[np.ndarray, int, np.ndarray, Callable[[], Entry]]
"""Rows that enter at one place: which, when, at which tokens, and how they read."""


class _Rows:
    """Rows as they come."""

    def __init__(self, tracer: Tracer, n_nodes: int, bar: Any) -> None:
        self._tracer, self._n_nodes, self._bar = tracer, n_nodes, bar
        self._parts: list[Part] = []
        self.n_features = 0

    def add(self, features: np.ndarray, seeds: Sequence[Seed] = ()) -> None:
        """Rows of features, which must be ascending, and of targets that are no features."""
        tracer, reach = self._tracer, self._tracer.reach
        self.n_features += len(features)
        nodes = np.concatenate([features, tracer.layout.n_nodes + np.arange(len(seeds))])
        jobs = [*self._of_features(features), *self._of_seeds(len(features), seeds)]
        room = np.zeros(len(nodes), dtype=np.int64)
        for rows, after, positions, _ in jobs:
            room[rows] = reach.room(after, positions)
        whole = self._store(room) if tracer.min_share == 0 else None
        for rows, _, _, make in jobs:
            self._sweep(make(), rows, whole, room, nodes)
        if whole is not None:
            self._parts.append(whole.part(nodes))

    def adjacency(self) -> Adjacency:
        """What is known."""
        return stacked(self._parts, self._n_nodes)

    def _of_features(self, features: np.ndarray) -> Iterator[_Job]:
        tracer = self._tracer
        sites = tracer.sites_of(features)
        for site in np.unique(sites).tolist():
            rows = np.flatnonzero(sites == site)
            activity, start = tracer.layout.activities[site], tracer.layout.starts[site]
            positions = activity.acts.rows.cpu().numpy()[features[rows] - start]
            make = partial(tracer.entry, site, features[rows])
            yield rows, activity.site.time, positions, make

    def _of_seeds(self, first: int, seeds: Sequence[Seed]) -> Iterator[_Job]:
        for after in sorted({seed.after for seed in seeds}):
            chosen = [i for i, seed in enumerate(seeds) if seed.after == after]
            chosen.sort(key=lambda i: seeds[i].position)
            entering = [seeds[i] for i in chosen]
            positions = np.array([seed.position for seed in entering])
            make = partial(self._tracer.seed_entry, after, entering)
            yield np.array(chosen) + first, after, positions, make

    def _store(self, room: np.ndarray) -> Store:
        dtype = torch.empty(0, dtype=self._tracer.record.dtype).numpy().dtype
        return Store(room, dtype, self._tracer.min_share)

    def _sweep(
        self,
        entry: Entry,
        rows: np.ndarray,
        whole: Store | None,
        room: np.ndarray,
        nodes: np.ndarray,
    ) -> None:
        """One entry, chunk by chunk; where there is no store for all of them each has its own."""
        reach, sweep = self._tracer.reach, self._tracer.sweep

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

        count = self._tracer.n_workers(entry)
        parts = list(self._tracer.chunks(entry, count))
        ends = np.cumsum([len(part.positions) for part in parts])
        places = np.split(rows, ends[:-1])
        with workers(count) as pool:
            for some, part in zip(places, pool.map(fill, parts, places), strict=True):
                self._bar.update(len(some))
                if part is not None:
                    self._parts.append(part)


def sites_of(model: HookedModel, dictionaries: Any, exclude: Any) -> list[Site]:
    """The sites of all dictionaries, in the order of the forward pass.

    Args:
        model: The model.
        dictionaries: One, several, or a mapping whose values they are.
        exclude: Special tokens that they leave alone, unless they were wrapped with their own choice.

    Raises:
        ModelError: A layer without a dictionary, two at one site, or one that cannot be traced.
    """
    sites: list[Site] = []
    for one in as_list(dictionaries):
        hooked = hooked_of(one, exclude)
        for place, site in enumerate(hooked.sites):
            sites.append(site_of(site, place))
    sites.sort(key=lambda site: site.time)
    for one, other in zip(sites, sites[1:], strict=False):
        if one.time == other.time:
            raise ModelError(
                f"Two dictionaries stand at {other.hooked.hook_out}: what it writes would count twice",
                fix="one dictionary per site",
            )
    covered = {site.layer for site in sites if site.time % PER_LAYER == 1}
    missing = [layer for layer in range(int(model.cfg.n_layers)) if layer not in covered]
    if missing:
        raise ModelError(
            f"There is no dictionary of the MLP of {_layers(missing)}, and an MLP is not linear",
            exists=f"dictionaries of the MLP of {_layers(sorted(covered))}" if covered else None,
            fix='[load(spec) for spec in find(model=..., site="transcoder", ...)], one per layer',
        )
    return sites


def hooked_of(one: Any, exclude: Any) -> HookedSAE | HookedCrossLayer:
    """A dictionary with its sites.

    Raises:
        ModelError: A crosscoder.
    """
    if isinstance(one, (HookedSAE, HookedCrossLayer)):
        return one
    layers = cross_layer_of(one)
    if layers is None:
        return HookedSAE(one, exclude=exclude)
    if layers.cfg.kind != "clt":
        raise ModelError(
            f"A {layers.cfg.kind} reads and writes the stream of several layers at once; it has no "
            "place in a trace",
            fix="transcoders, a CLT, or residual SAEs",
        )
    assert isinstance(layers, CrossLayerDictionary)
    return HookedCrossLayer(layers, exclude=exclude)


def _readable(model: HookedModel, names: Sequence[str]) -> list[str]:
    points = hook_points(model)
    return [reading(model, name, points).hook for name in names]


def _layers(layers: Sequence[int]) -> str:
    """``layer 3``, ``layers 0, 1``."""
    return f"{'layer' if len(layers) == 1 else 'layers'} {', '.join(map(str, layers))}"
