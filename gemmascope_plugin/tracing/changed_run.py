"""Measures the traced nodes' pre-activations in a run with other values, free or with all else held.

*Changed nodes.* A changed feature gets ``factor`` times its recorded value: what its dictionary writes
moves by ``(value - f) W_dec``, at every layer that it writes to, where ``f`` is what the feature is in
this very run, or was recorded where everything else is held. Errors and tokens are scaled.

*Held to the record* are everything that makes the stream of a run linear, and everything that
dictionaries' sites write:

1. Attention patterns and the scales of all norms, the last one too, are as recorded: the logits are
   linear in the end of the stream, up to their soft-cap.
2. What an MLP writes is as recorded, plus what an affine skip makes of a change of its input.
3. The stream and ``z`` at sites of SAEs are as recorded, but at special tokens, where nothing is cut.

Cost: one forward pass, and one to record what is held; the encoder columns and decoder rows of the
changed features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float

from gemmascope_plugin.causes.gradient.slopes import ignore_bridge_norm_warning
from gemmascope_plugin.models.asked import asked_positions
from gemmascope_plugin.models.points import hook_points, reading
from gemmascope_plugin.models.protocol import wide
from gemmascope_plugin.models.record import hooking, keep, keeping, put, record, write
from gemmascope_plugin.tracing.linear.trace_site import Activity
from gemmascope_plugin.tracing.traced_prompt import TracedPrompt

Hooks = list[tuple[str, Callable[..., Any]]]
_NORMS = ("ln1", "ln1_post", "ln2")
_LAST = "ln_final.hook_scale"


@dataclass(frozen=True, eq=False)
class RunValues:
    """What one run makes of the nodes that a trace explains."""

    features: dict[int, float]
    """Pre-activation of features that were active when recorded, by node of the layout."""
    seeds: tuple[float, ...]
    """Logits, differences, directions."""
    logits: Float[torch.Tensor, " d_vocab"]
    """At the last position, after the soft-cap."""


@torch.no_grad()
def run_values(traced: TracedPrompt, hooks: Hooks, *, is_frozen: bool) -> RunValues:
    """Runs the prompt with hooks.

    What dictionaries read is noted before the hooks, the end of the stream after them; if ``is_frozen``,
    targets are read through the recorded scale of the last norm.
    """
    frozen, activities = traced.frozen, traced.layout.activities
    end = f"blocks.{frozen.n_layers - 1}.hook_resid_post"
    acts: dict[str, torch.Tensor] = {}
    inputs = keeping(acts, [hook_of(traced, a.site.hooked.hook_in) for a in activities])
    with (
        ignore_bridge_norm_warning(),
        hooking(frozen.model, fwd_hooks=[*inputs, *hooks, (end, keep(acts, "end"))]),
        asked_positions(frozen.model, [-1]),
    ):
        logits = frozen.model(frozen.tokens[None])[0, -1]
    features: dict[int, float] = {}
    for index, activity in enumerate(activities):
        if activity.site.is_target:
            read = reading(frozen.model, activity.site.hooked.hook_in)
            x = read(acts[read.hook]).flatten(2)[0].to(frozen.dtype)
            values = _pre_activations(activity, x).tolist()
            features |= dict(enumerate(values, start=traced.layout.starts[index]))
    return RunValues(features, _seed_values(traced, acts["end"][0], is_frozen), logits)


def hook_of(traced: TracedPrompt, name: str) -> str:
    """The model's hook for a dictionary's tensor."""
    return reading(traced.frozen.model, name).hook


def _pre_activations(
    activity: Activity, x: Float[torch.Tensor, "pos d_in"]
) -> Float[torch.Tensor, " active"]:
    parts = [x.new_zeros(0)]
    for index in torch.arange(activity.n_features).split(4096):
        _, constant = activity.readers(index)
        products = x[activity.acts.rows[index]] * activity.encoders(index).to(x)
        parts.append(products.sum(1) + constant.to(x))
    return torch.cat(parts)


def _seed_values(
    traced: TracedPrompt, end: Float[torch.Tensor, "pos d_model"], is_frozen: bool
) -> tuple[float, ...]:
    end = end.to(traced.frozen.dtype)
    recorded = traced.frozen.final_scale()
    now = recorded if is_frozen else traced.frozen.anatomy.ln_final.scale(end)[:, 0]
    ratio = recorded / now
    return tuple(
        float(seed.vector @ end[seed.position] * ratio[seed.position]) + seed.constant
        for seed in traced.seeds
    )


def freeze_hooks(traced: TracedPrompt) -> Hooks:
    """Hooks that hold a run to its record."""
    frozen, model = traced.frozen, traced.frozen.model
    points = hook_points(model)
    names = []
    for layer in range(frozen.n_layers):
        scales = [f"blocks.{layer}.{norm}.hook_scale" for norm in _NORMS]
        names += [f"blocks.{layer}.attn.hook_pattern", *(name for name in scales if name in points)]
    acts = record(model, frozen.tokens[None], [*names, _LAST])
    hooks: Hooks = [(name, put(value)) for name, value in acts.items()]
    for activity in traced.layout.activities:
        hooks += _held_site(traced, activity)
    return hooks


def _held_site(traced: TracedPrompt, activity: Activity) -> Hooks:
    site, frozen = activity.site, traced.frozen
    read = reading(frozen.model, site.hooked.hook_in)
    y_recorded, x_recorded = (frozen.tensor(n) for n in (site.hooked.hook_out, site.hooked.hook_in))
    moved: dict[str, torch.Tensor] = {}

    def hold(y: torch.Tensor) -> torch.Tensor:
        flat = y.flatten(2)
        out = y_recorded[None]
        if site.skip is not None:
            out = out + moved["x"] @ site.skip.detach().T.to(moved["x"])
        if site.cuts:
            out = torch.where(activity.keep[:, None], out, flat)
        return out.to(flat).reshape(y.shape)

    hooks: Hooks = [(hook_of(traced, site.hooked.hook_out), write(hold))]
    if site.skip is None:
        return hooks
    return [(read.hook, keep(moved, "x", lambda x: wide(read(x)) - wide(x_recorded))), *hooks]


def change_hooks(traced: TracedPrompt, changes: Mapping[int, float], *, recorded: bool) -> Hooks:
    """Hooks that put changes, factors by node of the layout, into a run.

    If ``recorded``, features are as recorded, not as they are in the run.
    """
    hooks: Hooks = []
    tokens = {node: factor for node, factor in changes.items() if node < traced.layout.n_pos}
    if tokens:
        hooks.append(("hook_embed", _scaled_tokens(tokens)))
    for site, activity in enumerate(traced.layout.activities):
        features = _inside(traced.layout.features(site), changes)
        errors = _inside(traced.layout.errors(site), changes)
        if features:
            hooks += _changed_features(traced, site, features, recorded)
        if errors:
            hook = hook_of(traced, activity.site.hooked.hook_out)
            hooks.append((hook, _scaled_errors(activity, errors)))
    return hooks


def _inside(part: slice, changes: Mapping[int, float]) -> dict[int, float]:
    """Changes of some nodes, counted from the first of them."""
    return {n - part.start: f for n, f in changes.items() if part.start <= n < part.stop}


def _changed_features(
    traced: TracedPrompt, site: int, factors: Mapping[int, float], recorded: bool
) -> Hooks:
    """Other values for features of one site, wherever their dictionary writes them: a hook where they are
    read, one at each place where they are written.
    """
    activity = traced.layout.activities[site]
    entries = torch.tensor(list(factors), device=activity.acts.indices.device)
    rows, features = activity.acts.rows[entries], activity.acts.indices[entries]
    before = activity.acts.values[entries]
    after = before * torch.tensor(list(factors.values())).to(before)
    read = reading(traced.frozen.model, activity.site.hooked.hook_in)
    changes: dict[str, torch.Tensor] = {}

    def change(x: torch.Tensor) -> torch.Tensor:
        if recorded:
            return after - before
        unique, index = features.unique(return_inverse=True)
        acts = activity.site.weights.encode_features(read(x).flatten(2), unique)
        return after - acts[0, rows, index].to(after)

    def writes(W_dec: torch.Tensor) -> Callable[..., torch.Tensor]:
        def moved(y: torch.Tensor) -> torch.Tensor:
            assert "acts" in changes, "the features are read before they are written"
            acts, flat = changes["acts"], y.flatten(2)
            vectors = W_dec.detach()[features].to(acts) * acts[:, None]
            added = wide(torch.zeros_like(flat)).index_add(1, rows, vectors[None].to(flat.device))
            return (flat + added).to(y).reshape(y.shape)

        return write(moved)

    hooks: Hooks = [(read.hook, keep(changes, "acts", change))]
    for index in traced.layout.output_sites(site):
        hooked = traced.layout.activities[index].site.hooked
        W_dec = hooked.decoder_from(activity.site.place)
        hooks.append((hook_of(traced, hooked.hook_out), writes(W_dec)))
    return hooks


def _scaled_tokens(factors: Mapping[int, float]) -> Callable[..., torch.Tensor]:
    def scaled(x: torch.Tensor) -> torch.Tensor:
        scale = torch.ones(x.shape[1]).to(x)
        scale[list(factors)] = torch.tensor(list(factors.values())).to(x)
        return x * scale[:, None]

    return write(scaled)


def _scaled_errors(activity: Activity, factors: Mapping[int, float]) -> Callable[..., torch.Tensor]:
    """Errors times factors, by number of the error among those of its site."""
    positions = activity.keep.nonzero()[list(factors), 0]
    scale = torch.tensor(list(factors.values())).to(activity.rest) - 1
    change = torch.zeros_like(activity.rest)
    change[positions] = scale[:, None] * activity.rest[positions]
    return write(lambda y: (y + change.reshape(y.shape[1:])).to(y))
