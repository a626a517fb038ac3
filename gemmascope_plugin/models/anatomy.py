"""The weights that circuits are made of, in one vocabulary for both model classes and every folding.

1. ``W_Q [head, d_model, d_head]``, ``W_K`` and ``W_V`` per key-value head (``HookedTransformer`` shows
   them repeated for every query head), ``W_O [head, d_head, d_model]``.
2. Norms as functions, see ``Norm``: the gain is ``w`` on one class and ``1 + w`` on the other, and
   gone where folding took it into the weights after it.
3. What attention writes is ``ln1_post(a)`` with ``a = sum_h z_h W_O[h] + b_O`` where a block has a
   norm after attention, as Gemma 2 and 3 do, else ``a`` itself.
4. Weights of a layer come in at least float32 (``models/protocol.py``), so that whoever multiplies
   with them adds up in it; the unembedding is too large for that and comes as it is.
5. ``HeadScores`` is one head's way to attention scores. For a query at ``i`` and a key at ``j`` it is

       score = cap(<R_i norm_q(W_Q x_i + b_Q), R_j norm_k(W_K x_j + b_K)> / scale)

   where ``x`` is the output of the norm before attention. Gemma 2 has the cap ``c * tanh(s / c)``,
   Gemma 3 norms of queries and keys instead. ``R_p`` is the rotary embedding, whose base differs
   between the local and global layers of Gemma 3. It is measured: what the model's own rotary
   embedding makes of unit vectors. The bridge is given sines and cosines, which are those of the
   prompt's pass. The scale is the one that the layer multiplies or divides by: the bridge's
   configuration has none.

Reading costs nothing in a float32 model: views of the model's own tensors, on the model's device. In
half precision it costs a copy of that weight of that layer. A rotation has ``d_head^2`` numbers a
position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float

from gemmascope_plugin.errors import ModelError
from gemmascope_plugin.models.points import Norm, hook_points, norm_of
from gemmascope_plugin.models.protocol import HookedModel, wide
from gemmascope_plugin.models.unembed import Unembedding, soft_cap, unembedding

NormName = Literal["ln1", "ln1_post", "ln2", "ln2_post"]


@dataclass(frozen=True)
class MlpInput:
    """A hook that only the MLP sees.

    ``TransformerBridge`` has one before the norm, where ``HookedTransformer`` has a copy only behind a
    switch; that has one behind the norm's division, where the bridge warns of edits.
    """

    hook: str
    norm: Norm | None
    """What lies between the stream and the hook; None for nothing."""

    def value(
        self, x: Float[torch.Tensor, "*axes d_model"]
    ) -> Float[torch.Tensor, "*axes d_model"]:
        """What stands at the hook if the MLP reads the stream ``x``."""
        return x if self.norm is None else self.norm(x)

    def pulled(
        self,
        x: Float[torch.Tensor, "*axes d_model"],
        gradient: Float[torch.Tensor, "*axes d_model"],
    ) -> Float[torch.Tensor, "*axes d_model"]:
        """The gradient at the stream ``x``, from the one at the hook."""
        return gradient if self.norm is None else self.norm.vjp(x, gradient)


@dataclass(frozen=True)
class Anatomy:
    """Sizes and weights of a model with RMS norms whose MLP follows its attention."""

    model: HookedModel
    is_wide: bool = True
    """Whether weights come in at least float32; else in the model's own type, to do as the model does."""

    def __post_init__(self) -> None:
        block = self.model.blocks[0]
        if getattr(self.model.cfg, "parallel_attn_mlp", False):
            raise ModelError(
                "Attention and MLP of this model read the same tensor", fix="a Gemma model"
            )
        if not hasattr(block, "ln2") or getattr(block.ln1, "b", None) is not None:
            raise ModelError("The blocks of this model have no RMS norms", fix="a Gemma model")

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return int(self.model.cfg.n_layers)

    @property
    def n_heads(self) -> int:
        """Query heads of a layer."""
        return int(self.model.cfg.n_heads)

    @property
    def n_kv(self) -> int:
        """Key-value heads of a layer."""
        return int(getattr(self.model.cfg, "n_key_value_heads", None) or self.n_heads)

    @property
    def group(self) -> int:
        """Query heads that share a key-value head: query head ``h`` reads ``h // group``."""
        return self.n_heads // self.n_kv

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.model.cfg.d_model)

    @property
    def d_head(self) -> int:
        """Width of a head."""
        return int(self.model.cfg.d_head)

    @property
    def soft_cap(self) -> float | None:
        """The final soft-cap of the logits; None without one."""
        return soft_cap(self.model)

    def W_Q(self, layer: int) -> Float[torch.Tensor, "head d_model d_head"]:
        """Query weights."""
        return self._typed(self._attn(layer).W_Q.detach())

    def W_K(self, layer: int) -> Float[torch.Tensor, "kv d_model d_head"]:
        """Key weights, one per key-value head."""
        return self._per_kv(layer, "W_K")

    def W_V(self, layer: int) -> Float[torch.Tensor, "kv d_model d_head"]:
        """Value weights, one per key-value head."""
        return self._per_kv(layer, "W_V")

    def W_O(self, layer: int) -> Float[torch.Tensor, "head d_head d_model"]:
        """Output weights."""
        return self._typed(self._attn(layer).W_O.detach())

    def head_sum(
        self, layer: int, z: Float[torch.Tensor, "*axes head d_head"]
    ) -> Float[torch.Tensor, "*axes d_model"]:
        """``a``: what all heads of a layer write before the post-norm, bias included."""
        bias = getattr(self._attn(layer), "b_O", None)
        out = self._typed(z).flatten(-2) @ self.W_O(layer).flatten(0, 1)
        return out if bias is None else out + self._typed(bias.detach())

    def head_results(
        self, layer: int, z: Float[torch.Tensor, "*axes head d_head"]
    ) -> Float[torch.Tensor, "*axes head d_model"]:
        """What each head writes before the post-norm."""
        return torch.einsum("...hd,hdm->...hm", self._typed(z), self.W_O(layer))

    def norm(self, layer: int, name: NormName) -> Norm | None:
        """A norm of a block; None where the block has no such norm."""
        module = getattr(self.model.blocks[layer], name, None)
        return None if module is None else norm_of(self.model, module)

    def head_norm(self, layer: int, name: Literal["q_norm", "k_norm"]) -> Norm | None:
        """The norm of a layer's queries or keys, as Gemma 3 has them; None without one."""
        module = getattr(self._attn(layer), name, None)
        return None if module is None else norm_of(self.model, module)

    def mlp_input(self, layer: int) -> MlpInput:
        """Where the input of an MLP alone, not the stream beside it, is read, changed, differentiated."""
        ln2 = self.norm(layer, "ln2")
        assert ln2 is not None, "models without it are refused"
        before = f"blocks.{layer}.ln2.hook_in"
        if self._has_input_hooks:
            return MlpInput(before, None)
        return MlpInput(f"blocks.{layer}.ln2.hook_normalized", Norm(None, ln2.eps))

    @cached_property
    def _has_input_hooks(self) -> bool:
        return "blocks.0.ln2.hook_in" in hook_points(self.model)

    @property
    def ln_final(self) -> Norm:
        """The norm before the unembedding."""
        return norm_of(self.model, self.model.ln_final)  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def W_U(self) -> Float[torch.Tensor, "d_model d_vocab"]:
        """The unembedding, in the model's own type."""
        return self.model.W_U.detach()  # pyright: ignore[reportAttributeAccessIssue]

    def unembedding(self, *, before_cap: bool = False) -> Unembedding:
        """From the end of the stream to logits, with or without the soft-cap."""
        return unembedding(self.model, before_cap=before_cap)

    def _attn(self, layer: int) -> Any:
        return self.model.blocks[layer].attn

    def _per_kv(self, layer: int, name: str) -> Float[torch.Tensor, "kv d_model d_head"]:
        attn = self._attn(layer)
        # HookedTransformer holds one per key-value head, and repeats it for each head that asks
        weight = getattr(attn, f"_{name}", None)
        weight = (getattr(attn, name) if weight is None else weight).detach()
        return self._typed(weight[:: len(weight) // self.n_kv])

    def _typed(self, x: torch.Tensor) -> torch.Tensor:
        return wide(x) if self.is_wide else x


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
