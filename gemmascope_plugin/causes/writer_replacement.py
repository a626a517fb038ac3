"""What a writer is replaced by: its value in the other run, nothing, or a mean.

1. ``other``: the other run of the same prompt.
2. ``zero``: nothing.
3. ``mean``: the mean over the other run's prompts at the same position; ``overall_mean``: over their
   positions as well.  Padding takes no part.

Means are those of the whole task, also when it is worked off in parts.

Cost: one forward pass over the task for means.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float

from gemmascope_plugin.causes.replayed import Part
from gemmascope_plugin.causes.task import BoundTask
from gemmascope_plugin.causes.writes import Writes
from gemmascope_plugin.errors import check_choice

WriterReplacement = Literal["other", "zero", "overall_mean", "mean"]
WRITER_REPLACEMENTS = get_args(WriterReplacement)


@dataclass(frozen=True)
class Replacements:
    """Replacement values for the writers of a task.

    Args:
        n_layers: Layers of the model.
        replacement: What they are.
        means: Of the whole task, with one row.
    """

    n_layers: int
    replacement: WriterReplacement
    means: Writes | None = None

    def of_part(self, part: Part) -> Writes:
        """The replacements for the prompts of a part that has read the writers of both runs."""
        if self.replacement == "other":
            return Writes.of(part.there, self.n_layers)
        if self.means is None:
            return Writes.of(part.here, self.n_layers).map(torch.zeros_like)
        rows, width = part.bound.clean.shape
        return self._expanded(rows, width)

    def _expanded(self, rows: int, width: int) -> Writes:
        assert self.means is not None
        return Writes(
            self.means.embed[:, :width].expand(rows, -1, -1),
            self.means.z[:, :, :width].expand(-1, rows, -1, -1, -1),
            self.means.mlp[:, :, :width].expand(-1, rows, -1, -1),
        )


def replacements(
    runner: Any,
    bound: BoundTask,
    n_layers: int,
    replacement: WriterReplacement,
    *,
    rows: int,
    tokens: Callable[[BoundTask], torch.Tensor],
) -> Replacements:
    """Replacement values of a kind, means measured.

    Args:
        runner: The model.
        bound: The task.
        n_layers: The model's layers.
        replacement: ``other``, ``zero``, ``overall_mean`` or ``mean``.
        rows: Prompts in one forward pass.
        tokens: The other run's tokens of a part of the task.

    Raises:
        UnknownNameError: An unknown kind.
    """
    check_choice("replacement", replacement, WRITER_REPLACEMENTS)
    if replacement in ("other", "zero"):
        return Replacements(n_layers, replacement)
    sums: Writes | None = None
    counts = bound.mask.sum(0).float()
    for part in bound.parts(rows):
        given = Writes.read(runner, tokens(part), n_layers)
        summed = given.map(_sum_over(part.mask))
        sums = summed if sums is None else _plus(sums, summed)
    assert sums is not None
    if replacement == "overall_mean":
        means = sums.map(lambda x: _over_positions(x) / counts.sum())
    else:
        means = sums.map(lambda x: x / _aligned(counts.clamp(min=1), x))
    return Replacements(n_layers, replacement, means)


def _sum_over(mask: Bool[torch.Tensor, "row pos"]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Sum over rows, padding left out; the row axis stays."""

    def summed(x: torch.Tensor) -> torch.Tensor:
        row = _row_axis(x)
        shape = [1] * x.ndim
        shape[row : row + 2] = mask.shape
        return (x * mask.reshape(shape).to(x.dtype)).sum(row, keepdim=True)

    return summed


def _over_positions(x: torch.Tensor) -> torch.Tensor:
    pos = _row_axis(x) + 1
    return x.sum(pos, keepdim=True).expand_as(x)


def _aligned(counts: Float[torch.Tensor, " pos"], x: torch.Tensor) -> torch.Tensor:
    shape = [1] * x.ndim
    shape[_row_axis(x) + 1] = len(counts)
    return counts.reshape(shape).to(x.dtype)


def _row_axis(x: torch.Tensor) -> int:
    """The embedding has no layer axis in front."""
    return 0 if x.ndim == 3 else 1


def _plus(one: Writes, other: Writes) -> Writes:
    return Writes(one.embed + other.embed, one.z + other.z, one.mlp + other.mlp)
