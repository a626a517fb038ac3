"""Which sources made a head attend from one token to another.

With norm scales and all below the layer frozen, queries and keys are linear in what the nodes below have
written, and the score before its soft-cap is a sum over pairs of nodes, one at the query's token and one
at the key's (Kamath et al., "Tracing Attention Computation Through Feature Interactions", 2025):

    s_ij = (1 / scale) sum_{a,b} <R_i W_Q (w c_a / n_i), R_j W_K (w c_b / n_j)>

with ``c`` what has become of a node's write in the stream before the layer, ``b_Q`` and ``b_K`` among the
nodes, and in Gemma 3 the frozen scales of the query and key norms in ``n``.

1. The parts of all nodes in the query, ``[node, d_head]``, are rows of a sweep with ``d_head`` targets
   at the query's token; those in the key likewise. A pair is the product of two parts.
2. Without pairs, one target a side is enough: what nodes bring in the key are their effects on the key
   along the whole query, and the other way round.
3. ``contrast`` takes the mean over all keys that the query sees from the key: the difference between
   keys is what the softmax sees. It is linear too, a sweep that starts at all of them.

Cost: ``2 d_head`` targets of a sweep with pairs, 2 without; ``pos * d_head^2`` numbers for a contrast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int64

from gemmascope_plugin.models.anatomy import HeadScores, Projection
from gemmascope_plugin.tracing.linear.frozen_pass import FrozenPass
from gemmascope_plugin.tracing.linear.sweep import Sweep
from gemmascope_plugin.tracing.linear.trace_site import PER_LAYER
from gemmascope_plugin.tracing.linear.transport import Entry

ROWS = 512
"""Nodes of the query whose pairs are ranked at a time."""


@dataclass(frozen=True, eq=False)
class Side:
    """Queries or keys of a head at some tokens as a linear map of the stream."""

    frozen: FrozenPass
    layer: int
    positions: tuple[int, ...]
    weight: Float[torch.Tensor, "d_model d_head"]
    """With the gain of the norm before attention."""
    bias: Float[torch.Tensor, " d_head"]
    scale: Float[torch.Tensor, " some"]
    """``1 / s`` of that norm."""
    rotation: Float[torch.Tensor, "some d_head d_head"]
    """The rotation, with the gain and frozen scale of Gemma 3's norm of queries or keys."""

    @classmethod
    def of(
        cls,
        frozen: FrozenPass,
        layer: int,
        projection: Projection,
        positions: Sequence[int],
        rotation: Float[torch.Tensor, "some d_head d_head"],
    ) -> Side:
        """The map at what the prompt's pass has there."""
        ln1 = frozen.anatomy.norm(layer, "ln1")
        assert ln1 is not None, "models without it are refused"
        stream = frozen.stream(layer)[list(positions)]
        weight, rotation = projection.weight.to(frozen.dtype), rotation.to(frozen.dtype)
        bias, norm = projection.bias, projection.norm
        bias = weight.new_zeros(weight.shape[1]) if bias is None else bias.to(weight)
        if ln1.gain is not None:
            weight = weight * ln1.gain.to(weight)[:, None]
        scale = 1 / ln1.scale(stream)[:, 0]
        if norm is not None:
            plain = (stream @ weight) * scale[:, None] + bias
            gain = 1 if norm.gain is None else norm.gain.to(rotation)
            rotation = rotation * gain / norm.scale(plain)[..., None]
        return cls(frozen, layer, tuple(positions), weight, bias, scale, rotation)

    @cached_property
    def vectors(self) -> Float[torch.Tensor, "some d_head"]:
        """The queries or keys themselves, rotated."""
        stream = self.frozen.stream(self.layer)[list(self.positions)]
        plain = (stream @ self.weight) * self.scale[:, None] + self.bias
        return torch.einsum("poi,pi->po", self.rotation, plain)

    def entry(
        self,
        directions: Float[torch.Tensor, "target d_head"],
        weights: Float[torch.Tensor, " some"],
        n_below: int,
    ) -> Entry:
        """Products with some vectors, summed over the tokens by their weights, as targets of a sweep."""
        pulled = torch.einsum("p,to,poi->pti", weights, directions, self.rotation)
        constant = (pulled @ self.bias).sum(0)
        vectors = (pulled * self.scale[:, None, None]) @ self.weight.T
        last = max(self.positions)
        at = torch.full((len(directions),), last)
        if len(self.positions) == 1:
            return Entry(PER_LAYER * self.layer - 1, at, vectors[0], constant, n_below)
        spread = vectors.new_zeros(last + 1, *vectors.shape[1:])
        spread[list(self.positions)] = vectors
        return Entry(PER_LAYER * self.layer - 1, at, spread, constant, n_below)


