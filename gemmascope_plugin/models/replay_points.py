"""Where a replayed pass starts, its named points, its positions, and the keys and values before them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int

from gemmascope_plugin.types import Hooks

QUERIES = ("attn.hook_q", "attn.hook_pattern", "attn.hook_z")
AFTER_Z = ("ln1_post.hook_scale", "ln1_post.hook_normalized", "hook_attn_out")
AFTER_MID = (
    *("hook_resid_mid", "ln2.hook_in", "ln2.hook_scale", "ln2.hook_normalized"),
    *("mlp.hook_pre", "mlp.hook_pre_linear", "mlp.hook_post"),
    *("ln2_post.hook_scale", "ln2_post.hook_normalized", "hook_mlp_out", "hook_resid_post"),
)
_BEFORE = ("hook_resid_pre", "ln1.hook_scale", "ln1.hook_normalized", "attn.hook_k", "attn.hook_v")
POINTS = frozenset((*_BEFORE, *QUERIES, *AFTER_Z, *AFTER_MID))
"""Points of a block, as hooks are called behind ``blocks.L.``."""

Stage = Literal["pre", "mid", "post"]
"""Where in a layer: at its beginning, between attention and MLP, or behind it."""


@dataclass(frozen=True, eq=False)
class Entry:
    """Where copies of the prompts start, and what happens on the way."""

    layer: int
    """The first that runs; ``n_layers`` for the final norm."""
    stage: Stage = "pre"
    """Behind a layer (``"post"``) only its last point is passed."""
    copies: int = 1
    hooks: Hooks = ()
    """With tensors ``[row, some, ...]`` of the positions that run."""
    values: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Values at points that need not be computed."""
    stream: Float[torch.Tensor, "row some d_model"] | None = None
    """Where to start instead of the recorded stream."""


class Points:
    """What happens at named points of a pass; None from a function leaves the tensor as it is."""

    def __init__(self, hooks: Hooks = ()) -> None:
        self._functions: dict[str, list[Callable[..., Any]]] = {}
        for name, fn in hooks:
            self._functions.setdefault(name, []).append(fn)

    def __contains__(self, name: str) -> bool:
        return name in self._functions

    def __call__(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """The tensor that goes on from here."""
        for fn in self._functions.get(name, ()):
            changed = fn(x, hook=SimpleNamespace(name=name))
            x = x if changed is None else changed
        return x

    def any_of(self, prefix: str, names: Iterable[str]) -> bool:
        """Whether something happens at one of these points of a block."""
        return any(prefix + name in self._functions for name in names)


@dataclass(frozen=True, eq=False)
class Earlier:
    """Keys (rotated) and values of one layer in another pass over the same prompts."""

    keys: Float[torch.Tensor, "prompt kv pos d_head"]
    values: Float[torch.Tensor, "prompt kv pos d_head"]

    def before(self, start: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Those before a position, one per row: rows are copies of the prompts, copy after copy."""
        copies = rows // len(self.keys)
        keys, values = (x[:, :, :start].repeat(copies, 1, 1, 1) for x in (self.keys, self.values))
        return keys, values


@dataclass(frozen=True, eq=False)
class Rows:
    """Which positions the rows of a pass have."""

    start: int
    """Position of the first."""
    asked: Int[torch.Tensor, " row"] | None = None
    """The only one that is needed behind the last block, counted from ``start``."""


def cut_out(x: Float[torch.Tensor, "row pos *axes"], rows: Rows) -> torch.Tensor:
    """The asked position of each row, the only one from there on."""
    if rows.asked is None or x.shape[1] == 1:
        return x
    return x[torch.arange(len(x), device=x.device), rows.asked][:, None]


OUTSIDE = ("hook_embed", "ln_final.hook_scale", "ln_final.hook_normalized")


def replayable(names: Iterable[str]) -> bool:
    """Whether all of these hooks are points of a replay."""
    return all(name in OUTSIDE or _is_point(name) for name in names)


def _is_point(name: str) -> bool:
    parts = name.split(".", 2)
    return len(parts) == 3 and parts[0] == "blocks" and parts[2] in POINTS
