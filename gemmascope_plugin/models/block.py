"""One block of a Gemma as a function of its weights, on any run of positions behind other ones.

1. ``a = W_O softmax(cap(q k / scale) + mask) v`` with ``q, k, v`` of ``ln1(x)``, normed where the block
   norms queries and keys, and rotated; then ``x + ln1_post(a)``, and ``x + ln2_post(mlp(ln2(x)))`` with a
   gated MLP.
2. Rows have positions from ``start`` on. Keys and values before it are those of another pass.
3. At named points, those of the hooks, functions may look or put something else there. A point whose
   value is known is not computed anew (``values``).
4. In the last block only the asked position is needed: it is cut out behind the last used point.

Sums of norms and softmax are taken in float32. Cost: the matrix products of the positions that are run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int

from gemmascope_plugin.models.anatomy import Anatomy, HeadScores, NormName
from gemmascope_plugin.models.points import Norm
from gemmascope_plugin.models.replay_points import (
    AFTER_MID,
    AFTER_Z,
    QUERIES,
    Earlier,
    Points,
    Rows,
    cut_out,
)

_GELU = ("gelu_pytorch_tanh", "gelu_new")
_SLOPE, _CUBE = 2 * math.sqrt(2 / math.pi), 0.044715
_FUSED, _CACHED = (torch.float32, torch.float64), 2**16
"""Types, and numbers at a time that stay in a core's cache."""


