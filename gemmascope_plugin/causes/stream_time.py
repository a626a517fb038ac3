"""When a hook's tensor has been added to the residual stream, counted in half layers.

The embedding comes at -1, the attention of layer ``L`` at ``2 L``, its MLP at ``2 L + 1``. The stream at
a hook has the number of what was added to it last, so it contains all that is not later.
"""

from __future__ import annotations

import re

from gemmascope_plugin.errors import ModelError

WRITTEN = (
    *("hook_embed", "attn.hook_z", "hook_attn_out", "hook_mlp_out"),
    *("hook_resid_pre", "hook_resid_mid", "hook_resid_post"),
)
"""Hooks of what is added to the stream, and of the stream itself."""

_HOOK = re.compile(r"blocks\.(\d+)\.(.+)")
_WITHIN = {
    "hook_resid_pre": -1,
    "attn.hook_z": 0,
    "hook_attn_out": 0,
    "hook_resid_mid": 0,
    "hook_mlp_out": 1,
    "hook_resid_post": 1,
}


def written(hook: str) -> int:
    """The half layer at which the tensor at a hook is complete and in the stream."""
    if hook == "hook_embed":
        return -1
    match = _HOOK.fullmatch(hook)
    if match is None or match[2] not in _WITHIN:
        raise ModelError(
            f"What is at {hook} is not added to the residual stream", exists=", ".join(WRITTEN)
        )
    return 2 * int(match[1]) + _WITHIN[match[2]]


def layer_of(hook: str) -> int:
    """The layer of a hook in a block."""
    return int(hook.split(".")[1])


def is_z(hook: str) -> bool:
    """Whether the tensor is that of the heads, before ``W_O`` and the norm after attention."""
    return hook.endswith(".attn.hook_z")


def is_stream(hook: str) -> bool:
    """Whether the tensor is the stream itself, all that was written so far."""
    return ".hook_resid_" in hook
