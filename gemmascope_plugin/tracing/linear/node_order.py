"""Numbers of the nodes of a trace: whatever can reach a site has a smaller number than its features.

====================== ==========================================================
nodes                  order
====================== ==========================================================
tokens                 by position
biases                 ``own``, then attention biases by layer, then two per site
features and errors    site by site in the order of the pass: features by token and
                       index, then errors by token
====================== ==========================================================

``own`` is the part of a target that comes from no other node: its ``b_enc``. Of each site's two biases
one is its ``b_dec``, the other what it passes through at special tokens; both summed over tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Int64

from gemmascope_plugin.tracing.linear.trace_site import Activity


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the nodes of each kind are."""

    n_pos: int
    n_layers: int
    activities: tuple[Activity, ...]

    @property
    def own(self) -> int:
        """The part of a target that is its own."""
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
        found = [self.n_fixed]
        for one in self.activities:
            found.append(found[-1] + one.n_features + int(one.keep.sum()))
        return tuple(found)

    @property
    def n_nodes(self) -> int:
        """All nodes but targets that are no features."""
        return self.starts[-1]

    @cached_property
    def at(self) -> dict[int, int]:
        """The site of each time that has one."""
        return {one.site.time: i for i, one in enumerate(self.activities)}

    def heard(self, site: int) -> list[int]:
        """The sites whose features write at a site: itself, and earlier ones of its dictionary."""
        own = self.activities[site].site
        return [i for i, one in enumerate(self.activities) if own.hears(one.site)]

    def hearing(self, site: int) -> list[int]:
        """The sites where the features of a site write, its own first."""
        own = self.activities[site].site
        return [i for i, one in enumerate(self.activities) if one.site.hears(own)]

    def features(self, site: int) -> slice:
        """The features of a site."""
        start = self.starts[site]
        return slice(start, start + self.activities[site].n_features)

    def errors(self, site: int) -> slice:
        """The errors of a site, one per token that is not special."""
        return slice(self.features(site).stop, self.starts[site + 1])

    def n_below(self, after: int) -> int:
        """Nodes that come before a time, the first ones."""
        return self.starts[sum(one.site.time < after for one in self.activities)]

    @cached_property
    def n_features(self) -> int:
        """Active features of all sites."""
        return sum(one.n_features for one in self.activities)

    def rest_nodes(self, site: int) -> Int64[torch.Tensor, " pos"]:
        """The node of what a site's features leave at each token: an error, or what it passes through."""
        keep = self.activities[site].keep.cpu()
        errors = keep.long().cumsum(0) - 1 + self.errors(site).start
        return torch.where(keep, errors, self.passed(site))
