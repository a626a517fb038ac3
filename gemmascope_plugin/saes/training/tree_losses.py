"""Losses that train a Tree SAE (arXiv 2605.07922; sum consistency after HSAE, arXiv 2602.11881).

1. Prefix loss, equation 7: every cumulative prefix of layers must reconstruct the tokens by itself,
   ``sum_l MSE(x, x_hat_{<=l}) / Var(x)``, ``Var`` over all entries of the batch.
2. AuxK, per layer: the ``k_aux`` largest open pre-activations of the layer's dead features reconstruct
   what the living ones left over; the squared error over the residual's variance, token by token.
   Without dead features it is 0: the bias is not part of it, since the residual is free of it already
   (as in arXiv 2406.04093, appendix A.2).
3. Sum consistency, off by default: a parent equals the sum of its children, as numbers
   ``(a_p - sum_c a_c)^2`` or as contributions ``|| a_p d_p - sum_c a_c d_c ||^2``; mean over tokens and
   over parents that have children.

Cost: a prefix loss one decode a layer; AuxK one decode over ``k_aux`` features; the scalar sum one
gather, the vector one ``tokens * k * (k + d_in)`` numbers for ``k`` active features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int

from gemmascope_plugin.saes.tree_config import ROOT

_TINY = 1e-8
"""Added to variances: a batch or residual that does not vary."""


def prefix_losses(
    x: Float[torch.Tensor, "tokens d_in"], prefixes: Sequence[Float[torch.Tensor, "tokens d_in"]]
) -> list[Float[torch.Tensor, ""]]:
    """``MSE(x, x_hat_{<=l}) / Var(x)`` of each prefix, the whole dictionary last."""
    variance = x.var() + _TINY
    return [(x - out).pow(2).mean() / variance for out in prefixes]


def aux_loss(
    residual: Float[torch.Tensor, "tokens d_in"],
    pre: Float[torch.Tensor, "tokens n"],
    may_fire: Bool[torch.Tensor, "*#tokens n"],
    W_dec: Float[torch.Tensor, "n d_in"],
    k_aux: int,
) -> Float[torch.Tensor, ""]:
    """How badly dead features whose gate is open explain a constant residual; 0 where there are none."""
    if not bool(may_fire.any()):
        return pre.new_zeros(())
    best = pre.masked_fill(~may_fire, 0).topk(min(k_aux, pre.shape[-1]), dim=-1)
    acts = torch.zeros_like(pre).scatter(-1, best.indices, best.values.relu())
    errors = (acts @ W_dec - residual).pow(2).mean(-1)
    return (errors / (residual.var(-1) + _TINY)).mean()


def scalar_sum_loss(
    acts: Float[torch.Tensor, "tokens d_sae"], parent: Int[torch.Tensor, " d_sae"]
) -> Float[torch.Tensor, ""]:
    """``(a_p - sum of children's a)^2``, mean over tokens and parents with children; 0 without any."""
    child = (parent != ROOT).nonzero()[:, 0]
    if not len(child):
        return acts.new_zeros(())
    sums = torch.zeros_like(acts).index_add(1, parent[child], acts[:, child])
    parents = parent[child].unique()
    return (acts - sums)[:, parents].pow(2).mean()


def vector_sum_loss(
    acts: Float[torch.Tensor, "tokens d_sae"],
    parent: Int[torch.Tensor, " d_sae"],
    W_dec: Float[torch.Tensor, "d_sae d_in"],
) -> Float[torch.Tensor, ""]:
    """``|| a_p d_p - sum of children's a_c d_c ||^2``, mean likewise.

    Only families of active parents are summed: below a closed parent no child is active.
    """
    has_children = torch.zeros_like(parent, dtype=torch.bool)
    has_children[parent[parent != ROOT]] = True
    n_active = int((acts > 0).sum(-1).max())
    if not n_active or not bool(has_children.any()):
        return acts.new_zeros(())
    a, index = acts.topk(n_active, dim=-1)
    above = parent[index]
    # entry [t, p, j]: +1 for the parent itself, -1 for its children, among the token's active features
    is_parent = torch.diag_embed(has_children[index].to(a.dtype))
    sign = is_parent - (above[:, None, :] == index[:, :, None]).to(a.dtype)
    families = torch.einsum("tpj,tj,tjd->tpd", sign, a, W_dec[index])
    return families.pow(2).sum((-1, -2)).mean() / has_children.sum()
