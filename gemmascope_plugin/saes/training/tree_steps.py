"""What a step of training a Tree SAE computes: its losses, and which children move to which parent.

Losses (arXiv 2605.07922; sum consistency after HSAE, arXiv 2602.11881):

1. Prefix loss, equation 7: every cumulative prefix of layers must reconstruct the tokens by itself,
   ``sum_l MSE(x, x_hat_{<=l}) / Var(x)``, ``Var`` over all entries of the batch.
2. AuxK, per layer: the ``k_aux`` largest open pre-activations of the layer's dead features reconstruct
   what the living ones left over; the squared error over the residual's variance, token by token.
   Without dead features it is 0: the bias is not part of it, since the residual is free of it already
   (as in arXiv 2406.04093, appendix A.2).
3. Sum consistency, off by default: a parent equals the sum of its children, as numbers
   ``(a_p - sum_c a_c)^2`` or as contributions ``|| a_p d_p - sum_c a_c d_c ||^2``; mean over tokens and
   over parents that have children.

Which parent gets how many children (arXiv 2605.07922):

4. Capacity: each step the loss is split equally among all candidate parents that fired in the batch;
   the root always counts as one of them.  A parent that is often there while much is unexplained gains.
5. Quotas: children are given one by one to the candidate with the largest ``C_p / (k_p + 1)``, ``k_p``
   being those it has.  This greedy rule maximises ``min C_p / k_p`` over parents that have children.
6. Only dead children move, from parents above their quota to parents below it, the neediest first by
   the same rule.  Living children stay, so a tree that works is not torn up. The interval between the
   steps at which this happens doubles up to a longest one (``reallocation_steps``).
7. At the end dead children go to the root, and the tree is frozen.

Cost: a prefix loss one decode a layer; AuxK one decode over ``k_aux`` features; the scalar sum one
gather, the vector one ``tokens * k * (k + d_in)`` numbers for ``k`` active features; moving children a
heap of the candidates, one push and pop a child, 20,000 children in some 20 ms.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int

from gemmascope_plugin.errors import ModelError
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


def reallocation_steps(first: int, longest: int, freeze: int) -> tuple[int, ...]:
    """The steps before which children move, all before ``freeze``: intervals double up to ``longest``."""
    if not 0 < first <= longest:
        raise ModelError(
            f"the first interval between re-allocations is {first} steps, the longest {longest}",
            exists="1 <= first <= longest",
        )
    steps, interval, step = [], first, first
    while step < freeze:
        steps.append(step)
        interval = min(2 * interval, longest)
        step += interval
    return tuple(steps)


def shares(
    loss: Float[torch.Tensor, ""], fired: Bool[torch.Tensor, " n_candidates"]
) -> Float[torch.Tensor, " n_candidates_and_root"]:
    """What one step adds to the capacities: equal parts for all that fired, and the root (last)."""
    counted = torch.nn.functional.pad(fired.to(loss.dtype), (0, 1), value=1.0)
    return loss.detach() * counted / counted.sum()


def grant(
    capacity: Sequence[float],
    n: int,
    *,
    counts: Sequence[int] | None = None,
    limits: Sequence[int] | None = None,
) -> list[int]:
    """Gives ``n`` children one by one to the candidate with the largest ``C_p / (k_p + 1)``.

    Equal ratios go to the first. ``counts`` are the children that each has already, ``limits`` the most
    of each; where all are at their limit, fewer than ``n`` candidates are returned.
    """
    has = [0] * len(capacity) if counts is None else list(counts)
    most = [n] * len(capacity) if limits is None else limits
    heap = [(-c / (has[p] + 1), p) for p, c in enumerate(capacity) if has[p] < most[p]]
    heapq.heapify(heap)
    receivers: list[int] = []
    while heap and len(receivers) < n:
        _, p = heap[0]
        receivers.append(p)
        has[p] += 1
        if has[p] < most[p]:
            heapq.heapreplace(heap, (-capacity[p] / (has[p] + 1), p))
        else:
            heapq.heappop(heap)
    return receivers


def move_dead_children(
    place: Int[torch.Tensor, " n_children"],
    dead: Bool[torch.Tensor, " n_children"],
    capacity: Float[torch.Tensor, " n_candidates"],
) -> Int[torch.Tensor, " n_children"]:
    """Each child's parent, as an index into ``capacity``, after dead ones have left parents above quota.

    A capacity of 0 is that of a candidate that must not gain.
    """
    n, amounts = len(place), capacity.double().tolist()
    quota = [0] * len(amounts)
    for p in grant(amounts, n):
        quota[p] += 1
    counts = torch.bincount(place, minlength=len(amounts)).tolist()
    surplus = [max(0, has - due) for has, due in zip(counts, quota, strict=True)]
    movers: list[int] = []
    for child in dead.nonzero()[:, 0].tolist():
        p = int(place[child])
        if surplus[p]:
            surplus[p] -= 1
            movers.append(child)
    receivers = grant(amounts, len(movers), counts=counts, limits=quota)
    moved = place.clone()
    index = torch.tensor(movers[: len(receivers)], dtype=torch.int64, device=place.device)
    moved[index] = torch.tensor(receivers, dtype=place.dtype, device=place.device)
    return moved
