"""The geometric median of activations, where ``b_dec`` begins in Tree SAE and SoftSAE training.

Weiszfeld's iteration: the mean, weighted by the inverse of each point's distance to the last guess, again
and again until nothing moves.

Cost: one pass over the points per iteration, a few dozen of them.
"""

from __future__ import annotations

import torch
from jaxtyping import Float


@torch.no_grad()
def geometric_median(
    points: Float[torch.Tensor, "points d_in"], *, steps: int = 100, tolerance: float = 1e-5
) -> Float[torch.Tensor, " d_in"]:
    """The point with the least sum of distances to all others.

    Args:
        points: Activations.
        steps: Iterations at most.
        tolerance: Distance below which an iteration is the last.
    """
    guess = points.mean(0)
    for _ in range(steps):
        # A point that has been hit would weigh infinitely much.
        weights = 1 / (points - guess).norm(dim=-1, keepdim=True).clamp(min=1e-9)
        last, guess = guess, (weights * points).sum(0) / weights.sum()
        if (guess - last).norm() < tolerance:
            break
    return guess
