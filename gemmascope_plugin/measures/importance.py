"""How evenly a token's active features matter for the next token: ``r_L0``.

Gemma Scope, arXiv 2408.05147, appendix C.3:

1. ``L`` is the logit of the correct next token minus the mean logit, ``g = d L / d y`` its gradient with
   respect to the tensor at the output site, at the token itself. Gradients are those of the real model,
   taken at the real tensor: nothing is spliced.
2. ``a_i = f_i * (W_dec[i] . g)`` is each feature's first-order effect, ``p = |a| / sum |a|``.
3. ``r_L0 = exp(S(p)) / L0`` with ``S`` the entropy in nats and ``L0`` the token's number of active
   features; ``1 / L0 <= r_L0 <= 1``, and 1 where all matter alike. The mean over tokens is reported.

A token without active features, or none of which has an effect, has no ``r_L0`` and is left out. Later
tokens' logits also depend on the tensor, so each position needs a backward pass of its own; positions
are sampled evenly, all documents of a batch at once.

Cost: one forward pass and ``n_positions`` backward passes, from the logits to the site, per batch; logits
at the sampled positions only.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Bool, Float

from gemmascope_plugin.features.stream import Corpus
from gemmascope_plugin.models import flatten_heads
from gemmascope_plugin.models.asked import final_residuals
from gemmascope_plugin.models.gradients import frozen
from gemmascope_plugin.models.points import reading
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.models.record import hooking, keep
from gemmascope_plugin.models.unembed import mean_logit, unembedding
from gemmascope_plugin.saes import Coder
from gemmascope_plugin.splice import HookedSAE


def importance(
    model: HookedModel, hooked: HookedSAE, text: Corpus, n_positions: int
) -> tuple[float, int]:
    """Mean ``r_L0``, and the number of tokens it was measured on; NaN for none."""
    total, n = 0.0, 0
    for tokens in text.batches:
        mask = text.readable(tokens)
        positions = _spread(mask.any(0), n_positions)
        if not positions:
            continue
        for values in _batch(model, hooked, tokens, mask, positions):
            total += float(values.double().sum())
            n += len(values)
    return (total / n if n else math.nan), n


def _batch(
    model: HookedModel,
    hooked: HookedSAE,
    tokens: torch.Tensor,
    mask: Bool[torch.Tensor, "batch next"],
    positions: list[int],
) -> list[torch.Tensor]:
    read, seen = reading(model, hooked.hook_in), {}

    def start(y: torch.Tensor, hook: Any) -> torch.Tensor:
        seen["y"] = y.detach().requires_grad_(True)
        return seen["y"]

    hooks = [(read.hook, keep(seen, "x")), (hooked.hook_out, start)]
    with (
        torch.enable_grad(),
        frozen(model.parameters()),
        hooking(model, fwd_hooks=hooks),
        final_residuals(model) as end,
    ):
        model(tokens)
        (normed,) = end.normed
        device = hooked.weights.W_dec.device
        x, values = flatten_heads(read(seen["x"])).to(device), []
        for pos in positions:
            rows = mask[:, pos]
            score = _scores(model, normed[rows, pos], tokens[rows, pos + 1]).sum()
            (grad,) = torch.autograd.grad(score, seen["y"], retain_graph=True)
            values.append(uniformity(hooked.weights, x[rows, pos], flatten_heads(grad)[rows, pos]))
    return values


def _scores(
    model: HookedModel, normed: Float[torch.Tensor, "row d_model"], targets: torch.Tensor
) -> Float[torch.Tensor, " row"]:
    """The correct token's logit minus the mean logit."""
    out = unembedding(model)
    x = out.read(normed, normed=True)
    correct = out.logits_each(x, targets[:, None].to(x.device))[:, 0]
    return correct - mean_logit(out, x)


@torch.no_grad()
def uniformity(
    coder: Coder,
    x: Float[torch.Tensor, "token d_in"],
    grad: Float[torch.Tensor, "token d_out"],
) -> Float[torch.Tensor, " measured"]:
    """``r_L0`` of each token that has one; a factor on all features of a token cancels."""
    acts = coder.encode_sparse(x)
    toward = grad.to(coder.W_dec.device, torch.float32)[acts.rows]
    size = (acts.values.float() * (coder.W_dec[acts.indices].float() * toward).sum(-1)).abs()
    whole = size.new_zeros(acts.n_tokens).index_add(0, acts.rows, size)
    share = size / whole[acts.rows].clamp(min=torch.finfo(size.dtype).tiny)
    entropy = torch.zeros_like(whole).index_add(0, acts.rows, torch.special.entr(share))
    return (entropy.exp() / acts.offsets.diff())[whole > 0]


def _spread(possible: Bool[torch.Tensor, " next"], n: int) -> list[int]:
    """At most ``n`` of the possible positions, evenly spaced from the first to the last."""
    places = possible.nonzero().flatten()
    if len(places) <= n:
        return places.tolist()
    return places[torch.linspace(0, len(places) - 1, n).round().long().to(places.device)].tolist()
