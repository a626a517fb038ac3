"""What lies between the stream and the attention scores of one head, on both model classes.

For a query at ``i`` and a key at ``j`` a Gemma computes

    score = cap(<R_i norm_q(W_Q x_i + b_Q), R_j norm_k(W_K x_j + b_K)> / scale)

where ``x`` is the output of the norm before attention. Gemma 2 has the cap ``c * tanh(s / c)``, Gemma 3
norms of queries and keys instead. ``R_p`` is the rotary embedding, whose base differs between the local
and global layers of Gemma 3.

1. ``R_p`` is measured: what the model's own rotary embedding makes of unit vectors. The bridge is given
   sines and cosines, which are those of the prompt's pass.
2. The scale is the one that the layer multiplies or divides by: the bridge's configuration has none.

Cost: ``d_head^2`` numbers a position that is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float

from gemmascope_plugin.models.anatomy import Anatomy
from gemmascope_plugin.models.points import Norm, hook_points


@dataclass(frozen=True, eq=False)
class Projection:
    """How queries or keys come from the output of the norm before attention, but for the rotation."""

    weight: Float[torch.Tensor, "d_model d_head"]
    bias: Float[torch.Tensor, " d_head"] | None
    norm: Norm | None


class HeadScores:
    """One query head's way to scores."""

    def __init__(self, anatomy: Anatomy, layer: int, head: int) -> None:
        self._anatomy, self._layer = anatomy, layer
        self._attn: Any = anatomy.model.blocks[layer].attn
        self._prefix = f"blocks.{layer}.attn"
        kv = head // anatomy.group
        self.query = self._projection("Q", anatomy.W_Q(layer)[head], head)
        """How its queries are made."""
        self.key = self._projection("K", anatomy.W_K(layer)[kv], kv)
        """How the keys that it shares with its group are made."""

    @property
    def scores_hook(self) -> str:
        """The hook of scores, ``[batch, head, query, key]``, capped and masked."""
        return f"{self._prefix}.hook_attn_scores"

    @property
    def rotary_hooks(self) -> tuple[str, ...]:
        """Hooks of what :meth:`rotation` must be given."""
        names = (f"{self._prefix}.hook_cos", f"{self._prefix}.hook_sin")
        return names if names[0] in hook_points(self._anatomy.model) else ()

    @property
    def scale(self) -> float:
        """What products of queries and keys are divided by."""
        inner = getattr(self._attn, "original_component", None)
        return float(self._attn.attn_scale) if inner is None else 1 / float(inner.scaling)

    def capped(self, scores: Float[torch.Tensor, "*axes"]) -> Float[torch.Tensor, "*axes"]:
        """Scores after the soft-cap, where there is one."""
        cap = getattr(self._anatomy.model.cfg, "attn_scores_soft_cap", None)
        return scores if cap is None or cap <= 0 else cap * torch.tanh(scores / cap)

    def rotation(
        self, positions: Sequence[int], acts: Mapping[str, torch.Tensor]
    ) -> Float[torch.Tensor, "some d_head d_head"]:
        """``R_p`` of some positions, for products from the left; ``acts`` are of ``rotary_hooks``."""
        d_head = self._anatomy.d_head
        if not self.rotary_hooks:
            unit = torch.eye(d_head).to(self._attn.rotary_cos)[None, None]
            turned = [self._attn.apply_rotary(unit, at)[0, 0].T for at in positions]
            return torch.stack(turned)
        from transformers.models.gemma2.modeling_gemma2 import apply_rotary_pos_emb

        cos, sin = (acts[name][:1, list(positions)] for name in self.rotary_hooks)
        unit = torch.eye(d_head).to(cos)[None, :, None].expand(1, -1, len(positions), -1)
        turned, _ = apply_rotary_pos_emb(unit, unit, cos, sin)
        return turned[0].permute(1, 2, 0)

    def _projection(
        self, name: Literal["Q", "K"], weight: Float[torch.Tensor, "d_model d_head"], head: int
    ) -> Projection:
        bias = getattr(self._attn, f"b_{name}", None)
        if bias is not None:
            rows = bias.detach().reshape(-1, self._anatomy.d_head)
            # keys have a row a query head on one class, a row a key-value head on the other
            n_heads = self._anatomy.n_heads if name == "Q" else self._anatomy.n_kv
            bias = rows[head * len(rows) // n_heads]
        norm = self._anatomy.head_norm(self._layer, "q_norm" if name == "Q" else "k_norm")
        return Projection(weight, bias, norm)
