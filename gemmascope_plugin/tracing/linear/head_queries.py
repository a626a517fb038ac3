"""Which sources made a head attend from one token to another.

With norm scales and all below the layer frozen, queries and keys are linear in what the nodes below have
written, and the score before its soft-cap is a sum over pairs of nodes, one at the query's token and one
at the key's (Kamath et al., "Tracing Attention Computation Through Feature Interactions", 2025):

    s_ij = (1 / scale) sum_{a,b} <R_i W_Q (w c_a / n_i), R_j W_K (w c_b / n_j)>

with ``c`` what has become of a node's write in the stream before the layer, ``b_Q`` and ``b_K`` among the
nodes, and in Gemma 3 the frozen scales of the query and key norms in ``n``.

1. The parts of all nodes in the query, ``[node, d_head]``, are rows of a sweep with ``d_head`` targets
   at the query's token; those in the key likewise. A pair is the product of two parts.
2. Without pairs, one target a side is enough: the shares of nodes in the key are their effects on the key
   along the whole query, and the other way round.
3. ``contrast`` takes the mean over all keys that the query sees from the key: the difference between
   keys is what the softmax sees. It is linear too, a sweep that starts at all of them.

Cost: ``2 d_head`` targets of a sweep with pairs, 2 without; ``pos * d_head^2`` numbers for a contrast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float

from gemmascope_plugin.models.head_scores import HeadScores, Projection
from gemmascope_plugin.tracing.linear.frozen_pass import FrozenPass
from gemmascope_plugin.tracing.linear.sweep import Entry
from gemmascope_plugin.tracing.linear.trace_site import PER_LAYER
from gemmascope_plugin.tracing.linear.tracer import Tracer


@dataclass(frozen=True, eq=False)
class Side:
    """Queries or keys of a head at some tokens as a linear map of the stream."""

    record: FrozenPass
    layer: int
    positions: tuple[int, ...]
    weight: Float[torch.Tensor, "d_model d_head"]
    """With the gain of the norm before attention."""
    bias: Float[torch.Tensor, " d_head"]
    scale: Float[torch.Tensor, " some"]
    """``1 / s`` of that norm."""
    turn: Float[torch.Tensor, "some d_head d_head"]
    """The rotation, with the gain and frozen scale of Gemma 3's norm of queries or keys."""

    @classmethod
    def of(
        cls,
        record: FrozenPass,
        layer: int,
        given: Projection,
        positions: Sequence[int],
        rotation: Float[torch.Tensor, "some d_head d_head"],
    ) -> Side:
        """The map at what the prompt's pass has there."""
        ln1 = record.anatomy.norm(layer, "ln1")
        assert ln1 is not None, "models without it are refused"
        stream = record.stream(layer)[list(positions)]
        weight, turn = given.weight.to(record.dtype), rotation.to(record.dtype)
        bias = weight.new_zeros(weight.shape[1]) if given.bias is None else given.bias.to(weight)
        if ln1.gain is not None:
            weight = weight * ln1.gain.to(weight)[:, None]
        scale = 1 / ln1.scale(stream)[:, 0]
        if given.norm is not None:
            plain = (stream @ weight) * scale[:, None] + bias
            gain = 1 if given.norm.gain is None else given.norm.gain.to(turn)
            turn = turn * gain / given.norm.scale(plain)[..., None]
        return cls(record, layer, tuple(positions), weight, bias, scale, turn)

    @cached_property
    def vectors(self) -> Float[torch.Tensor, "some d_head"]:
        """The queries or keys themselves, turned."""
        stream = self.record.stream(self.layer)[list(self.positions)]
        plain = (stream @ self.weight) * self.scale[:, None] + self.bias
        return torch.einsum("poi,pi->po", self.turn, plain)

    def entry(
        self,
        wanted: Float[torch.Tensor, "target d_head"],
        shares: Float[torch.Tensor, " some"],
        n_below: int,
    ) -> Entry:
        """Products with some vectors as targets of a sweep.

        Args:
            wanted: The vectors.
            shares: How much each of the tokens counts.
            n_below: Nodes below the layer.
        """
        pulled = torch.einsum("p,to,poi->pti", shares, wanted, self.turn)
        own = (pulled @ self.bias).sum(0)
        vectors = (pulled * self.scale[:, None, None]) @ self.weight.T
        last = max(self.positions)
        at = torch.full((len(wanted),), last)
        if len(self.positions) == 1:
            return Entry(PER_LAYER * self.layer - 1, at, vectors[0], own, n_below)
        spread = vectors.new_zeros(last + 1, *vectors.shape[1:])
        spread[list(self.positions)] = vectors
        return Entry(PER_LAYER * self.layer - 1, at, spread, own, n_below)


