"""Autograd pieces of a splice that keeps the error.

Straight-through (Marks et al., arXiv 2403.19647): the stream passes unchanged, value and gradient, and
the features, which are leaves beside it, collect the gradient that they would have if the stream were
made of them, ``d out / d f_i = W_dec[i]``.

Cost: forward nothing, or one addition where features were changed; backward one product with ``W_dec``,
and no buffer of the size of a parameter.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float


class _Straight(torch.autograd.Function):
    """``base + change`` that is differentiable in ``base`` and, through ``W_dec``, in ``acts``."""

    @staticmethod
    def forward(
        ctx: Any,
        base: torch.Tensor,
        acts: torch.Tensor,
        change: torch.Tensor | None,
        W_dec: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(W_dec)
        ctx.acts = acts.device, acts.dtype
        return base.view_as(base) if change is None else base + change

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        (W_dec,) = ctx.saved_tensors
        device, dtype = ctx.acts
        to_acts = grad.to(W_dec.device, W_dec.dtype) @ W_dec.T if ctx.needs_input_grad[1] else None
        return grad, None if to_acts is None else to_acts.to(device, dtype), None, None


def straight(
    base: Float[torch.Tensor, "batch pos d_out"],
    acts: Float[torch.Tensor, "batch pos d_sae"],
    change: Float[torch.Tensor, "batch pos d_out"] | None,
    W_dec: Float[torch.Tensor, "d_sae d_out"],
) -> Float[torch.Tensor, "batch pos d_out"]:
    """``base``, plus ``change`` if there is one, with gradients to ``base`` and to ``acts``.

    Args:
        base: What flows on, whatever the features.
        acts: Features that collect gradients.
        change: What was changed in the features, already written; its value only.
        W_dec: The decoder, for the gradient.
    """
    out = _Straight.apply(base, acts, change, W_dec)
    assert isinstance(out, torch.Tensor)
    return out


def leaf(x: torch.Tensor) -> torch.Tensor:
    """The same values, cut off, collecting gradients where gradients are recorded."""
    return x.detach().requires_grad_(True) if torch.is_grad_enabled() else x


def without_value(x: torch.Tensor) -> torch.Tensor:
    """Zero that carries the gradient of ``x``."""
    return x - x.detach()