class Block:
    """The functions of one layer; ``turns`` are cosines and sines of the rotary embedding."""

    def __init__(
        self, anatomy: Anatomy, layer: int, turns: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        self._anatomy, self._layer, self._turns = anatomy, layer, turns
        block: Any = anatomy.model.blocks[layer]
        self._attn, self._mlp = block.attn, block.mlp
        self._name = f"blocks.{layer}."
        scores = HeadScores(anatomy, layer, 0)
        self._scale, self._capped = scores.scale, scores.capped
        self.window = window_of(anatomy, layer)
        names: tuple[NormName, ...] = ("ln1", "ln1_post", "ln2", "ln2_post")
        self._norms = {name: anatomy.norm(layer, name) for name in names}
        self._head_norms = {
            "q": anatomy.head_norm(layer, "q_norm"),
            "k": anatomy.head_norm(layer, "k_norm"),
        }
        self._act = _activation(anatomy, self._mlp)
        self._is_gelu = str(getattr(anatomy.model.cfg, "act_fn", "")) in _GELU

    def stays_in_attention(self, points: Points) -> bool:
        """Whether nothing happens in this block behind the stream between attention and MLP."""
        return not points.any_of(self._name, AFTER_MID[1:])

    def attention(
        self,
        x: Float[torch.Tensor, "row pos d_model"],
        rows: Rows,
        earlier: Earlier | None,
        points: Points,
        values: Mapping[str, torch.Tensor],
        made: list[Earlier] | None = None,
    ) -> Float[torch.Tensor, "row some d_model"]:
        """The stream between attention and MLP, from the one before the block at these rows.

        ``earlier`` are keys and values before them, and ``made`` takes those that are made here.
        ``values`` are those of points that need not be computed.
        """
        name = self._name
        x = points(f"{name}hook_resid_pre", x)
        late = (*AFTER_Z, *AFTER_MID)
        cut = rows.asked is not None and not points.any_of(name, late)
        wrote = values.get(f"{name}hook_attn_out")
        if wrote is None:
            z = values.get(f"{name}attn.hook_z")
            if z is None:
                early = cut and not points.any_of(name, QUERIES)
                z = self._attended(x, rows, earlier, points, early, made)
            z = points(f"{name}attn.hook_z", z)
            if cut:
                x, z = cut_out(x, rows), cut_out(z, rows)
            wrote = self._normed("ln1_post", self._joined(z), points)
        wrote = points(f"{name}hook_attn_out", wrote)
        x = points(f"{name}hook_resid_mid", x + wrote)
        return x

    def mlp(
        self,
        x: Float[torch.Tensor, "row pos d_model"],
        rows: Rows,
        points: Points,
        values: Mapping[str, torch.Tensor],
    ) -> Float[torch.Tensor, "row some d_model"]:
        """The stream after the block, from the one between attention and MLP."""
        name = self._name
        cut = rows.asked is not None and not points.any_of(name, AFTER_MID[1:])
        wrote, post = values.get(f"{name}hook_mlp_out"), values.get(f"{name}mlp.hook_post")
        if cut:
            x = cut_out(x, rows)
            wrote, post = (None if y is None else cut_out(y, rows) for y in (wrote, post))
        if wrote is None:
            if post is None:
                post = self._gated(x, points)
            post = points(f"{name}mlp.hook_post", post)
            wrote = self._normed("ln2_post", self._project(post, "out"), points)
        wrote = points(f"{name}hook_mlp_out", wrote)
        return points(f"{name}hook_resid_post", x + wrote)

    def _attended(
        self,
        x: torch.Tensor,
        rows: Rows,
        earlier: Earlier | None,
        points: Points,
        cut: bool,
        made: list[Earlier] | None,
    ) -> Float[torch.Tensor, "row pos head d_head"]:
        normed = self._normed("ln1", x, points)
        k, v = (self._heads(normed, port, points) for port in ("k", "v"))
        q = self._heads(cut_out(normed, rows) if cut else normed, "q", points)
        n_pos = x.shape[1]
        at = torch.arange(rows.start, rows.start + n_pos, device=x.device)
        ask = at.expand(len(x), -1)
        if cut and q.shape[1] < n_pos:
            assert rows.asked is not None
            ask = rows.asked[:, None] + rows.start
        q = self._turned(self._head_normed("q", q), ask)
        k = self._turned(self._head_normed("k", k), at[None]).transpose(1, 2)
        v = v.transpose(1, 2)
        if made is not None:
            made.append(Earlier(k.detach(), v.detach()))
        if rows.start:
            assert earlier is not None, "positions start behind others"
            keys, values = earlier.before(rows.start, len(x))
            k, v = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        group = q.shape[2] // k.shape[1]
        # the heads of a group are further queries of one key-value head, position after position: with a
        # single one of these, as in small Gemmas, nothing is copied
        q = q.unflatten(2, (-1, group)).transpose(1, 2).flatten(2, 3)
        scores = self._capped((q @ k.transpose(2, 3)).unflatten(2, (-1, group)) / self._scale)
        mask = self._mask(ask, k.shape[2])[:, None, :, None]
        pattern = scores.masked_fill(~mask, -torch.inf).softmax(-1, dtype=_wide(scores.dtype))
        pattern = self._shown(pattern.to(v.dtype), points)
        z = pattern.flatten(2, 3) @ v
        return z.unflatten(2, (-1, group)).transpose(1, 2).flatten(2, 3)

    def _shown(
        self, pattern: Float[torch.Tensor, "row kv pos group key"], points: Points
    ) -> Float[torch.Tensor, "row kv pos group key"]:
        """The attention pattern behind its point, where heads are one axis."""
        name = f"{self._name}attn.hook_pattern"
        if name not in points:
            return pattern
        by_head = points(name, pattern.transpose(2, 3).flatten(1, 2))
        return by_head.unflatten(1, (pattern.shape[1], -1)).transpose(2, 3).to(pattern.dtype)

    def _mask(
        self, ask: Int[torch.Tensor, "row pos"], n_keys: int
    ) -> Bool[torch.Tensor, "some pos key"]:
        """Which keys each query sees."""
        ask = ask[:1] if ask.stride(0) == 0 else ask
        keys = torch.arange(n_keys, device=ask.device)
        seen = keys <= ask[..., None]
        return seen if self.window is None else seen & (keys > ask[..., None] - self.window)

    def _heads(self, normed: torch.Tensor, port: str, points: Points) -> torch.Tensor:
        """Queries, keys or values before norm and rotation."""
        attn, heads = self._attn, self._anatomy.n_heads if port == "q" else self._anatomy.n_kv
        weight = getattr(attn, f"_W_{port.upper()}", None)  # not repeated for every query head
        weight = (getattr(attn, f"W_{port.upper()}") if weight is None else weight).detach()
        matrix = weight[:: len(weight) // heads].permute(1, 0, 2).flatten(1)
        out = (normed @ matrix).unflatten(-1, (heads, -1))
        bias = _bias(attn, port.upper())
        if bias is not None:
            rows = bias.reshape(-1, self._anatomy.d_head)
            out = out + rows[:: len(rows) // heads]
        return points(f"{self._name}attn.hook_{port}", out)

    def _joined(self, z: torch.Tensor) -> torch.Tensor:
        """What all heads write before the norm, in the stream's type."""
        out = z.flatten(-2) @ self._attn.W_O.detach().flatten(0, 1)
        bias = _bias(self._attn, "O")
        return out if bias is None else out + bias

    def _head_normed(self, port: str, x: torch.Tensor) -> torch.Tensor:
        norm = self._head_norms[port]
        return x if norm is None else _divided(norm, x)

    def _turned(
        self, x: Float[torch.Tensor, "row pos head d_head"], at: Int[torch.Tensor, "some pos"]
    ) -> Float[torch.Tensor, "row pos head d_head"]:
        """The rotary embedding at positions."""
        at = at[:1] if at.stride(0) == 0 else at
        cos, sin = (turn[at][:, :, None].to(x.dtype) for turn in self._turns)
        half = x.shape[-1] // 2
        out = x * cos
        out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
        out[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return out

    def _gated(self, x: torch.Tensor, points: Points) -> torch.Tensor:
        name = self._name
        x = self._normed("ln2", points(f"{name}ln2.hook_in", x), points)
        gate = points(f"{name}mlp.hook_pre", self._project(x, "gate"))
        linear = points(f"{name}mlp.hook_pre_linear", self._project(x, "in"))
        if torch.is_grad_enabled() or not self._is_gelu or gate.dtype not in _FUSED:
            post = self._act(gate) * linear
        else:
            post = gelu_times(gate, linear)
        bias = _bias(self._mlp, "in") if hasattr(self._mlp, "hook_mid") else None
        return post if bias is None else post + bias

    def _project(self, x: torch.Tensor, which: str) -> torch.Tensor:
        """A matrix of the MLP, as the class has it."""
        inner = getattr(self._mlp, "original_component", None)
        if inner is None:
            out = x @ getattr(self._mlp, f"W_{which}").detach()
            bias = _bias(self._mlp, "out") if which == "out" else None
            return out if bias is None else out + bias
        if getattr(self._mlp, "_use_processed_weights", False):
            weight, bias = (getattr(self._mlp, f"_processed_{p}_{which}") for p in "Wb")
        else:
            linear = getattr(
                inner, {"gate": "gate_proj", "in": "up_proj", "out": "down_proj"}[which]
            )
            weight, bias = linear.weight, linear.bias
        bias = None if bias is None else bias.detach()
        return torch.nn.functional.linear(x, weight.detach(), bias)

    def _normed(self, which: NormName, x: torch.Tensor, points: Points) -> torch.Tensor:
        norm = self._norms[which]
        return x if norm is None else normed(norm, x, points, f"{self._name}{which}")


def normed(
    norm: Norm, x: Float[torch.Tensor, "*axes d_model"], points: Points, name: str
) -> Float[torch.Tensor, "*axes d_model"]:
    """A norm with its points."""
    scale, divided = f"{name}.hook_scale", f"{name}.hook_normalized"
    if scale not in points and divided not in points:
        return _divided(norm, x)
    y = points(divided, x.to(_wide(x.dtype)) / points(scale, norm.scale(x)))
    return (y if norm.gain is None else y * norm.gain.to(y)).to(x.dtype)


def _divided(norm: Norm, x: torch.Tensor) -> torch.Tensor:
    """The norm, in few passes over memory."""
    wide = x.to(_wide(x.dtype))
    mean = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square() / x.shape[-1]
    y = wide * (mean + norm.eps).rsqrt()
    return (y if norm.gain is None else y.mul_(norm.gain.to(y))).to(x.dtype)


def gelu_times(
    gate: Float[torch.Tensor, "*axes d_mlp"], linear: Float[torch.Tensor, "*axes d_mlp"]
) -> Float[torch.Tensor, "*axes d_mlp"]:
    """``gelu(gate) * linear`` with the approximation by tanh, without gradients.

    ``0.5 (1 + tanh(u / 2)) = sigmoid(u)``, in few steps over numbers that stay in the cache: torch's own
    function takes five times as long where many numbers are large, as they are in Gemma's MLPs.
    """
    gates, linears = gate.flatten(), linear.flatten()
    out, slope = torch.empty_like(gates), gate.new_tensor(_SLOPE)
    for g, x, y in zip(*(t.split(_CACHED) for t in (gates, linears, out)), strict=True):
        torch.addcmul(slope, g, g, value=_SLOPE * _CUBE, out=y)
        y.mul_(g).sigmoid_().mul_(g).mul_(x)
    return out.view(gate.shape)


def window_of(anatomy: Anatomy, layer: int) -> int | None:
    """How many tokens a layer's queries look back, themselves counted; None for all."""
    attn: Any = anatomy.model.blocks[layer].attn
    inner = getattr(attn, "original_component", None)
    if inner is not None:
        return getattr(inner, "sliding_window", None)
    local = getattr(attn, "attn_type", "global") == "local"
    return int(anatomy.model.cfg.window_size) if local else None


def _activation(anatomy: Anatomy, mlp: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    if str(getattr(anatomy.model.cfg, "act_fn", "")) in _GELU:  # one formula, here in one step
        return lambda x: torch.nn.functional.gelu(x, approximate="tanh")
    inner = getattr(mlp, "original_component", None)
    return mlp.act_fn if inner is None else inner.act_fn


def _bias(module: object, name: str) -> torch.Tensor | None:
    bias = getattr(module, f"b_{name}", None)
    return None if bias is None else bias.detach()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32
