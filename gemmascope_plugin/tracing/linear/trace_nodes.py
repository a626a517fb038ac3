"""The nodes of a trace: their numbers, which of them can reach a target, and what they write.

Whatever can reach a site has a smaller number than its features:

====================== ==========================================================
nodes                  order
====================== ==========================================================
tokens                 by position
biases                 ``constant``, then attention biases by layer, then two per site
features and errors    site by site in the order of the pass: features by token and
                       index, then errors by token
====================== ==========================================================

``constant`` is the part of a target that comes from no other node: its ``b_enc``. Of each site's two
biases one is its ``b_dec``, the other what it passes through at special tokens; both summed over tokens.

1. A target is reached by the nodes before it in the pass, at its own token or an earlier one: tokens,
   some of the biases, and of each site below the first features and the first errors. So the room of
   every row is known before any is made (:class:`Reach`).
2. :class:`DecoderWrites` has, token after token, what a site writes: the rows of its active features, of
   all layers that write here in a cross-layer dictionary. Features of one token and source are neighbours
   among the nodes, so that one product with the gradient at that token puts their effects where they
   belong. Two constants a token beside them: what is missing to the real tensor, and ``b_dec``.

Cost: a few numbers a site and token; of writes ``rows * d_out`` where they fit the budget, else rows are
gathered at every use.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int64

from gemmascope_plugin.tracing.linear.frozen_pass import FrozenPass
from gemmascope_plugin.tracing.linear.trace_site import PER_LAYER, Activity


@dataclass(frozen=True, eq=False)
class Layout:
    """Which numbers the nodes of each kind have."""

    n_pos: int
    n_layers: int
    activities: tuple[Activity, ...]

    @property
    def constant(self) -> int:
        """The part of a target that comes from no other node."""
        return self.n_pos

    def attention_bias(self, layer: int) -> int:
        """The biases of a layer's attention."""
        return self.n_pos + 1 + layer

    def b_dec(self, site: int) -> int:
        """The decoder bias of a site."""
        return self.n_pos + 1 + self.n_layers + 2 * site

    def passed(self, site: int) -> int:
        """What a site passes through at special tokens."""
        return self.b_dec(site) + 1

    @property
    def n_fixed(self) -> int:
        """Tokens and biases."""
        return self.n_pos + 1 + self.n_layers + 2 * len(self.activities)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The first feature of each site, and after the last site the number of all nodes."""
        starts = [self.n_fixed]
        for activity in self.activities:
            starts.append(starts[-1] + activity.n_features + int(activity.keep.sum()))
        return tuple(starts)

    @property
    def n_nodes(self) -> int:
        """All nodes but non-feature targets."""
        return self.starts[-1]

    @cached_property
    def at(self) -> dict[int, int]:
        """The site of each time that has one."""
        return {activity.site.time: i for i, activity in enumerate(self.activities)}

    def sites_of(self, nodes: Int64[np.ndarray, " some"]) -> Int64[np.ndarray, " some"]:
        """The sites that nodes of features and errors belong to."""
        return np.searchsorted(self.starts, nodes, side="right") - 1

    def source_sites(self, site: int) -> list[int]:
        """The sites whose features write at a site: itself, and earlier ones of its dictionary."""
        reader = self.activities[site].site
        return [i for i, source in enumerate(self.activities) if reader.receives(source.site)]

    def output_sites(self, site: int) -> list[int]:
        """The sites where the features of a site write, its own first."""
        source = self.activities[site].site
        return [i for i, reader in enumerate(self.activities) if reader.site.receives(source)]

    def features(self, site: int) -> slice:
        """The features of a site."""
        start = self.starts[site]
        return slice(start, start + self.activities[site].n_features)

    def errors(self, site: int) -> slice:
        """The errors of a site, one per token that is not special."""
        return slice(self.features(site).stop, self.starts[site + 1])

    def n_below(self, after: int) -> int:
        """Nodes that come before a time, the first ones."""
        return self.starts[sum(a.site.time < after for a in self.activities)]

    @cached_property
    def n_features(self) -> int:
        """Active features of all sites."""
        return sum(activity.n_features for activity in self.activities)

    def rest_nodes(self, site: int) -> Int64[torch.Tensor, " pos"]:
        """The node of what a site's features leave at each token: an error, or what it passes through."""
        keep = self.activities[site].keep.cpu()
        errors = keep.long().cumsum(0) - 1 + self.errors(site).start
        return torch.where(keep, errors, self.passed(site))