@dataclass(frozen=True, eq=False)
class Score:
    """One score of one head, with the keys that it is compared to."""

    sweep: Sweep
    scores: HeadScores
    query_side: Side
    key_side: Side
    """Of the keys that are compared, or of the key alone."""
    key_weights: Float[torch.Tensor, " some"]
    """What each key counts: 1 for the key that is explained, less the mean of all for a contrast."""
    place: int
    """Of the key that is explained among the keys."""
    observed: Float[torch.Tensor, " some"]
    """The model's own scores of the keys, after the soft-cap."""
    largest: float
    """The largest of its scores of all keys that the query sees."""

    @property
    def n_below(self) -> int:
        """Nodes that may have a part in it."""
        return self.sweep.layout.n_below(PER_LAYER * self.query_side.layer - 1)

    @cached_property
    def query(self) -> Float[torch.Tensor, "1 d_head"]:
        """The query, divided by the scale."""
        return self.query_side.vectors / self.scores.scale

    @cached_property
    def key(self) -> Float[torch.Tensor, "1 d_head"]:
        """The key, less the mean of those that it is compared to."""
        return self.key_weights[None] @ self.key_side.vectors

    @cached_property
    def row(self) -> Float[torch.Tensor, " some"]:
        """Scores of all keys before the soft-cap."""
        return self.key_side.vectors @ self.query[0]

    @property
    def total(self) -> float:
        """What is to be explained."""
        return float(self.row @ self.key_weights)

    @property
    def capped(self) -> float:
        """The score of the key after the soft-cap, as the model has it."""
        return float(self.scores.capped(self.row)[self.place])

    def residual(self, *sums: float) -> float:
        """Largest gap of sums, each of which should be the total, and of scores found here to the model's
        own, as a share of the query's largest score.
        """
        gaps = (self.scores.capped(self.row) - self.observed).abs().tolist()
        gaps += [abs(value - self.total) for value in sums]
        return max(gaps) / max(self.largest, 1e-30)

    def by_query(
        self, directions: Float[torch.Tensor, "target d_head"]
    ) -> Float[torch.Tensor, "node target"]:
        """Parts of all nodes in the query over the scale, along some vectors."""
        side = self.query_side
        return self._swept(side, directions / self.scores.scale, side.scale.new_ones(1))

    def by_key(
        self, directions: Float[torch.Tensor, "target d_head"]
    ) -> Float[torch.Tensor, "node target"]:
        """Parts of all nodes in the key, along some vectors."""
        return self._swept(self.key_side, directions, self.key_weights)

    @torch.no_grad()
    def _swept(
        self, side: Side, directions: torch.Tensor, weights: torch.Tensor
    ) -> Float[torch.Tensor, "node target"]:
        sweep, n_below = self.sweep, self.n_below
        size = sweep.fitting(max(side.positions) + 1, n_below, sweep.budget)
        parts = [sweep(side.entry(part, weights, n_below)).T for part in directions.split(size)]
        return torch.cat(parts, 1)


def ranked_pairs(
    first: Float[torch.Tensor, "row width"], second: Float[torch.Tensor, "column width"], top: int
) -> tuple[Int64[np.ndarray, " top"], Int64[np.ndarray, " top"], Float[np.ndarray, " top"]]:
    """Rows, columns and values of the largest absolute products that are not zero, ``top`` at most, by
    size; ``ROWS`` rows of all products are in memory.
    """
    rows, columns = (vectors.any(1).nonzero()[:, 0] for vectors in (first, second))
    parts = []
    for chunk in rows.split(ROWS):
        products = (first[chunk] @ second[columns].T).flatten()
        best = products.abs().topk(min(top, len(products))).indices
        row, column = best // max(len(columns), 1), best % max(len(columns), 1)
        parts.append((chunk[row], columns[column], products[best]))
    if not parts:
        empty = np.zeros(0, dtype=np.int64)
        return empty, empty, np.zeros(0)
    joined = [torch.cat(values) for values in zip(*parts, strict=True)]
    order = joined[2].abs().argsort(descending=True, stable=True)[:top]
    order = order[joined[2][order] != 0]
    row, column, value = (values[order].cpu().numpy() for values in joined)
    return row, column, value.astype(np.float64)
