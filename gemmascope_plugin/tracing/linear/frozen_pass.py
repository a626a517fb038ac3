"""One forward pass over one prompt, with what makes the residual stream linear held fixed.

With attention patterns and the scales of all norms frozen, and every MLP replaced by what its dictionary
writes, the stream is a linear function of everything that is written into it (Dunefsky et al., arXiv
2406.11944; Ameisen et al., "Circuit Tracing", 2025).  For layer ``l``, with ``s`` a norm's scale at a
position and ``w`` its gain:

1. attention reads ``w_1 x / s_1``, mixes positions by ``pattern[head, q, k]``, and writes
   ``w_1p (sum_h z_h W_O[h]) / s_1p``;
2. a transcoder reads ``x / s_2``, times the gain where it was trained with it;
3. the logits before their soft-cap read ``w_f x / s_f``.

The gains are folded into the weights and the scales into the pattern once: ``attention`` then is three
products. Query and key norms of Gemma 3, rotary embedding, soft-cap and sliding window are inside the
pattern.

Cost: one forward pass; ``layer * head * pos * pos`` numbers of patterns are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int

from gemmascope_plugin.arguments import human_size
from gemmascope_plugin.errors import GemmaScopeError
from gemmascope_plugin.models.anatomy import Anatomy
from gemmascope_plugin.models.points import Norm, flatten_heads, reading
from gemmascope_plugin.models.prompts import PromptLike, one_prompt
from gemmascope_plugin.models.protocol import HookedModel, check_all
from gemmascope_plugin.models.record import record

QUERIES = 64
"""Queries that are mixed at a time."""


@dataclass(frozen=True, eq=False)
class FrozenAttention:
    """Attention of one layer as a linear map of the stream, as its transpose needs it."""

    W_O: Float[torch.Tensor, "head d_model d_head"]
    """Output weights of every head with the post-norm's gain, transposed."""
    W_V: Float[torch.Tensor, "kv d_head d_model"]
    """Value weights with the gain of the norm before attention, transposed."""
    mix: Float[torch.Tensor, "kv key groupquery"]
    """``pattern[h, q, k] / (s_1p[q] s_1[k])``; the last axis is heads of the group, then ``q``."""
    bias_O: Float[torch.Tensor, " d_model"] | None
    """What ``b_O`` writes, before the scale of the post-norm; None for nothing, as in every Gemma."""
    bias_V: Float[torch.Tensor, " d_model"] | None
    """What the value biases write through all heads, likewise: every row of a pattern sums to one."""
    post: Float[torch.Tensor, " pos"]
    """``1 / s_1p``."""

    @property
    def group(self) -> int:
        """Query heads of a key-value head."""
        return len(self.W_O) // len(self.W_V)

    @cached_property
    def first_keys(self) -> list[int]:
        """The first key that any of some queries looks at, of every ``QUERIES`` of them: not the first
        token where attention is local.
        """
        looks = (self.mix != 0).any(0).unflatten(-1, (self.group, -1)).any(1)
        return [int(part.any(1).int().argmax()) for part in looks.split(QUERIES, 1)]

    def tokens_through(
        self, embed: Float[torch.Tensor, "key d_model"]
    ) -> Float[torch.Tensor, "query key d_model"]:
        """What each token's embedding becomes at every later token, through the first attention, which
        has no biases, and beside it.
        """
        n_pos, kv = len(embed), len(self.W_V)
        values = torch.einsum("km,gdm->gkd", embed, self.W_V)
        mix = self.mix.view(kv, n_pos, self.group, n_pos)
        W_O = self.W_O.unflatten(0, (kv, -1))
        out = embed.new_zeros(n_pos, n_pos, embed.shape[1])
        for group in range(kv):
            for head in range(self.group):
                written = values[group] @ W_O[group, head].T
                out += mix[group, :, head].T[:, :, None] * written
        tokens = torch.arange(n_pos, device=embed.device)
        out[tokens, tokens] += embed
        return out