@dataclass(frozen=True, eq=False)
class Score:
    """One score of one head, with the keys that it is compared to."""

    tracer: Tracer
    scores: HeadScores
    query: Side
    keys: Side
    """Those that are compared, or the key alone."""
    shares: Float[torch.Tensor, " some"]
    """What each key counts: 1 for the one that is asked for, less the mean of all for a contrast."""
    place: int
    """Of the key that is asked for among the keys."""
    observed: Float[torch.Tensor, " some"]
    """The model's own scores of the keys, after the soft-cap."""
    largest: float
    """The largest of its scores of all keys that the query sees."""

    @property
    def n_below(self) -> int:
        """Nodes that may have a part in it."""
        return self.tracer.layout.n_below(PER_LAYER * self.query.layer - 1)

    @cached_property
    def asked(self) -> Float[torch.Tensor, "1 d_head"]:
        """The query, divided by the scale."""
        return self.query.vectors / self.scores.scale

    @cached_property
    def seen(self) -> Float[torch.Tensor, "1 d_head"]:
        """The key, less the mean of those that it is compared to."""
        return self.shares[None] @ self.keys.vectors

    @cached_property
    def row(self) -> Float[torch.Tensor, " some"]:
        """Scores of all keys before the soft-cap."""
        return self.keys.vectors @ self.asked[0]

    @property
    def total(self) -> float:
        """What is to be explained."""
        return float(self.row @ self.shares)

    @property
    def capped(self) -> float:
        """The score of the key after the soft-cap, as the model has it."""
        return float(self.scores.capped(self.row)[self.place])

    def residual(self, *sums: float) -> float:
        """How far sums of what nodes bring, and scores found here, are from the model's own scores.

        Args:
            sums: Each should be the total.

        Returns:
            The largest gap, as a share of the query's largest score.
        """
        gaps = (self.scores.capped(self.row) - self.observed).abs().tolist()
        gaps += [abs(one - self.total) for one in sums]
        return max(gaps) / max(self.largest, 1e-30)

    def by_query(
        self, wanted: Float[torch.Tensor, "target d_head"]
    ) -> Float[torch.Tensor, "node target"]:
        """Parts of all nodes in the query over the scale, along some vectors."""
        return self._swept(self.query, wanted / self.scores.scale, self.query.scale.new_ones(1))

    def by_key(
        self, wanted: Float[torch.Tensor, "target d_head"]
    ) -> Float[torch.Tensor, "node target"]:
        """Parts of all nodes in the key, along some vectors."""
        return self._swept(self.keys, wanted, self.shares)

    @torch.no_grad()
    def _swept(
        self, side: Side, wanted: torch.Tensor, shares: torch.Tensor
    ) -> Float[torch.Tensor, "node target"]:
        tracer = self.tracer
        n_pos = max(side.positions) + 1
        size = tracer.sweep.fitting(n_pos, self.n_below, tracer.budget)
        parts = [
            tracer.sweep(side.entry(part, shares, self.n_below)).T for part in wanted.split(size)
        ]
        return torch.cat(parts, 1)
