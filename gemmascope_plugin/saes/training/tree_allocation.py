"""Which parent gets how many children of a Tree SAE, and which children move (arXiv 2605.07922).

1. Capacity: each step the loss is split equally among all candidate parents that fired in the batch;
   the root always counts as one of them.  A parent that is often there while much is unexplained gains.
2. Quotas: children are given one by one to the candidate with the largest ``C_p / (k_p + 1)``, ``k_p``
   being those it has.  This greedy rule maximises ``min C_p / k_p`` over parents that have children.
3. Only dead children move, from parents above their quota to parents below it, the neediest first by
   the same rule.  Living children stay, so a tree that works is not torn up.
4. At the end dead children go to the root, and the tree is frozen.

Steps at which this happens: the interval doubles up to a longest one (``reallocation_steps``).

Cost: a heap of the candidates; one push and pop a child, 20,000 children in some 20 ms.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int

from gemmascope_plugin.errors import ModelError


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
