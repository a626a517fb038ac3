"""Effects of queries and keys through the softmax they feed, instead of through its slope (AtP*'s fixes).

A saturated softmax has no slope, yet another query may move all its weight (Kramar et al.,
arXiv 2403.00745, section 3.1.1).  With scores ``s``, pattern ``p = softmax(s)``, ``G = dm/dp`` and values
as they are:

* **query fix**, query ``i`` replaced: ``<softmax(s'_i) - softmax(s_i), G_i>``;
* **key fix**, key ``j`` alone replaced, which changes a column of the scores by ``D_ij = s'_ij - s_ij``:

      effect(j) = sum_{i >= j} w_ij / (1 + w_ij) (G_ij - sum_k p_ik G_ik),  w_ij = p_ij (e^D_ij - 1),

  a closed form of ``sum_i <softmax(s, column j replaced) - softmax(s), G_i>`` without a loop over keys,
  evaluated in double precision as ``w_ij / (1 + w_ij) = w_ij / ((1 - p_ij) + p_ij e^D_ij)``.

1. Scores of all layers come from one run of the model with every layer's queries and keys put in place:
   scaling, soft-cap, rotary embedding, sliding window and Gemma 3's query and key norms are the model's.
2. Score column ``j`` depends on key ``j`` alone, so all keys are replaced at once.
3. A key-value head's effect is the sum over the query heads that share it.

Where a patch covers several keys, their columns change at once and the query fix's formula holds for them
together.

Cost: three forward passes; ``head * query * key`` numbers per layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float

from gemmascope_plugin.causes.experiment import Experiment
from gemmascope_plugin.causes.gradient.slopes import put
from gemmascope_plugin.causes.nodes import At, read
from gemmascope_plugin.models.anatomy import Anatomy
from gemmascope_plugin.models.hooks import hooking
from gemmascope_plugin.models.precision import wide

Scores = Float[torch.Tensor, "prompt head query key"]
Slopes = Float[torch.Tensor, "copy prompt head query key"]

MAX_CHANGE = 80.0
"""Scores that change by more are taken to change by this much: ``exp`` of it is still finite."""


@dataclass(frozen=True)
class AttentionFix:
    """Scores of one layer before and after its queries or its keys are replaced."""

    old: Scores
    new: Scores
    port: str
    """``q`` or ``k``: what is replaced."""
    group: int
    """Query heads that share a key-value head."""
    keys: At
    """Keys that a patch replaces at once; a single one stands for one key per patch."""

    def effects(self, slopes: Slopes) -> Float[torch.Tensor, "copy prompt pos node_head 1"]:
        """First-order effects by position and head, to be summed over the entries of a patch.

        Args:
            slopes: ``dm/dp``.
        """
        slopes = wide(slopes)
        if self.port == "q":
            found = query_fix(self.old, self.new, slopes)
        else:
            each = isinstance(self.keys, int)
            found = key_fix(self.old, self.new, slopes) if each else self._at_once(slopes)
            found = found.unflatten(2, (-1, self.group)).sum(3)
        return found.transpose(2, 3)[..., None]

    def _at_once(self, slopes: Slopes) -> Float[torch.Tensor, "copy prompt head pos"]:
        """The effect of several keys together, at the first of them."""
        at = torch.arange(self.old.shape[-1], device=self.old.device)[
            list(self.keys) if isinstance(self.keys, tuple) else self.keys
        ]
        new = self.old.clone()
        new[..., at] = self.new[..., at]
        change = query_fix(self.old, new, slopes)
        found = torch.zeros_like(change)
        found[..., at[0]] = change.sum(-1)
        return found


def query_fix(
    old: Scores, new: Scores, slopes: Slopes
) -> Float[torch.Tensor, "copy prompt head query"]:
    """``<softmax(new_i) - softmax(old_i), G_i>`` of every query ``i``.

    Args:
        old: Scores of the base run.
        new: Scores with the other queries.
        slopes: ``dm/dp``.
    """
    change = new.double().softmax(-1) - old.double().softmax(-1)
    return (change * slopes.double()).sum(-1).to(slopes.dtype)


def key_fix(
    old: Scores, new: Scores, slopes: Slopes
) -> Float[torch.Tensor, "copy prompt head key"]:
    """Effect of every key alone, summed over queries.

    Args:
        old: Scores of the base run.
        new: Scores with the other keys; column ``j`` is used for key ``j`` only.
        slopes: ``dm/dp``.
    """
    seen = visible(old)
    pattern, wide = old.double().softmax(-1), slopes.double()
    change = torch.where(seen, new.double() - old.double(), 0).clamp(-MAX_CHANGE, MAX_CHANGE)
    # 1 - p_j and sum_k p_k G_k over k != j. For a key that has all the attention they cancel to nothing,
    # and that is the key the fix is for: there they are sums over the others.
    top = pattern.argmax(-1, keepdim=True)
    others = pattern.scatter(-1, top, 0)
    rest = (1 - pattern).scatter(-1, top, others.sum(-1, keepdim=True))
    shares = pattern * wide
    mean = shares.sum(-1, keepdim=True) - shares
    mean = mean.scatter(
        -1, top.expand(len(wide), *top.shape), (others * wide).sum(-1, keepdim=True)
    )
    weight = pattern * change.expm1() / (rest + pattern * change.exp())
    return (weight * (rest * wide - mean)).masked_fill(~seen, 0).sum(-2).to(slopes.dtype)


def visible(scores: Scores) -> Bool[torch.Tensor, "prompt head query key"]:
    """False where the mask hides a key, be its score minus infinity or the least finite number."""
    return scores > torch.finfo(scores.dtype).min / 2


def attention_fixes(run: Experiment, anatomy: Anatomy) -> dict[str, AttentionFix]:
    """Scores of every layer, by hook of the grid.

    Args:
        run: An experiment on ``q`` or ``k``.
        anatomy: The model's.
    """
    port = run.grid.component
    partner = "k" if port == "q" else "q"
    partners = {name: _sibling(name, f"hook_{partner}") for name in run.grid.hooks}
    scores = {name: _sibling(name, "hook_attn_scores") for name in run.grid.hooks}
    base = read(run.runner, run.base, [*partners.values(), *scores.values()])
    # The partners are put in place too: they would change with the queries or keys of lower layers.
    placed = [(name, put(run.other[name])) for name in run.grid.hooks]
    placed += [(name, put(base[name])) for name in partners.values()]
    with hooking(run.runner, fwd_hooks=placed):
        moved = read(run.runner, run.base, list(scores.values()))
    keys = run.grid.patches[0].index[0]
    return {
        name: AttentionFix(base[at], moved[at], port, anatomy.group, keys)
        for name, at in scores.items()
    }


def pattern_hook(name: str) -> str:
    """The attention pattern that the queries or keys at a hook feed."""
    return _sibling(name, "hook_pattern")


def _sibling(name: str, last: str) -> str:
    return f"{name.rsplit('.', 1)[0]}.{last}"
