"""What takes the place of an activation: that of the other run, zero, a mean, or another prompt's.

================ ====================================================================================
``other``        the other run's activation at the same prompt and position
``zero``         zero
``mean``         the other run's mean at each position, over the prompts that reach it
``overall_mean`` the other run's mean over all tokens of all prompts, special tokens included
``resample``     the other run's activation of another prompt of the same length, at the same position
================ ====================================================================================

The other run is the clean one when denoising, the corrupted one when noising. Padding enters no mean.

Cost: one pass over the activations.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int

from gemmascope_plugin.causes.components import COMPONENTS
from gemmascope_plugin.errors import TaskError, check_choice

Replacement = Literal["other", "zero", "mean", "overall_mean", "resample"]


def check_replacement(replacement: str, component: str) -> None:
    """Refuses what does not exist or has no meaning for a component.

    Raises:
        UnknownNameError: An unknown replacement.
        TaskError: A norm divided by zero, a stream that rounding keeps from zero, or rows of attention
            of different lengths averaged.
    """
    check_choice("replacement", replacement, get_args(Replacement))
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
            "no pattern",
            fix='replacement="mean", which is per position',
        )


def replaced(
    x: Float[torch.Tensor, "prompt ..."],
    component: str,
    mask: Bool[torch.Tensor, "prompt pos"],
    replacement: Replacement,
    seed: int,
    rows_per_prompt: int = 1,
) -> Float[torch.Tensor, "prompt ..."]:
    """What is inserted at a hook, in the shape of the activation there.

    Args:
        x: That of the other run.
        component: What it is.
        mask: False at padding.
        replacement: What takes its place.
        seed: For ``resample``; the same for all hooks, so that they take from the same prompt.
        rows_per_prompt: Rows next to each other that belong to one prompt.

    Raises:
        TaskError: A prompt has no other of its length to take activations from.
    """
    if replacement == "other":
        return x
    if replacement == "zero":
        return torch.zeros_like(x)
    if replacement == "resample":
        return x[partners(mask.sum(1), seed, rows_per_prompt).to(x.device)]
    # dimensions of prompts and of positions
    axes = (0, 1 + COMPONENTS[component].dims.index("pos"))
    weight = mask.to(x.device, torch.float64)[(...,) + (None,) * (x.ndim - 2)].movedim(1, axes[1])
    over = axes if replacement == "overall_mean" else axes[:1]
    mean = (x * weight).sum(over, keepdim=True) / weight.sum(over, keepdim=True)
    return mean.to(x.dtype).expand_as(x)


def partners(
    lengths: Int[torch.Tensor, " row"], seed: int, rows_per_prompt: int = 1
) -> Int[torch.Tensor, " row"]:
    """Another prompt of the same length for each prompt: a seeded permutation without fixed points.

    Prompts of one length are put on a circle in random order, and each gets its neighbour.

    Args:
        lengths: Tokens of each row.
        seed: Of the order.
        rows_per_prompt: Rows next to each other that belong to one prompt; they go to those of another.

    Raises:
        TaskError: A prompt is the only one of its length.
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
