"""Holds everything that makes the stream of a run linear, and everything that dictionaries' sites write.

1. Attention patterns and the scales of all norms, the last one too, are as recorded: the logits are
   linear in the end of the stream, up to their soft-cap.
2. What an MLP writes is as recorded, plus what an affine skip makes of a change of its input.
3. The stream and ``z`` at sites of SAEs are as recorded, but at special tokens, where nothing is cut.

Cost: one forward pass to record.
"""

from __future__ import annotations

from typing import Any

import torch

from gemmascope_plugin.models.finite import wide
from gemmascope_plugin.models.points import hook_points, reading
from gemmascope_plugin.models.record import put, record
from gemmascope_plugin.tracing.traced_prompt import Hooks, Replay

_NORMS = ("ln1", "ln1_post", "ln2")
_LAST = "ln_final.hook_scale"


def held_hooks(replay: Replay) -> Hooks:
    """Hooks that hold a run to its record."""
    frozen, model = replay.record, replay.record.model
    points = hook_points(model)
    names = []
    for layer in range(frozen.n_layers):
        scales = [f"blocks.{layer}.{norm}.hook_scale" for norm in _NORMS]
        names += [f"blocks.{layer}.attn.hook_pattern", *(name for name in scales if name in points)]
    names.append(_LAST)
    held = record(model, frozen.tokens[None], names)
    hooks: Hooks = [(name, put(value)) for name, value in held.items()]
    for index in range(len(replay.layout.activities)):
        hooks += _site_hooks(replay, index)
    return hooks


def _site_hooks(replay: Replay, index: int) -> Hooks:
    own = replay.layout.activities[index]
    site, record = own.site, replay.record
    how = reading(record.model, site.hooked.hook_in)
    recorded, x_recorded = (record.tensor(n) for n in (site.hooked.hook_out, site.hooked.hook_in))
    moved: list[torch.Tensor] = []

    def look(x: torch.Tensor, hook: Any) -> None:
        moved[:] = [wide(how(x)) - wide(x_recorded)]

    def hold(y: torch.Tensor, hook: Any) -> torch.Tensor:
        flat = y.flatten(2)
        out = recorded[None]
        if site.skip is not None:
            out = out + moved[0] @ site.skip.detach().T.to(moved[0])
        if site.cuts:
            out = torch.where(own.keep[:, None], out, flat)
        return out.to(flat).reshape(y.shape)

    reads: Hooks = [] if site.skip is None else [(how.hook, look)]
    return [*reads, (replay.hook_of(site.hooked.hook_out), hold)]