@dataclass(frozen=True, eq=False)
class FrozenPass:
    """What one prompt leaves behind."""

    model: HookedModel
    anatomy: Anatomy
    tokens: Int[torch.Tensor, " pos"]
    acts: dict[str, torch.Tensor]
    """Activations by hook, heads flattened, without the batch axis."""

    @classmethod
    def of(
        cls,
        model: HookedModel,
        prompt: PromptLike,
        hooks: Sequence[str],
        budget: int,
    ) -> FrozenPass:
        """Runs the model and keeps ``hooks`` too; ``budget`` is bytes that patterns may take."""
        tokens = one_prompt(model, prompt, "trace each prompt, then union(graphs)")
        anatomy = Anatomy(model)
        _check_patterns(anatomy, tokens.shape[1], budget)
        names = [*_needed(anatomy.n_layers), *hooks]
        acts = record(model, tokens, names)
        check_all(acts, "the prompt's pass", model)
        flat = {name: x if "pattern" in name else flatten_heads(x) for name, x in acts.items()}
        return cls(model, anatomy, tokens[0], {name: x[0] for name, x in flat.items()})

    @property
    def n_layers(self) -> int:
        """Layers of the model."""
        return self.anatomy.n_layers

    @property
    def n_pos(self) -> int:
        """Tokens of the prompt."""
        return len(self.tokens)

    @property
    def dtype(self) -> torch.dtype:
        """Type of all sums: float32, or float64 for models in it."""
        return torch.promote_types(self.acts["hook_embed"].dtype, torch.float32)

    @cached_property
    def embed(self) -> Float[torch.Tensor, "pos d_model"]:
        """What the tokens write."""
        return self.acts["hook_embed"].to(self.dtype)

    def tensor(self, name: str) -> Float[torch.Tensor, "pos width"]:
        """A site's tensor, heads flattened, by the name that dictionaries use."""
        how = reading(self.model, name)
        return how(self.acts[how.hook])

    def stream(self, layer: int) -> Float[torch.Tensor, "pos d_model"]:
        """The residual stream before a layer; after the last one for ``n_layers``."""
        last = layer == self.n_layers
        name = f"blocks.{layer - 1}.hook_resid_post" if last else f"blocks.{layer}.hook_resid_pre"
        return self.acts[name].to(self.dtype)

    def final_scale(self) -> Float[torch.Tensor, " pos"]:
        """What the last norm divides by."""
        return self.anatomy.ln_final.scale(self.stream(self.n_layers))[:, 0]

    def mlp_scale(self, layer: int) -> Float[torch.Tensor, " pos"]:
        """What the norm before an MLP divides by."""
        norm = self.anatomy.norm(layer, "ln2")
        assert norm is not None, "models without it are refused"
        return norm.scale(self.acts[f"blocks.{layer}.hook_resid_mid"].to(self.dtype))[:, 0]

    def attention(self, layer: int) -> FrozenAttention:
        """Attention of a layer, frozen; made when first asked for."""
        if layer not in self._attention:
            self._attention[layer] = self._frozen_attention(layer)
        return self._attention[layer]

    @cached_property
    def _attention(self) -> dict[int, FrozenAttention]:
        return {}

    def _frozen_attention(self, layer: int) -> FrozenAttention:
        anatomy, dtype = self.anatomy, self.dtype
        ln1, post = anatomy.norm(layer, "ln1"), anatomy.norm(layer, "ln1_post")
        assert ln1 is not None, "models without it are refused"
        attn: Any = self.model.blocks[layer].attn
        W_O = anatomy.W_O(layer).to(dtype)
        W_V = anatomy.W_V(layer).to(dtype)
        s_1 = ln1.scale(self.stream(layer))[:, 0]
        s_1p = torch.ones_like(s_1)
        if post is not None:
            s_1p = post.scale(self._head_sum(layer))[:, 0]
            W_O = W_O if post.gain is None else W_O * post.gain.to(W_O)
        if ln1.gain is not None:
            W_V = W_V * ln1.gain.to(W_V)[:, None]
        pattern = self.acts.pop(f"blocks.{layer}.attn.hook_pattern").to(dtype)
        mix = (pattern / s_1p[:, None] / s_1).unflatten(0, (anatomy.n_kv, -1))
        return FrozenAttention(
            W_O=W_O.transpose(1, 2).contiguous(),
            W_V=W_V.transpose(1, 2).contiguous(),
            mix=mix.permute(0, 3, 1, 2).flatten(2).contiguous(),
            bias_O=_bias_O(attn, post, dtype),
            bias_V=_bias_V(attn, W_O),
            post=1 / s_1p,
        )

    def _head_sum(self, layer: int) -> Float[torch.Tensor, "pos d_model"]:
        z = self.acts[f"blocks.{layer}.attn.hook_z"].to(self.dtype)
        return self.anatomy.head_sum(layer, z.unflatten(-1, (self.anatomy.n_heads, -1)))


def _needed(n_layers: int) -> list[str]:
    names = ["hook_embed", f"blocks.{n_layers - 1}.hook_resid_post"]
    for layer in range(n_layers):
        block = f"blocks.{layer}"
        names += [f"{block}.hook_resid_pre", f"{block}.hook_resid_mid"]
        names += [f"{block}.attn.hook_pattern", f"{block}.attn.hook_z"]
    return names


def _bias_O(attn: torch.nn.Module, post: Norm | None, dtype: torch.dtype) -> torch.Tensor | None:
    bias = _bias(attn, "b_O", dtype)
    if bias is None or post is None or post.gain is None:
        return bias
    return bias * post.gain.to(bias)


def _bias_V(
    attn: torch.nn.Module, W_O: Float[torch.Tensor, "head d_head d_model"]
) -> Float[torch.Tensor, " d_model"] | None:
    bias = _bias(attn, "b_V", W_O.dtype)
    if bias is None:
        return None
    heads = bias.reshape(-1, W_O.shape[1])  # one row a head, or one a key-value head
    return torch.einsum("hd,hdm->m", heads.repeat_interleave(len(W_O) // len(heads), 0), W_O)


def _bias(attn: torch.nn.Module, name: str, dtype: torch.dtype) -> torch.Tensor | None:
    bias = getattr(attn, name, None)
    if bias is None or not bool(bias.detach().any()):
        return None
    return bias.detach().to(dtype)


def _check_patterns(anatomy: Anatomy, n_pos: int, budget: int) -> None:
    need = 4 * anatomy.n_layers * anatomy.n_heads * n_pos * n_pos
    if need > budget:
        raise GemmaScopeError(
            f"The attention patterns of {n_pos} tokens take {human_size(need)}, the memory budget is "
            f"{human_size(budget)}",
            fix=f"memory_budget={3 * need:_} or more, or a shorter prompt",
        )
