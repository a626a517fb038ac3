"""The RMS norm of a Gemma block as a function, with its derivative from both sides.

``y = gain * x / s``, ``s = sqrt(mean(x^2) + eps)``, and with ``x_hat = x / s``

1. forward: ``J v = gain * (v - x_hat * mean(x_hat * v)) / s``;
2. backward: ``J^T u = (gain * u - x_hat * mean(x_hat * gain * u)) / s``.

It runs no hooks, unlike the model's own module. Cost: a few multiplications per entry.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float

from gemmascope_plugin.models.precision import wide


@dataclass(frozen=True, eq=False)
class Norm:
    """An RMS norm with the gain that it really multiplies by."""

    gain: Float[torch.Tensor, " d_model"] | None
    """``1 + w`` in the words of Gemma's checkpoints; None where it is one, or folded away."""
    eps: float

    def scale(self, x: Float[torch.Tensor, "*axes d_model"]) -> Float[torch.Tensor, "*axes 1"]:
        """``s``, at least in float32."""
        return (wide(x).pow(2).mean(-1, keepdim=True) + self.eps).sqrt()

    def __call__(
        self, x: Float[torch.Tensor, "*axes d_model"]
    ) -> Float[torch.Tensor, "*axes d_model"]:
        """``gain * x / s`` in the type of ``x``."""
        return self._gained(wide(x) / self.scale(x)).to(x.dtype)

    def jvp(
        self, x: Float[torch.Tensor, "*axes d_model"], v: Float[torch.Tensor, "*more d_model"]
    ) -> Float[torch.Tensor, "*more d_model"]:
        """How the output at ``x`` moves when the input moves by ``v``; ``v`` may have more axes."""
        s = self.scale(x)
        x_hat, move = wide(x) / s, wide(v)
        return self._gained((move - x_hat * (x_hat * move).mean(-1, keepdim=True)) / s).to(v.dtype)

    def vjp(
        self, x: Float[torch.Tensor, "*axes d_model"], u: Float[torch.Tensor, "*more d_model"]
    ) -> Float[torch.Tensor, "*more d_model"]:
        """The gradient at the input, from the gradient ``u`` at the output."""
        s = self.scale(x)
        x_hat, pull = wide(x) / s, self._gained(wide(u))
        return ((pull - x_hat * (x_hat * pull).mean(-1, keepdim=True)) / s).to(u.dtype)

    def frozen(
        self, x: Float[torch.Tensor, "*axes d_model"], v: Float[torch.Tensor, "*more d_model"]
    ) -> Float[torch.Tensor, "*more d_model"]:
        """``gain * v / s`` with the scale of ``x``: the share of ``v`` in the output."""
        return self._gained(wide(v) / self.scale(x)).to(v.dtype)

    def _gained(self, x: Float[torch.Tensor, "*axes d"]) -> Float[torch.Tensor, "*axes d"]:
        return x if self.gain is None else x * self.gain.to(x.device, x.dtype)
