"""Everything that a site writes into the stream, one row per node, token after token.

For each token: the rows of its active features (of all layers that write here, in a cross-layer
dictionary), what is missing to the real tensor, and ``b_dec``.  One product with the cotangent at that
token then gives the effects of all of them.

Cost: ``rows * d_out`` numbers where they fit the budget; else rows are gathered at every use.
"""

from __future__ import annotations

from functools import cached_property

import torch
from jaxtyping import Float, Int64

from gemmascope_plugin.attribution.adjoint.layout import Layout


class Written:
    """What one site writes.

    Args:
        layout: The nodes.
        site: Which site.
        budget: Bytes that its rows may take.
    """

    def __init__(self, layout: Layout, site: int, budget: int) -> None:
        self._own = layout.activities[site]
        self._sources = [layout.activities[i] for i in layout.heard(site)]
        self._budget = budget
        nodes = layout.row_nodes(site)
        self.nodes: Int64[torch.Tensor, " row"] = nodes.to(self._own.rest.device)
        """The node of each row."""
        counts = torch.stack([a.acts.offsets.diff() for a in self._sources]).sum(0) + 2
        self.offsets: list[int] = [0, *counts.cumsum(0).tolist()]
        """Where each token's rows begin."""

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return self.offsets[-1]

    def rows(self, pos: int) -> Float[torch.Tensor, "some d_out"]:
        """The rows of one token."""
        if self._kept is None:
            return self._gathered(pos)
        return self._kept[self.offsets[pos] : self.offsets[pos + 1]]

    @cached_property
    def _kept(self) -> Float[torch.Tensor, "row d_out"] | None:
        rest = self._own.rest
        if self.n_rows * rest.shape[1] * rest.element_size() > self._budget:
            return None
        return torch.cat([self._gathered(pos) for pos in range(len(rest))])

    def _gathered(self, pos: int) -> Float[torch.Tensor, "some d_out"]:
        own = self._own
        parts = [
            one.writers(own.site.hooked.decoder_from(one.site.place), pos) for one in self._sources
        ]
        constant = own.b_dec if bool(own.keep[pos]) else torch.zeros_like(own.b_dec)
        return torch.cat([*parts, own.rest[pos, None], constant[None]])
