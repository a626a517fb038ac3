"""Everything that a site writes into the stream, token after token.

1. For each token the rows of its active features, of all layers that write here in a cross-layer
   dictionary. Features of one token and source are neighbours among the nodes, so that one product with
   the cotangent at that token puts their effects where they belong.
2. Two constants a token: what is missing to the real tensor, and ``b_dec``.

Cost: ``rows * d_out`` numbers where they fit the budget; else rows are gathered at every use.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from jaxtyping import Float, Int64

from gemmascope_plugin.tracing.linear.node_order import Layout


class Written:
    """What one site writes.

    Args:
        layout: The nodes.
        site: Which site.
        budget: Bytes that its rows may take.
    """

    def __init__(self, layout: Layout, site: int, budget: int) -> None:
        self._activity = layout.activities[site]
        heard = layout.heard(site)
        self._sources = [layout.activities[i] for i in heard]
        self._starts = [layout.starts[i] for i in heard]
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
        _ = self._held, self.constants

    def rows(self, pos: int) -> Iterator[tuple[slice, Float[torch.Tensor, "some d_out"]]]:
        """The nodes of one token's features and what they write, a source at a time."""
        for i, first in enumerate(self._starts):
            start, stop = self._offsets[i][pos : pos + 2]
            if start < stop:
                nodes = slice(first + start, first + stop)
                yield (
                    nodes,
                    self._gathered(i, pos) if self._held is None else self._held[i][start:stop],
                )

    @cached_property
    def constants(self) -> Float[torch.Tensor, "pos 2 d_out"]:
        """What is missing at each token, and ``b_dec`` where the dictionary works."""
        activity = self._activity
        b_dec = activity.keep[:, None] * activity.b_dec
        return torch.stack([activity.rest, b_dec.to(activity.rest)], 1)

    @cached_property
    def _held(self) -> list[Float[torch.Tensor, "row d_out"]] | None:
        rest = self._activity.rest
        if self.n_rows * rest.shape[1] * rest.element_size() > self._budget:
            return None
        tokens = range(len(rest))
        return [
            torch.cat([self._gathered(i, pos) for pos in tokens]) for i in range(len(self._sources))
        ]

    def _gathered(self, i: int, pos: int) -> Float[torch.Tensor, "some d_out"]:
        source = self._sources[i]
        return source.writers(self._activity.site.hooked.decoder_from(source.site.place), pos)
