"""Gradients of many targets at the stream: at one token each, or at all tokens up to the last of them.

Targets are sorted by token, so those that reach a token are the last ones: causality is a slice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int64


@dataclass(frozen=True, eq=False)
class Cotangent:
    """A gradient per target."""

    positions: Int64[torch.Tensor, " target"]
    """Of the targets, ascending."""
    values: Float[torch.Tensor, "*pos target width"]
    """``[target, width]``, each at its own token; or ``[pos, target, width]``."""

    @property
    def dense(self) -> bool:
        """Whether it is spread over tokens."""
        return self.values.ndim == 3

    @cached_property
    def n_pos(self) -> int:
        """Tokens that it may reach."""
        return len(self.values) if self.dense else int(self.positions[-1]) + 1

    def at(self) -> Iterator[tuple[int, slice, Float[torch.Tensor, "some width"]]]:
        """Token by token: the targets that may be reached from it, and their gradients there."""
        n = len(self.positions)
        ends = torch.arange(self.n_pos + 1, device=self.positions.device)
        firsts = torch.searchsorted(self.positions, ends).tolist()
        for pos in range(self.n_pos):
            if self.dense:
                yield pos, slice(firsts[pos], n), self.values[pos, firsts[pos] :]
            elif firsts[pos] < firsts[pos + 1]:
                own = slice(firsts[pos], firsts[pos + 1])
                yield pos, own, self.values[own]

    def scaled(self, factor: Float[torch.Tensor, " all_pos"]) -> Float[torch.Tensor, ...]:
        """``factor`` of each token in a shape that multiplies the values."""
        return factor[: self.n_pos, None, None] if self.dense else factor[self.positions, None]

    def sums(
        self, vector: Float[torch.Tensor, " width"], factor: Float[torch.Tensor, " all_pos"]
    ) -> Float[torch.Tensor, " target"]:
        """``sum_pos factor <vector, values>`` of each target."""
        products = (self.values @ vector) * self.scaled(factor)[..., 0]
        return products.sum(0) if self.dense else products

    def with_values(self, values: Float[torch.Tensor, "*pos target width"]) -> Cotangent:
        """The same targets with other gradients."""
        return Cotangent(self.positions, values)
