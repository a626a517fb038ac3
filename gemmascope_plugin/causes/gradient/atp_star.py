"""AtP*: attribution patching with the attention fixes and GradDrop (Kramar et al., arXiv 2403.00745).

**Attention fixes** (section 3.1.1, for ``q`` and ``k``). A saturated softmax has no slope, yet another
query may move all its weight: differences are taken in the attention pattern. With scores ``s``, pattern
``p = softmax(s)``, ``G = dm/dp`` and values as they are:

* query ``i`` replaced: ``<softmax(s'_i) - softmax(s_i), G_i>``;
* key ``j`` alone replaced, which changes a column of the scores by ``D_ij = s'_ij - s_ij``:

      effect(j) = sum_{i >= j} w_ij / (1 + w_ij) (G_ij - sum_k p_ik G_ik),  w_ij = p_ij (e^D_ij - 1),

  a closed form of ``sum_i <softmax(s, column j replaced) - softmax(s), G_i>`` without a loop over keys,
  evaluated in double precision as ``w_ij / (1 + w_ij) = w_ij / ((1 - p_ij) + p_ij e^D_ij)``. Where a
  patch covers several keys, their columns change at once and the query's formula holds for them together.

1. Scores of all layers come from one run of the model with every layer's queries and keys put in place:
   scaling, soft-cap, rotary embedding, sliding window and Gemma 3's query and key norms are the model's.
2. Score column ``j`` depends on key ``j`` alone, so all keys are replaced at once.
3. A key-value head's effect is the sum over the query heads that share it.

**GradDrop** (section 3.1.2): slopes with one layer's gradient dropped at a time, so that direct and
indirect effects of opposite sign do not hide a node.

4. One copy of the prompts per layer ``l``; in it the gradients at the layer's ``hook_attn_out`` and
   ``hook_mlp_out`` are zero, while its residual stream passes.
5. ``c(n) = 1/(L-1) sum_l | <z'_n - z_n, dm^(l)/dz_n> |``, the absolute value per prompt, then the mean
   over prompts.  A node's own layer is left out, which is why it is ``L - 1``; nodes of the residual
   stream have none, there it is the mean over all ``L``.

**What is returned are magnitudes**: how much a node may matter, not in which direction.  They are for
ranking; ``verify_top`` puts exact, signed effects in the place of the largest.

Cost: one forward and one backward pass over ``layers * prompts`` rows, ``max_rows`` at a time; three
forward passes and ``head * query * key`` numbers per layer for the fixes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float

from gemmascope_plugin.causes.experiment import Experiment
from gemmascope_plugin.causes.gradient.slopes import (
    Estimate,
    FwdHooks,
    NodeMethod,
    Products,
    by_patch,
    differences,
    slopes,
)
from gemmascope_plugin.causes.grid import At
from gemmascope_plugin.errors import ModelError
from gemmascope_plugin.models.anatomy import Anatomy
from gemmascope_plugin.models.points import n_layers
from gemmascope_plugin.models.protocol import wide
from gemmascope_plugin.models.record import hooking, put, record, write

Scores = Float[torch.Tensor, "prompt head query key"]
Slopes = Float[torch.Tensor, "copy prompt head query key"]
ToProducts = Callable[[dict[str, torch.Tensor]], Products]
"""Gradients by name to differences times slopes, by hook of the grid."""

MAX_CHANGE = 80.0
"""Scores that change by more are taken to change by this much: ``exp`` of it is still finite."""
_DROPPED = ("hook_attn_out", "hook_mlp_out")


@dataclass(frozen=True)
class AtPStar(NodeMethod):
    """Attribution patching that looks through saturated attention and cancellation."""

    name = "atp*"
    title = "AtP*"
    paper = "Kramar et al., arXiv 2403.00745"
    cost = "a forward and a backward pass per layer, and three forward passes for queries and keys"

    def estimate(self, run: Experiment, max_rows: int) -> Estimate:
        """Mean magnitudes over the dropped layers."""
        is_fixed = run.grid.component in ("q", "k")
        hooks = run.grid.hooks
        names = [pattern_hook(name) for name in hooks] if is_fixed else hooks
        products = _through_pattern(run) if is_fixed else _direct(run)
        return Estimate(grad_drop(run, names, products, max_rows))

    def details(self, estimate: Estimate, gap: float) -> Mapping[str, Any]:
        """That the numbers are magnitudes."""
        return {"sign": "magnitude: no direction", "magnitudes": True}


def _direct(run: Experiment) -> ToProducts:
    deltas = differences(run)

    def products(slopes: dict[str, torch.Tensor]) -> Products:
        return {name: slopes[name] * delta for name, delta in deltas.items()}

    return products


def _through_pattern(run: Experiment) -> ToProducts:
    fixes = attention_fixes(run, Anatomy(run.model))

    def products(slopes: dict[str, torch.Tensor]) -> Products:
        return {name: fix.effects(slopes[pattern_hook(name)]) for name, fix in fixes.items()}

    return products


def grad_drop(
    run: Experiment, names: Sequence[str], products: ToProducts, max_rows: int
) -> Float[torch.Tensor, "patch prompt"]:
    """Mean magnitude of every patch's effect over the dropped layers, from the gradients at ``names``."""
    n, n_prompts = n_layers(run.model), len(run.base)
    if n < 2:
        raise ModelError(
            "GradDrop drops one layer of several, and this model has one", fix='method="atp"'
        )
    sums = torch.zeros(len(run.grid.patches), n_prompts)
    for layers in torch.arange(n).split(max(1, max_rows // n_prompts)):
        hooks = drop_hooks(layers.tolist(), n_prompts)
        dropped = products(slopes(run, names, copies=len(layers), fwd_hooks=hooks))
        for name, product in dropped.items():
            product[layers == layer_within(name)] = 0
        sums = sums + _magnitudes(run, by_patch(run.grid, dropped)).sum(0)
    in_layer = [any(layer_within(hook) >= 0 for hook in patch.hooks) for patch in run.grid.patches]
    return sums / (n - torch.tensor(in_layer).int())[:, None]


def _magnitudes(
    run: Experiment, effects: Float[torch.Tensor, "copy patch row"]
) -> Float[torch.Tensor, "copy patch row"]:
    """Those of each prompt, in all of its rows."""
    return run.bound.fold(effects).abs().repeat_interleave(run.bound.metric.rows_per_prompt, -1)


def drop_hooks(layers: Sequence[int], n_prompts: int) -> FwdHooks:
    """Hooks that stop, in copy ``i`` of the prompts, the gradient into what layer ``layers[i]`` adds."""

    def stop(copy: int) -> Callable[..., torch.Tensor]:
        def stopped(x: torch.Tensor) -> torch.Tensor:
            passes = torch.ones(len(x), *[1] * (x.ndim - 1), dtype=torch.bool, device=x.device)
            passes[copy * n_prompts : (copy + 1) * n_prompts] = False
            return torch.where(passes, x, x.detach())

        return write(stopped)

    return [
        (f"blocks.{layer}.{name}", stop(copy))
        for copy, layer in enumerate(layers)
        for name in _DROPPED
    ]


def layer_within(hook: str) -> int:
    """The layer that a node's effect passes through as a whole; -1 for the residual stream."""
    parts = hook.split(".")
    in_layer = parts[0] == "blocks" and not any(part.startswith("hook_resid") for part in parts)
    return int(parts[1]) if in_layer else -1


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
        """First-order effects by position and head, to be summed over the entries of a patch."""
        slopes = wide(slopes)
        if self.port == "q":
            effects = query_fix(self.old, self.new, slopes)
        else:
            each = isinstance(self.keys, int)
            effects = key_fix(self.old, self.new, slopes) if each else self._at_once(slopes)
            effects = effects.unflatten(2, (-1, self.group)).sum(3)
        return effects.transpose(2, 3)[..., None]

    def _at_once(self, slopes: Slopes) -> Float[torch.Tensor, "copy prompt head pos"]:
        """The effect of several keys together, at the first of them."""
        at = torch.arange(self.old.shape[-1], device=self.old.device)[
            list(self.keys) if isinstance(self.keys, tuple) else self.keys
        ]
        new = self.old.clone()
        new[..., at] = self.new[..., at]
        change = query_fix(self.old, new, slopes)
        effects = torch.zeros_like(change)
        effects[..., at[0]] = change.sum(-1)
        return effects


def query_fix(
    old: Scores, new: Scores, slopes: Slopes
) -> Float[torch.Tensor, "copy prompt head query"]:
    """``<softmax(new_i) - softmax(old_i), G_i>`` of every query ``i``."""
    change = new.double().softmax(-1) - old.double().softmax(-1)
    return (change * slopes.double()).sum(-1).to(slopes.dtype)


def key_fix(
    old: Scores, new: Scores, slopes: Slopes
) -> Float[torch.Tensor, "copy prompt head key"]:
    """Effect of every key alone, summed over queries; column ``j`` of ``new`` is used for key ``j``."""
    is_visible = visible(old)
    pattern, slope = old.double().softmax(-1), slopes.double()
    change = torch.where(is_visible, new.double() - old.double(), 0).clamp(-MAX_CHANGE, MAX_CHANGE)
    # 1 - p_j and sum_k p_k G_k over k != j. For a key that has all the attention they cancel to nothing,
    # and that is the key the fix is for: there they are sums over the others.
    top = pattern.argmax(-1, keepdim=True)
    others = pattern.scatter(-1, top, 0)
    rest = (1 - pattern).scatter(-1, top, others.sum(-1, keepdim=True))
    shares = pattern * slope
    mean = shares.sum(-1, keepdim=True) - shares
    mean = mean.scatter(
        -1, top.expand(len(slope), *top.shape), (others * slope).sum(-1, keepdim=True)
    )
    weight = pattern * change.expm1() / (rest + pattern * change.exp())
    return (weight * (rest * slope - mean)).masked_fill(~is_visible, 0).sum(-2).to(slopes.dtype)


def visible(scores: Scores) -> Bool[torch.Tensor, "prompt head query key"]:
    """False where the mask hides a key, be its score minus infinity or the least finite number."""
    return scores > torch.finfo(scores.dtype).min / 2


def attention_fixes(run: Experiment, anatomy: Anatomy) -> dict[str, AttentionFix]:
    """Scores of every layer, by hook of the grid, of an experiment on ``q`` or ``k``."""
    port = run.grid.component
    partner = "k" if port == "q" else "q"
    partners = {name: _sibling(name, f"hook_{partner}") for name in run.grid.hooks}
    scores = {name: _sibling(name, "hook_attn_scores") for name in run.grid.hooks}
    base = record(run.runner, run.base, [*partners.values(), *scores.values()])
    # The partners are put in place too: they would change with the queries or keys of lower layers.
    placed = [(name, put(run.other[name])) for name in run.grid.hooks]
    placed += [(name, put(base[name])) for name in partners.values()]
    with hooking(run.runner, fwd_hooks=placed):
        moved = record(run.runner, run.base, list(scores.values()))
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
