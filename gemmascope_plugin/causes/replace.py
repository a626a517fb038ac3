"""What takes the place of an activation: that of the other run, zero, a mean, or another prompt's.

================ ====================================================================================
``other``        the other run's activation at the same prompt and position
``zero``         zero
``mean``         the other run's mean at each position, over the prompts that reach it
``overall_mean`` the other run's mean over all tokens of all prompts, special tokens included
``resample``     the other run's activation of another prompt of the same length, at the same position
================ ====================================================================================

The other run is the clean one when denoising, the corrupted one when noising. Padding enters no mean.
The first four serve patches, edges and circuits alike; prompts are drawn for patches alone.

Cost: one pass over the activations.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int

from gemmascope_plugin.causes.components import COMPONENTS
from gemmascope_plugin.errors import TaskError, check_choice

Replacement = Literal["other", "zero", "overall_mean", "mean"]
REPLACEMENTS = get_args(Replacement)
PatchReplacement = Literal["other", "zero", "mean", "overall_mean", "resample"]


def check_replacement(replacement: str, component: str) -> None:
    """Refuses what does not exist or has no meaning for a component."""
    check_choice("replacement", replacement, get_args(PatchReplacement))
    if replacement == "zero" and component.endswith("_scale"):
        raise TaskError("A norm cannot divide by zero", fix='replacement="mean"')
    if replacement == "zero" and COMPONENTS[component].reads is not None:
        raise TaskError(
            f"{component} is written as a difference, and the norm after it would blow up what "
            "rounding leaves of zero",
            fix='replacement="mean", or component="resid_post"',
        )
    if replacement == "overall_mean" and component == "pattern":
        raise TaskError(
            "The rows of an attention pattern have different lengths, their mean over positions is "
            "not a pattern",
            fix='replacement="mean", which is per position',
        )


@dataclass(eq=False)
class MaskedMean:
    """Mean of an activation over prompts, padding left out, from as many parts of them as come.

    Sums are float64: a mean over many tokens keeps the digits of its type.
    """

    over_positions: bool
    """Whether all positions get the mean over positions as well."""
    axes: tuple[int, int] = (0, 1)
    """Those of prompts and of positions."""
    total: Float[torch.Tensor, ...] | None = None
    count: Float[torch.Tensor, " pos"] = field(default_factory=lambda: torch.zeros(()))
    """Tokens in it, by position."""

    def add(self, x: Float[torch.Tensor, ...], mask: Bool[torch.Tensor, "prompt pos"]) -> None:
        """Adds prompts to the sum; ``mask`` is False at tokens that do not count."""
        weight = mask.to(x.device)
        shape = [1] * x.ndim
        shape[self.axes[0]], shape[self.axes[1]] = mask.shape
        counted = x * weight.reshape(shape).to(x.dtype)
        total = counted.sum(self.axes[0], keepdim=True, dtype=torch.float64)
        self.total = total if self.total is None else self.total + total
        self.count = self.count.to(total) + weight.sum(0)

    def value(self, dtype: torch.dtype) -> Float[torch.Tensor, ...]:
        """The mean, with one prompt and all positions; 0 where nothing was counted."""
        assert self.total is not None, "no prompts were added"
        total, count = self.total, self.count
        if self.over_positions:
            total = total.sum(self.axes[1], keepdim=True).expand_as(total)
            count = count.sum().expand_as(count)
        shape = [1] * total.ndim
        shape[self.axes[1]] = len(count)
        return (total / count.clamp(min=1).reshape(shape)).to(dtype)


def replaced(
    x: Float[torch.Tensor, "prompt ..."],
    mask: Bool[torch.Tensor, "prompt pos"],
    replacement: PatchReplacement,
    *,
    pos_axis: int = 1,
    seed: int = 0,
    rows_per_prompt: int = 1,
) -> Float[torch.Tensor, "prompt ..."]:
    """What is inserted at a hook, in the shape of the other run's activation ``x`` there.

    ``mask`` is False at padding. ``seed`` is that of ``resample``, the same for all hooks, so that they
    take from the same prompt. Rows next to each other may belong to one prompt.
    """
    if replacement == "other":
        return x
    if replacement == "zero":
        return torch.zeros_like(x)
    if replacement == "resample":
        return x[partners(mask.sum(1), seed, rows_per_prompt).to(x.device)]
    mean = MaskedMean(replacement == "overall_mean", (0, pos_axis))
    mean.add(x, mask)
    return mean.value(x.dtype).expand_as(x)


def partners(
    lengths: Int[torch.Tensor, " row"], seed: int, rows_per_prompt: int = 1
) -> Int[torch.Tensor, " row"]:
    """Another prompt of the same length for each prompt: a seeded permutation without fixed points.

    Prompts of one length are put on a circle in random order, and each gets its neighbour. Rows next to
    each other that belong to one prompt go to those of another.
    """
    generator = torch.Generator().manual_seed(seed)
    kinds, kind = (
        lengths.cpu().unflatten(0, (-1, rows_per_prompt)).unique(dim=0, return_inverse=True)
    )
    partner = torch.empty_like(kind)
    for i, sizes in enumerate(kinds.tolist()):
        group = (kind == i).nonzero().flatten()
        if len(group) == 1:
            raise TaskError(
                f"Prompt {int(group[0])} is the only one of {' and '.join(map(str, sizes))} tokens, "
                "there is no other to take activations from",
                fix='more prompts, or replacement="other"',
            )
        circle = group[torch.randperm(len(group), generator=generator)]
        partner[circle] = circle.roll(1)
    return (partner[:, None] * rows_per_prompt + torch.arange(rows_per_prompt)).flatten()
