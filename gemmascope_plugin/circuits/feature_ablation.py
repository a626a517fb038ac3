"""Runs the model with only some of its features, errors, heads and MLPs; the others are replaced.

1. The clean prompts run. At each site, in the order of the pass, with ``y`` the tensor **in this run**,
   ``a`` its features, and ``y0, a0`` what replaces them (``ablation_values.py``):

       ``y - sum_{f out} (a_f - a0_f) W_f``   where the error is kept,
       ``y0 + sum_{f in} (a_f - a0_f) W_f``   where it is not.

   Both are exact: with everything kept ``y`` itself is left, with nothing kept ``y0`` to the last bit.
   Kept features are recomputed in this context, and so is a kept error.
2. A feature that is not in the graph, as it was never active where the circuit was found, is outside.
   In the complement of a circuit it is inside: it belongs to the rest of the model.
3. ``errors``: ``as-circuit``, errors are kept where their nodes are; ``kept``, all of them; ``ablated``,
   none.  The circuit that keeps everything is the model, errors included, in any case.
4. Nodes at positions replace at their position. Many circuits ride one pass on the batch axis.

Cost: one row per circuit and prompt: a forward pass, an encode and two sparse decodes per dictionary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float

from gemmascope_plugin.causes.bound_task import BoundTask
from gemmascope_plugin.causes.gradient.task_site import (
    TaskSite,
    encoded,
    kept_tokens,
    keys_of,
    written_by,
)
from gemmascope_plugin.causes.memory import (
    CODES,
    HEADS,
    MLP,
    SCORES,
    STREAM,
    Footprint,
    Limit,
    logits_held,
)
from gemmascope_plugin.causes.replace import Replacement
from gemmascope_plugin.circuits.ablation_values import (
    AblationValue,
    ablation_values,
    keep_units,
    repeat_prompts,
)
from gemmascope_plugin.circuits.feature_nodes import SiteNodes
from gemmascope_plugin.features.cooccurrence import entries
from gemmascope_plugin.models import flatten_heads, restore_heads
from gemmascope_plugin.models.points import n_heads, n_layers
from gemmascope_plugin.models.protocol import HookedModel, wide
from gemmascope_plugin.models.record import keep, write
from gemmascope_plugin.saes import SparseActs

Errors = Literal["as-circuit", "kept", "ablated"]


@torch.no_grad()
def feature_metric(
    model: HookedModel,
    bound: BoundTask,
    layout: Sequence[SiteNodes],
    is_kept: Bool[torch.Tensor, "circuit node"],
    rest: Bool[torch.Tensor, " circuit"],
    *,
    errors: Errors = "as-circuit",
    replacement: Replacement = "other",
    limit: Limit,
    progress: bool = False,
) -> Float[torch.Tensor, "circuit prompt"]:
    """The metric of every prompt under every circuit."""
    from tqdm.auto import tqdm

    sites = [nodes.site for nodes in layout]
    rows = limit.rows(ablation_footprint(model, bound, sites))
    parts = list(bound.parts(min(rows, len(bound))))
    replacements = ablation_values(model, parts, sites, replacement)
    values = []
    with tqdm(total=len(is_kept) * len(parts), desc="circuits", disable=not progress) as bar:
        for part, other in zip(parts, replacements, strict=True):
            copies, of_part = max(1, rows // len(part)), []
            for chunk, rests in zip(is_kept.split(copies), rest.split(copies), strict=True):
                run = _Run(part, layout, chunk, rests, errors, other)
                tokens = part.clean.repeat(len(chunk), 1)
                measured = part.measure(model, tokens, fwd_hooks=run.hooks())
                of_part.append(measured.reshape(len(chunk), -1).cpu())
                bar.update(len(chunk))
            values.append(torch.cat(of_part))
    return torch.cat(values, 1)


class _Run:
    """One pass under some circuits."""

    def __init__(
        self,
        bound: BoundTask,
        layout: Sequence[SiteNodes],
        is_kept: Bool[torch.Tensor, "circuit node"],
        rest: Bool[torch.Tensor, " circuit"],
        errors: Errors,
        other: dict[str, AblationValue],
    ) -> None:
        self.bound, self.layout, self.errors, self.other = bound, layout, errors, other
        self.is_kept, self.rest = is_kept, rest
        self.whole = is_kept.all(1) & rest
        """Circuits that keep everything."""
        self.n = len(is_kept)
        self._inputs: dict[str, torch.Tensor] = {}

    def hooks(self) -> list[tuple[str, Callable[..., Any]]]:
        """Functions by hook name: those that look at what a dictionary reads, and those that replace."""
        hooks = []
        for nodes in self.layout:
            site = nodes.site
            if site.reads is not None and site.reads.hook != site.hook:
                hooks.append((site.reads.hook, keep(self._inputs, site.hook, site.reads)))
            hooks.append((site.hook, self._replace(nodes)))
        return hooks

    def _replace(self, nodes: SiteNodes) -> Callable[..., torch.Tensor]:
        make = self._features if nodes.site.kind == "feature" else self._raw
        return write(partial(make, nodes))

    def _raw(self, nodes: SiteNodes, y: torch.Tensor) -> torch.Tensor:
        """Heads, or the MLP."""
        is_kept = self.is_kept[:, nodes.features].unflatten(1, (-1, nodes.n))
        return keep_units(y, self.other[nodes.site.hook].y.to(y), is_kept)

    def _features(self, nodes: SiteNodes, y: torch.Tensor) -> torch.Tensor:
        site, value = nodes.site, self.other[nodes.site.hook]
        keep = kept_tokens(site, self.bound.clean, self.bound.mask).repeat(self.n, 1)
        x = self._inputs.pop(site.hook, y)
        live = encoded(site, x, keep)
        assert value.acts is not None
        other = repeat_prompts(value.acts, self.n)
        flat = wide(flatten_heads(y))
        errors = self._errors(nodes).to(y.device)
        out = flat
        if bool(errors.any()):
            out = out - self._written(nodes, live, other, inside=False).to(y.device)
        if not bool(errors.all()):
            base = wide(flatten_heads(value.y)).repeat(self.n, 1, 1)
            without = base + self._written(nodes, live, other, inside=True).to(y.device)
            by_row = errors.repeat_interleave(len(self.bound), 0)[..., None]
            out = torch.where(by_row, out, without)
        if value.leaves is not None:
            out = torch.where(value.leaves.repeat(self.n, 1)[..., None], flat, out)
        return restore_heads(out.to(y.dtype), y)

    def _errors(self, nodes: SiteNodes) -> Bool[torch.Tensor, "circuit pos"]:
        """Where each circuit keeps the site's error; one position stands for all."""
        if self.errors == "kept":
            return torch.ones(self.n, 1, dtype=torch.bool)
        is_kept = self.whole[:, None]
        if self.errors == "ablated":
            return is_kept
        if not len(nodes.errors):
            return is_kept | self.rest[:, None]
        return is_kept | self.is_kept[:, nodes.error_places]

    def _written(
        self, nodes: SiteNodes, live: SparseActs, other: SparseActs, *, inside: bool
    ) -> Float[torch.Tensor, "row pos width"]:
        """``sum (a - a0) W`` over the features inside, or outside, each row's circuit."""
        terms = [
            written_by(nodes.site, entries(acts, self._inside(nodes, acts) == inside))
            for acts in (live, other)
        ]
        return terms[0] - terms[1]

    def _inside(self, nodes: SiteNodes, acts: SparseActs) -> Bool[torch.Tensor, " active"]:
        """Whether the circuit of an entry's row keeps its feature."""
        circuit = acts.rows // (len(self.bound) * acts.shape[1])
        device = circuit.device
        rest, node_keys = self.rest.to(device)[circuit], nodes.keys.to(device)
        if not len(node_keys):
            return rest
        keys = keys_of(acts, nodes.per_position)
        place = torch.searchsorted(node_keys, keys).clamp(max=len(node_keys) - 1)
        is_kept = self.is_kept[:, nodes.features].to(device)[circuit, place]
        return torch.where(node_keys[place] == keys, is_kept, rest)


def ablation_footprint(
    model: HookedModel, bound: BoundTask, sites: Sequence[TaskSite]
) -> Footprint:
    """Bytes of the replacement values, and per row of a pass without gradients."""
    cfg, heads, (n_prompts, n_pos) = model.cfg, n_heads(model), bound.clean.shape
    d, d_mlp = int(cfg.d_model), int(getattr(cfg, "d_mlp", None) or 4 * int(cfg.d_model))
    attention = HEADS * n_pos * heads * int(cfg.d_head) + SCORES * n_pos * n_pos * (heads + 1)
    codes = CODES * n_pos * max(site.d_sae for site in sites)
    row = STREAM * n_pos * d + max(attention, MLP * n_pos * d_mlp, codes)
    row += logits_held(model, bound)
    numbers = n_pos * sum(site.width for site in sites) + (n_layers(model) + 1) * n_pos * d
    return Footprint(4 * n_prompts * numbers, 4 * row)
