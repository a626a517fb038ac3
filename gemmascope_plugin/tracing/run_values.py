"""What a run makes of the nodes that a trace explains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float

from gemmascope_plugin.causes.gradient.slopes import ignore_bridge_norm_warning
from gemmascope_plugin.models.asked import asked_positions
from gemmascope_plugin.models.hooks import hooking
from gemmascope_plugin.models.points import reading
from gemmascope_plugin.tracing.traced_prompt import Hooks, Replay


@dataclass(frozen=True, eq=False)
class Seen:
    """One run."""

    features: dict[int, float]
    """Pre-activation of features that were active when recorded, by place in the layout."""
    seeds: tuple[float, ...]
    """Logits, differences, directions."""
    logits: Float[torch.Tensor, " d_vocab"]
    """At the last position, after the soft-cap."""


@torch.no_grad()
def observe(replay: Replay, hooks: Hooks, *, frozen: bool) -> Seen:
    """Runs the prompt with hooks.

    Args:
        replay: The prompt's.
        hooks: Of the run; what dictionaries read is seen before them, the end of the stream after.
        frozen: Targets are read through the recorded scale of the last norm.
    """
    record, activities = replay.record, replay.layout.activities
    end = f"blocks.{record.n_layers - 1}.hook_resid_post"
    asked = [replay.hook_of(one.site.hooked.hook_in) for one in activities]
    held: dict[str, torch.Tensor] = {}
    reads = [(name, _keep(held, name)) for name in dict.fromkeys(asked)]
    last = (end, _keep(held, "end"))
    with (
        ignore_bridge_norm_warning(),
        hooking(record.model, fwd_hooks=[*reads, *hooks, last]),
        asked_positions(record.model, [-1]),
    ):
        logits = record.model(record.tokens[None])[0, -1]
    features: dict[int, float] = {}
    for index, one in enumerate(activities):
        if one.site.is_target:
            how = reading(record.model, one.site.hooked.hook_in)
            x = how(held[how.hook]).flatten(2)[0].to(record.dtype)
            values = _pre_activations(replay, index, x).tolist()
            features |= dict(enumerate(values, start=replay.layout.starts[index]))
    return Seen(features, _seeds(replay, held["end"][0].to(record.dtype), frozen), logits)


def _pre_activations(
    replay: Replay, site: int, x: Float[torch.Tensor, "pos d_in"]
) -> Float[torch.Tensor, " active"]:
    own = replay.layout.activities[site]
    parts = [x.new_zeros(0)]
    for index in torch.arange(own.n_features).split(4096):
        _, constant = own.readers(index)
        products = x[own.acts.rows[index]] * own.encoders(index).to(x)
        parts.append(products.sum(1) + constant.to(x))
    return torch.cat(parts)


def _seeds(
    replay: Replay, end: Float[torch.Tensor, "pos d_model"], frozen: bool
) -> tuple[float, ...]:
    recorded = replay.record.final_scale()
    now = recorded if frozen else replay.record.anatomy.ln_final.scale(end)[:, 0]
    ratio = recorded / now
    return tuple(
        float(seed.vector @ end[seed.position] * ratio[seed.position]) + seed.own
        for seed in replay.seeds
    )


def _keep(held: dict[str, torch.Tensor], name: str) -> Callable[..., None]:
    def hook_fn(x: torch.Tensor, hook: Any) -> None:
        held[name] = x.detach()

    return hook_fn
