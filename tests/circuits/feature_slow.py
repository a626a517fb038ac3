"""Circuits of features computed slowly: with spliced models, one gradient at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gemmascope_plugin.causes.gradient.task_site import TaskSite, sites_of
from gemmascope_plugin.models import flatten_heads, restore_heads
from gemmascope_plugin.splice import splice
from tests import factories
from tests.causes.tasks import RIGHT, WRONG
from tests.tiny_models import FIRST_WORD_ID


def dictionaries(model: Any) -> list[Any]:
    """On three layers: two streams, attention, MLP output and a transcoder."""
    return [
        factories.residual(model, 0, seed=1),
        factories.attention(model, 1, seed=2),
        factories.mlp(model, 1, seed=3),
        factories.residual(model, 1, seed=6),
        factories.transcoder(model, 2, seed=4),
    ]


def metric(logits: torch.Tensor) -> torch.Tensor:
    """Difference of logits of every prompt of ``tests.causes.tasks.TASK``."""
    rows = torch.arange(len(logits))
    return logits[rows, -1, RIGHT] - logits[rows, -1, WRONG]


def dense(site: TaskSite, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """JumpReLU features, dense; none at special tokens."""
    coder: Any = site.coder
    pre = flatten_heads(x) @ coder.W_enc + coder.b_enc
    keep = (tokens >= FIRST_WORD_ID)[..., None]
    return torch.where(keep & (pre > coder.threshold), pre, 0.0)


def caches(model: Any, sites: Sequence[TaskSite], tokens: torch.Tensor) -> dict[str, Any]:
    """Tensor, features and error of every dictionary's site."""
    values = {}
    names = {s.hook for s in sites} | {s.reads.hook for s in sites if s.reads}
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=list(names))
    for site in sites:
        y = cache[site.hook]
        if site.reads is None:
            values[site.hook] = (y, None, None)
            continue
        acts = dense(site, site.reads(cache[site.reads.hook]), tokens)
        values[site.hook] = (y, acts, flatten_heads(y) - acts @ site.coder.W_dec)
    return values


def spliced_effects(
    model: Any, saes: Sequence[Any], clean: torch.Tensor, corrupt: torch.Tensor, steps: int
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Integrated gradients of features and errors with every dictionary spliced in.

    TaskSite by site, both are leaves that are moved from clean to corrupted values. What the dictionary
    writes besides features moves with the error.

    Returns:
        TaskSite to effects of features ``[prompt, pos, d_sae]`` and of errors ``[prompt, pos]``.
    """
    sites = sites_of(model, saes)
    base, corrupted = (caches(model, sites, tokens) for tokens in (clean, corrupt))
    values = {}
    for site in sites:
        (_, a, e), (_, a_new, e_new) = base[site.hook], corrupted[site.hook]
        slopes = [torch.zeros_like(a), torch.zeros_like(e)]
        for k in range(steps):
            alpha = (k + 0.5) / steps
            leaves = [
                (a + alpha * (a_new - a)).requires_grad_(),
                (alpha * (e_new - e)).requires_grad_(),
            ]
            hooks = [
                (f"{site.hook}.hook_sae_acts_post", lambda x, hook, new=leaves[0]: new),
                (f"{site.hook}.hook_sae_error", lambda x, hook, add=leaves[1]: x + add),
            ]
            with torch.enable_grad(), splice(model, saes, error="keep") as spliced:
                value = metric(spliced.run_with_hooks(clean, fwd_hooks=hooks)).sum()
                for i, grad in enumerate(torch.autograd.grad(value, leaves)):
                    slopes[i] += grad / steps
        effects = ((a - a_new) * slopes[0], ((e - e_new) * slopes[1]).sum(-1))
        values[site.hook] = (effects[0].detach(), effects[1].detach())
    return values


def ablated_metric(
    model: Any,
    sites: Sequence[TaskSite],
    clean: torch.Tensor,
    corrupt: torch.Tensor,
    features: dict[str, torch.Tensor],
    errors: dict[str, torch.Tensor],
) -> torch.Tensor:
    """The metric with features and errors outside a circuit replaced, from the definition.

    Args:
        model: The bare model.
        sites: Its sites with dictionaries.
        clean: The prompts.
        corrupt: Those whose values stand in.
        features: TaskSite to what is kept, ``[pos, d_sae]``.
        errors: TaskSite to where the error is kept, ``[pos]``.
    """
    other, inputs, hooks = caches(model, sites, corrupt), {}, []

    def look(site):
        def fn(x, hook):
            inputs[site.hook] = site.reads(x)

        return fn

    def replace(site):
        def fn(y, hook):
            acts = dense(site, inputs[site.hook], clean)
            error = flatten_heads(y) - acts @ site.coder.W_dec
            _, a, e = other[site.hook]
            acts = torch.where(features[site.hook], acts, a)
            error = torch.where(errors[site.hook][:, None], error, e)
            return restore_heads(acts @ site.coder.W_dec + error, y)

        return fn

    for site in sites:
        hooks += [(site.reads.hook, look(site)), (site.hook, replace(site))]
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        return metric(model(clean))
