"""Which nodes can reach a target: those before it in the pass, at its own token or an earlier one.

They are tokens, some of the biases, and of each site below the first features and the first errors, so
that the room of every row is known before any is made.

Cost: a few numbers a site and token.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gemmascope_plugin.tracing.linear.frozen_pass import FrozenPass
from gemmascope_plugin.tracing.linear.node_order import Layout
from gemmascope_plugin.tracing.linear.trace_site import PER_LAYER


@dataclass(frozen=True, eq=False)
class Reach:
    """Columns of rows."""

    record: FrozenPass
    layout: Layout

    def columns(self, after: int, pos: int) -> np.ndarray:
        """The nodes that can reach a target, ascending.

        Args:
            after: Time at which it enters.
            pos: Its token.
        """
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
            pairs = [(layout.own, 0)]
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
        attentions = map(self.record.attention, range(self.layout.n_layers))
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