@dataclass(frozen=True, eq=False)
class Reach:
    """Which columns the rows of targets have."""

    frozen: FrozenPass
    layout: Layout

    def columns(self, after: int, pos: int) -> np.ndarray:
        """The nodes that can reach a target which enters at a time and token, ascending."""
        biases, firsts = self._biases(after)
        parts = [np.arange(pos + 1), biases[firsts <= pos]]
        for site in range(self._n_below(after)):
            features, errors = self.layout.starts[site], self.layout.errors(site).start
            parts.append(np.arange(features, features + self._features[site][pos]))
            parts.append(np.arange(errors, errors + self._errors[site][pos]))
        return np.concatenate(parts).astype(np.int32)

    def room(self, after: int, positions: np.ndarray) -> np.ndarray:
        """How many nodes can reach targets at some tokens, ``[target]``."""
        below = self._n_below(after)
        tokens = np.arange(self.layout.n_pos)
        counts = tokens + 1 + sum(self._features[:below]) + sum(self._errors[:below])
        _, firsts = self._biases(after)
        counts = counts + (firsts <= tokens[:, None]).sum(1)
        return counts[positions]

    def _n_below(self, after: int) -> int:
        return sum(activity.site.time < after for activity in self.layout.activities)

    def _biases(self, after: int) -> tuple[np.ndarray, np.ndarray]:
        """Those that may not be zero, and the first token that each of them stands at."""
        if after not in self._biases_of:
            layout = self.layout
            pairs = [(layout.constant, 0)]
            for layer, biased in enumerate(self._biased):
                if biased and PER_LAYER * layer <= after:
                    pairs.append((layout.attention_bias(layer), 0))
            for site in range(self._n_below(after)):
                first, passed = self._constants[site]
                pairs += [(layout.b_dec(site), first), (layout.passed(site), passed)]
            nodes, firsts = np.array(pairs).T
            self._biases_of[after] = nodes, firsts
        return self._biases_of[after]

    @cached_property
    def _biases_of(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        return {}

    @cached_property
    def _biased(self) -> list[bool]:
        attentions = map(self.frozen.attention, range(self.layout.n_layers))
        return [a.bias_O is not None or a.bias_V is not None for a in attentions]

    @cached_property
    def _constants(self) -> list[tuple[int, int]]:
        """The first tokens at which the two biases of each site are not zero; ``n_pos`` for nowhere."""
        starts = []
        for activity in self.layout.activities:
            b_dec = activity.keep & bool(activity.b_dec.any())
            passed = ~activity.keep & (activity.rest != 0).any(1)
            starts.append((_first(b_dec.cpu().numpy()), _first(passed.cpu().numpy())))
        return starts

    @cached_property
    def _features(self) -> list[np.ndarray]:
        """Features up to each token, of each site."""
        return [a.acts.offsets[1:].cpu().numpy() for a in self.layout.activities]

    @cached_property
    def _errors(self) -> list[np.ndarray]:
        """Errors up to each token, of each site."""
        return [a.keep.cumsum(0).cpu().numpy() for a in self.layout.activities]


def _first(mask: np.ndarray) -> int:
    return int(mask.argmax()) if mask.any() else len(mask)


class DecoderWrites:
    """What one site writes; ``budget`` is bytes that its rows may take."""

    def __init__(self, layout: Layout, site: int, budget: int) -> None:
        self._activity = layout.activities[site]
        sites = layout.source_sites(site)
        self._sources = [layout.activities[i] for i in sites]
        self._starts = [layout.starts[i] for i in sites]
        self._offsets = [source.acts.offsets.tolist() for source in self._sources]
        self._budget = budget
        device = self._activity.rest.device
        self.rest_nodes: Int64[torch.Tensor, " pos"] = layout.rest_nodes(site).to(device)
        """The node of what is missing at each token."""
        self.b_dec = layout.b_dec(site)
        """The node of the decoder bias."""

    @property
    def n_rows(self) -> int:
        """Rows of features."""
        return sum(source.n_features for source in self._sources)

    def prepare(self) -> None:
        """Makes what is made once, before several threads ask for it."""
        _ = self._gathered, self.constants

    def rows(self, pos: int) -> Iterator[tuple[slice, Float[torch.Tensor, "some d_out"]]]:
        """The nodes of one token's features and what they write, a source at a time."""
        for i, first in enumerate(self._starts):
            start, stop = self._offsets[i][pos : pos + 2]
            if start < stop:
                nodes = slice(first + start, first + stop)
                rows = self._gathered
                yield nodes, self._gather(i, pos) if rows is None else rows[i][start:stop]

    @cached_property
    def constants(self) -> Float[torch.Tensor, "pos 2 d_out"]:
        """What is missing at each token, and ``b_dec`` where the dictionary works."""
        activity = self._activity
        b_dec = activity.keep[:, None] * activity.b_dec
        return torch.stack([activity.rest, b_dec.to(activity.rest)], 1)

    @cached_property
    def _gathered(self) -> list[Float[torch.Tensor, "_ d_out"]] | None:
        """Rows by source; None where they do not fit."""
        rest = self._activity.rest
        if self.n_rows * rest.shape[1] * rest.element_size() > self._budget:
            return None
        tokens = range(len(rest))
        return [
            torch.cat([self._gather(i, pos) for pos in tokens]) for i in range(len(self._sources))
        ]

    def _gather(self, i: int, pos: int) -> Float[torch.Tensor, "some d_out"]:
        source = self._sources[i]
        return source.writers(self._activity.site.hooked.decoder_from(source.site.place), pos)
