"""Hooks that give every copy of the prompts its own patch, whatever the number of patches.

1. Patches of one sweep that touch a hook name the same dimensions. Those are moved to the front, copies
   before them, so that all patches are one indexed assignment.
2. Where a patch names no coordinate of a dimension it covers all of it, or a part that is masked.

Cost: one copy of the activation per hook.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float

from gemmascope_plugin.causes.nodes import At, Patch
from gemmascope_plugin.models.record import write

NamedHooks = list[tuple[str, Callable[..., Any]]]


def inserting(chunk: Sequence[Patch], other: Mapping[str, torch.Tensor]) -> NamedHooks:
    """Hooks that give copy ``j`` of the prompts the patch ``chunk[j]``."""
    by_hook: dict[str, list[int]] = {}
    for copy, patch in enumerate(chunk):
        for hook in patch.hooks:
            by_hook.setdefault(hook, []).append(copy)
    return [
        (name, _replace(copies, [chunk[copy].index for copy in copies], other[name]))
        for name, copies in by_hook.items()
    ]


def inserted(
    x: Float[torch.Tensor, "row ..."],
    copies: Sequence[int],
    indices: Sequence[tuple[At, ...]],
    other: Float[torch.Tensor, "prompt ..."],
) -> Float[torch.Tensor, "row ..."]:
    """A copy of ``x`` with patches in some copies of the prompts."""
    out = x.clone()
    named = [dim for dim, at in enumerate(indices[0]) if isinstance(at, int)]
    where = [torch.tensor([index[dim] for index in indices], device=x.device) for dim in named]
    rows = out.unflatten(0, (-1, len(other)))
    rows = rows.movedim([2 + dim for dim in named], list(range(1, 1 + len(named))))
    new = other.to(x.device, x.dtype).movedim([1 + dim for dim in named], list(range(len(named))))
    # [patch, prompt, dimensions that are not named]
    new = new[tuple(where)] if named else new.expand(len(copies), *new.shape)
    place = (torch.tensor(list(copies), device=x.device), *where)
    inside = _inside(indices[0], x)
    rows[place] = new if inside is None else torch.where(inside, new, rows[place])
    return out


def _inside(index: tuple[At, ...], x: torch.Tensor) -> Bool[torch.Tensor, "*dims"] | None:
    """True at what a patch covers of the dimensions that it does not name; None for all of it."""
    if not any(isinstance(at, tuple) for at in index):
        return None
    mask = torch.ones((), dtype=torch.bool, device=x.device)
    for axis, size in enumerate(x.shape[1:]):
        at = index[axis] if axis < len(index) else slice(None)
        if isinstance(at, int):
            continue
        along = torch.zeros(size, dtype=torch.bool, device=x.device)
        along[list(at) if isinstance(at, tuple) else at] = True
        mask = mask[..., None] & along
    return mask


def _replace(
    copies: Sequence[int], indices: Sequence[tuple[At, ...]], other: torch.Tensor
) -> Callable[..., torch.Tensor]:
    return write(lambda x: inserted(x, copies, indices, other))
