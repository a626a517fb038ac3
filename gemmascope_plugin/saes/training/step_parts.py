"""What training classes share: unit decoder rows and their folding, the geometric median, paired steps.

1. ``unit_rows``: every step, decoder rows are scaled to norm 1 (arXiv 2408.05147, section 3.2).
2. ``tangent``: before the step, the part of the gradient along a row is removed; moving a row along
   itself is undone by 1., and would only disturb Adam's second moments.
3. ``fold_decoder``: ``W_dec_i / n_i``, and ``W_enc_i, b_enc_i, threshold_i`` times ``n_i``, the row's
   norm; then ``b_enc - b_dec @ W_enc`` where the encoder subtracted ``b_dec`` from its input. The
   reconstruction is unchanged.
4. ``fold_scale``: trained on ``x / C``; ``b_enc, b_dec, threshold`` times ``C`` make it a dictionary of
   ``x`` whose latents are ``C`` times as large.
5. ``geometric_median``, where ``b_dec`` begins in Tree SAE and SoftSAE training, by Weiszfeld's
   iteration: the mean, weighted by the inverse of each point's distance to the last guess, again and
   again until nothing moves.
6. ``paired_step``: transcoders, crosscoders and cross-layer transcoders reconstruct another tensor than
   they read. The squared error is taken against the target; every other loss is the training class'
   own, and sees what was read.

Cost: 1. and 2. pass over ``W_dec`` twice each, little beside the step's products with it; 5. over the
points once per iteration, a few dozen times.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput

from gemmascope_plugin.types import SAE

Params = Mapping[str, Float[torch.Tensor, "*_"]]
"""``W_enc, b_enc, W_dec, b_dec, threshold`` in SAELens' shapes."""

_MEDIAN_STEPS = 100
_MEDIAN_TOLERANCE = 1e-5
"""Distance below which an iteration is the last."""
_SMALL = 1e-8
"""A row of zeros has no direction and stays zero."""


def unit_rows(W_dec: Float[torch.Tensor, "d_sae d_out"]) -> Float[torch.Tensor, "d_sae d_out"]:
    """The rows divided by their norms."""
    return W_dec / W_dec.norm(dim=-1, keepdim=True).clamp(min=_SMALL)


def tangent(
    gradient: Float[torch.Tensor, "d_sae d_out"], W_dec: Float[torch.Tensor, "d_sae d_out"]
) -> Float[torch.Tensor, "d_sae d_out"]:
    """The gradient without its part along each row of ``W_dec``, which has norm 1."""
    along = torch.linalg.vecdot(gradient, W_dec).unsqueeze(-1)
    return torch.addcmul(gradient, along, W_dec, value=-1)


def fold_decoder(params: Params, *, subtracts_b_dec: bool) -> dict[str, torch.Tensor]:
    """The same reconstruction in new tensors, with unit decoder rows and no bias on the input."""
    norm = params["W_dec"].norm(dim=-1).clamp(min=_SMALL)
    W_enc, b_enc = params["W_enc"] * norm, params["b_enc"] * norm
    if subtracts_b_dec:
        b_enc = b_enc - params["b_dec"] @ W_enc
    return {
        "W_enc": W_enc,
        "b_enc": b_enc,
        "threshold": params["threshold"] * norm,
        "W_dec": params["W_dec"] / norm.unsqueeze(-1),
        "b_dec": params["b_dec"],
    }


def fold_scale(params: Params, scale: float) -> dict[str, torch.Tensor]:
    """A dictionary of ``x`` from one of ``x / scale``; ``W_enc`` and ``W_dec`` stay as they are."""
    matrices = ("W_enc", "W_dec")
    return {name: value if name in matrices else value * scale for name, value in params.items()}


@torch.no_grad()
def geometric_median(points: Float[torch.Tensor, "points d_in"]) -> Float[torch.Tensor, " d_in"]:
    """The point with the least sum of distances to all others."""
    guess = points.mean(0)
    for _ in range(_MEDIAN_STEPS):
        # A point that has been hit would weigh infinitely much.
        weights = 1 / (points - guess).norm(dim=-1, keepdim=True).clamp(min=1e-9)
        last, guess = guess, (weights * points).sum(0) / weights.sum()
        if (guess - last).norm() < _MEDIAN_TOLERANCE:
            break
    return guess


def paired_step(
    sae: SAE,
    step_input: TrainStepInput,
    x: Float[torch.Tensor, "batch d_in"],
    target: Float[torch.Tensor, "batch d_out"],
    acts: Float[torch.Tensor, "batch d_sae"],
    pre: Float[torch.Tensor, "batch d_sae"],
    out: Float[torch.Tensor, "batch d_out"],
) -> TrainStepOutput:
    """The losses and their sum; ``sae_in`` of the result is the target."""
    losses = {"mse_loss": sae.mse_loss_fn(out, target).sum(-1).mean()}
    losses |= sae.calculate_aux_loss(
        step_input=replace(step_input, sae_in=x),
        feature_acts=acts,
        hidden_pre=pre,
        sae_out=out,
    )
    loss = torch.stack(list(losses.values())).sum()
    return TrainStepOutput(
        sae_in=target, sae_out=out, feature_acts=acts, hidden_pre=pre, loss=loss, losses=losses
    )
