"""Runs the real model with only some features and errors of a trace left, several choices at once.

1. At every site the tensor is rebuilt from what is kept: ``sum f W_dec`` over kept features, which are
   taken live from the run, plus biases and skip, plus kept errors as recorded. Everything else is zero.
2. Attention, norms and special tokens are the model's own: nothing is frozen.
3. Choices ride on the batch axis.

With everything kept the run is the model's. Cost: one forward pass over a row per choice, and the encoder
columns of features that are kept in any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float

from gemmascope_plugin.models.asked import asked_positions
from gemmascope_plugin.models.hooks import hooking
from gemmascope_plugin.models.points import reading
from gemmascope_plugin.tracing.traced_prompt import Hooks, Replay


@dataclass(frozen=True, eq=False)
class Left:
    """What the choices leave of a site's features and errors."""

    features: torch.Tensor
    """Their indices, each once ``[k]``."""
    kept: Bool[torch.Tensor, "choice pos k"]
    errors: Bool[torch.Tensor, "choice pos"]


@torch.no_grad()
def ablated_run(
    replay: Replay, kept: Bool[torch.Tensor, "choice node"], positions: Sequence[int]
) -> tuple[Float[torch.Tensor, "choice pos d_model"], Float[torch.Tensor, "choice asked d_vocab"]]:
    """The end of the stream, and logits.

    Args:
        replay: The prompt's.
        kept: True where a choice keeps a node of the layout; only features and errors count.
        positions: Where logits are asked for.

    Returns:
        The stream before the last norm; logits after the soft-cap.
    """
    record = replay.record
    hooks: Hooks = []
    acts: dict[int, torch.Tensor] = {}
    left = [left_of(replay, site, kept) for site in range(len(replay.layout.activities))]
    inputs: dict[int, torch.Tensor] = {}
    for site in range(len(left)):
        hooks += _site_hooks(replay, site, left, acts, inputs)
    held: list[torch.Tensor] = []
    end = f"blocks.{record.n_layers - 1}.hook_resid_post"
    hooks.append((end, lambda x, hook: held.append(x)))
    with hooking(record.model, fwd_hooks=hooks), asked_positions(record.model, list(positions)):
        logits = record.model(record.tokens.repeat(len(kept), 1))
    return held[0].to(record.dtype), logits


def left_of(replay: Replay, site: int, kept: Bool[torch.Tensor, "choice node"]) -> Left:
    """What the choices keep at a site."""
    layout = replay.layout
    own = layout.activities[site]
    device = own.rest.device
    entries = kept[:, layout.features(site)].to(device)
    used = entries.any(0)
    features, index = own.acts.indices[used].unique(return_inverse=True)
    grid = torch.zeros(len(kept), layout.n_pos, len(features), dtype=torch.bool, device=device)
    grid[:, own.acts.rows[used], index] = entries[:, used]
    errors = torch.zeros(len(kept), layout.n_pos, dtype=torch.bool, device=device)
    errors[:, own.keep] = kept[:, layout.errors(site)].to(device)
    return Left(features, grid, errors)


def _site_hooks(
    replay: Replay,
    site: int,
    left: Sequence[Left],
    acts: dict[int, torch.Tensor],
    inputs: dict[int, torch.Tensor],
) -> Hooks:
    own = replay.layout.activities[site]
    how = reading(replay.record.model, own.site.hooked.hook_in)

    def look(x: torch.Tensor, hook: Any) -> None:
        inputs[site] = how(x).flatten(2)
        acts[site] = _live(replay, site, inputs[site], left[site])

    return [
        (how.hook, look),
        (replay.hook_of(own.site.hooked.hook_out), _rebuilt(replay, site, left, acts, inputs)),
    ]


def _live(replay: Replay, site: int, x: torch.Tensor, left: Left) -> torch.Tensor:
    weights = replay.layout.activities[site].site.weights
    found = weights.encode_features(x.to(weights.W_enc.dtype), left.features)
    return (found * left.kept.to(found)).to(replay.record.dtype)


def _rebuilt(
    replay: Replay,
    site: int,
    left: Sequence[Left],
    acts: dict[int, torch.Tensor],
    inputs: dict[int, torch.Tensor],
) -> Callable[..., torch.Tensor]:
    own = replay.layout.activities[site]
    weights = own.site.weights

    def hook_fn(y: torch.Tensor, hook: Any) -> torch.Tensor:
        flat = y.flatten(2)
        out = weights.bias(inputs[site].to(weights.W_enc.dtype)).to(replay.record.dtype)
        out = out + left[site].errors[..., None] * own.rest
        for index in replay.layout.heard(site):
            place = replay.layout.activities[index].site.place
            W_dec = own.site.hooked.decoder_from(place).detach()
            out = out + acts[index] @ W_dec[left[index].features].to(out)
        return torch.where(own.keep[:, None], out.to(flat), flat).reshape(y.shape)

    return hook_fn
