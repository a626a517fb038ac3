"""What a trace should say, by autograd: one backward pass per target through the frozen model.

Everything that is a source is put into the forward pass as a leaf of its own value; patterns and norm
scales are constants.  The effect of a source is its write times the gradient at the leaf it is part of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from gemmascope_plugin.causes.gradient.slopes import ignore_bridge_norm_warning
from gemmascope_plugin.models.points import reading
from gemmascope_plugin.tracing.traced_prompt import TracedPrompt


class FrozenModel:
    """One differentiable pass in which only what dictionaries and tokens write can move.

    Args:
        model: The model.
        traced: The prompt's.
        before: Further hooks, which run before those that make leaves.
    """

    def __init__(
        self,
        model: Any,
        traced: TracedPrompt,
        before: Sequence[tuple[str, Callable[..., Any]]] = (),
    ) -> None:
        self.traced = traced
        self.leaves: dict[str, torch.Tensor] = {}
        self.seen: dict[str, torch.Tensor] = {}
        self.attention: dict[int, torch.Tensor] = {}
        hooks = [*before, ("hook_embed", self._leaf("hook_embed"))]
        for layer in range(model.cfg.n_layers):
            block = f"blocks.{layer}"
            hooks.append((f"{block}.attn.hook_pattern", lambda x, hook: x.detach()))
            for norm in ("ln1", "ln1_post", "ln2"):
                hooks.append((f"{block}.{norm}.hook_scale", lambda x, hook: x.detach()))
        hooks.append(("ln_final.hook_scale", lambda x, hook: x.detach()))
        for activity in traced.layout.activities:
            site = activity.site
            read = reading(model, site.hooked.hook_in)
            if site.kind == "transcoder":
                hooks.append((read.hook, self._look(site, read)))
            hooks.append((reading(model, site.hooked.hook_out).hook, self._source(activity)))
        hooks.append(("unembed.hook_in", lambda x, hook: self.seen.setdefault("end", x)))
        with ignore_bridge_norm_warning(), torch.enable_grad(), model.hooks(fwd_hooks=hooks):
            self.logits = model(traced.frozen.tokens[None], return_type="logits")[0]

    def _leaf(self, name: str) -> Callable[..., torch.Tensor]:
        def hook_fn(x: torch.Tensor, hook: Any) -> torch.Tensor:
            self.leaves[name] = x.detach().clone().requires_grad_(True)
            return self.leaves[name]

        return hook_fn

    def _look(self, site: Any, read: Any) -> Callable[..., None]:
        def hook_fn(x: torch.Tensor, hook: Any) -> None:
            self.seen[site.label] = read(x)

        return hook_fn

    def _source(self, activity: Any) -> Callable[..., torch.Tensor]:
        """The site's own value as a leaf; what passes it keeps its history."""
        site = activity.site

        def hook_fn(x: torch.Tensor, hook: Any) -> torch.Tensor:
            if site.kind in ("resid", "attention"):
                self.seen[site.label] = x.flatten(2)
            leaf = x.detach().clone().requires_grad_(True)
            self.leaves[site.label] = leaf
            keep = (
                activity.keep[None, :, None] if x.ndim == 3 else activity.keep[None, :, None, None]
            )
            if site.kind in ("resid", "attention"):
                return torch.where(keep, leaf, x + leaf - leaf.detach())
            if site.skip is None:
                return leaf
            passed = self.seen[site.label] @ site.skip.T
            return leaf + (passed - passed.detach())

        return hook_fn

    def pre_activation(self, site: int, entry: int) -> torch.Tensor:
        """Of an active feature."""
        activity = self.traced.layout.activities[site]
        pos, feature = int(activity.acts.rows[entry]), int(activity.acts.indices[entry])
        weights = activity.site.weights
        return (
            self.seen[activity.site.label][0, pos] @ weights.W_enc[:, feature]
            + weights.b_enc[feature]
        )

    def effects(self, target: torch.Tensor) -> np.ndarray:
        """Of every node on a target; what it has of its own is left out."""
        layout = self.traced.layout
        names = list(self.leaves)
        grads = torch.autograd.grad(
            target, [self.leaves[n] for n in names], retain_graph=True, allow_unused=True
        )
        total = np.zeros(layout.n_nodes)
        by_name = dict(zip(names, grads, strict=True))

        def at(name: str) -> torch.Tensor:
            grad = by_name[name]
            return torch.zeros_like(self.leaves[name]) if grad is None else grad

        embed = at("hook_embed")[0]
        total[: layout.n_pos] = (embed * self.traced.frozen.embed).sum(-1).numpy()
        for j, activity in enumerate(layout.activities):
            grad = at(activity.site.label)[0].flatten(1)
            for i, source in enumerate(layout.activities[: j + 1]):
                if i != j and source.site.hooked not in _siblings(activity):
                    continue
                W_dec = activity.site.hooked.decoder_from(source.site.place)
                writes = source.acts.values[:, None] * W_dec[source.acts.indices]
                products = (writes * grad[source.acts.rows]).sum(-1)
                total[layout.features(i)] += products.detach().numpy()
            errors = (activity.rest * grad).sum(-1)
            total[layout.errors(j)] = errors[activity.keep].numpy()
            total[layout.passed(j)] = float(errors[~activity.keep].sum())
            total[layout.b_dec(j)] = float((grad[activity.keep] @ activity.b_dec).sum())
        return total


def _siblings(activity: Any) -> list[Any]:
    dictionary = getattr(activity.site.hooked, "dictionary", None)
    return [] if dictionary is None else _Family(dictionary)


class _Family(list):
    def __init__(self, dictionary: Any) -> None:
        self._dictionary = dictionary

    def __contains__(self, hooked: object) -> bool:
        return getattr(hooked, "dictionary", None) is self._dictionary


def with_attention_biases(model: Any) -> Any:
    """The model with random biases in attention, which no Gemma has."""
    generator = torch.Generator().manual_seed(3)
    for block in model.blocks:
        for name in ("b_O", "b_V"):
            bias = getattr(block.attn, name)
            bias.data = torch.randn(bias.shape, generator=generator) * 0.2
    return model
