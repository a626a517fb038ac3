"""From the end of the residual stream to logits: only where they are asked for, never all at once.

1. ``x = norm(resid)``, in float32 at least; a caller that has ``unembed.hook_in`` says ``normed=True``.
2. A logit is ``cap(<x, W_U[:, v]> + b_U[v])``. For tokens that are named, their rows of ``W_U`` are read
   and nothing else.
3. What needs all words (log-sum-exp, divergence, entropy, the best words) goes through the vocabulary in
   tiles of at most ``TILE`` logits. A backward pass computes the tiles again instead of keeping them:
   ``d/dx lse = softmax @ W_U``, ``d/dx_q KL(p || q) = (q - p) @ W_U``.

Products and sums are made in float32 (float64 in a model of that type). A bfloat16 weight becomes
float32 tile by tile, so that nothing is rounded after the weights and the stream; the logits that such a
model makes itself carry eight bits, 0.06 at a logit of 20.

``[d_vocab, d_model]`` in memory is the quicker layout; the other one is right, and is not copied either.

Cost: ``2 * rows * d_model * d_vocab`` operations for all words, twice that with a backward pass, and
``TILE`` numbers of memory beside a tile of the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int

from gemmascope_plugin.models.points import Norm, norm_of
from gemmascope_plugin.models.protocol import HookedModel, wide

TILE = 1 << 20
"""Logits that are held at a time."""
ROWS = 512
"""Positions of a tile, at most."""
WORDS = 8192
"""Words of a tile at most where the weight has to change its type."""

Rows = Float[torch.Tensor, "*rows d_model"]
Reference = Float[torch.Tensor, "*#rows d_model"]
"""Rows that others are compared with, repeated where there are fewer."""
Values = Float[torch.Tensor, "*rows"]


@dataclass(frozen=True, eq=False)
class Unembedding:
    """What lies between the residual stream and the logits."""

    weight: Float[torch.Tensor, "d_vocab d_model"]
    bias: Float[torch.Tensor, " d_vocab"] | None
    """None where it is zero everywhere, as in every Gemma."""
    cap: float | None
    """The final soft-cap."""
    norm: Norm

    @property
    def d_vocab(self) -> int:
        """Number of words."""
        return len(self.weight)

    def read(self, x: Rows, *, normed: bool = False) -> Rows:
        """What the words are multiplied with, wide enough for sums; ``normed`` rows are past the norm."""
        return wide(x) if normed else self.norm(wide(x))

    def rows(
        self, words: slice | Int[torch.Tensor, "*choice"], like: torch.Tensor
    ) -> Float[torch.Tensor, "*choice d_model"]:
        """Some rows of the weight, in the type and on the device of ``like``."""
        return self.weight[words].to(like.device, like.dtype)

    def logits(
        self, x: Rows, words: slice | Int[torch.Tensor, "*choice"]
    ) -> Float[torch.Tensor, "*any"]:
        """Logits of normed ``x`` for the same words in every row: ``[*rows, *choice]``."""
        flat = x.reshape(-1, x.shape[-1])
        weight = self.rows(words, flat)
        out = flat @ weight.reshape(-1, weight.shape[-1]).T
        return self.finish(out.view(*x.shape[:-1], *weight.shape[:-1]), words)

    def logits_each(
        self, x: Rows, words: Int[torch.Tensor, "*rows choice"]
    ) -> Float[torch.Tensor, "*rows choice"]:
        """Logits of normed ``x`` for words of its own in every row."""
        if words.numel() * x.shape[-1] <= TILE:
            return self.finish((self.rows(words, x) @ x[..., None])[..., 0], words)
        different, place = words.unique(return_inverse=True)
        # copies of prompts ask for the same words
        if len(different) <= words.shape[-1] * x.shape[-1]:
            return self.logits(x, different).gather(-1, place)
        half = len(words) // 2
        parts = (slice(half), slice(half, None))
        return torch.cat([self.logits_each(x[part], words[part]) for part in parts])

    def finish(self, logits: torch.Tensor, words: slice | torch.Tensor) -> torch.Tensor:
        """Bias and soft-cap."""
        if self.bias is not None:
            logits = logits + self.bias[words].to(logits.device, logits.dtype)
        return self.capped(logits)

    def capped(self, logits: torch.Tensor) -> torch.Tensor:
        """After the soft-cap."""
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def tiles(
        self, n_rows: int, like: torch.Tensor
    ) -> Iterator[tuple[slice, torch.Tensor, list[slice]]]:
        """Words, their weight in the type of ``like``, and the rows to multiply with, part by part."""
        height = max(1, min(n_rows, ROWS))
        width = max(1, TILE // height)
        if self.weight.dtype != like.dtype:
            width = min(width, WORDS)
        parts = [slice(i, i + height) for i in range(0, n_rows, height)]
        for start in range(0, self.d_vocab, width):
            words = slice(start, min(start + width, self.d_vocab))
            yield words, self.rows(words, like), parts

    def converted(self) -> Iterator[slice]:
        """Runs of words whose weight is held in another type at a time."""
        for start in range(0, self.d_vocab, WORDS):
            yield slice(start, start + WORDS)

    def each_tile(
        self, x: Float[torch.Tensor, "row d_model"]
    ) -> Iterator[tuple[slice, slice, torch.Tensor, torch.Tensor]]:
        """Rows, words, the weight of the words and the logits, tile by tile."""
        for words, weight, parts in self.tiles(len(x), x):
            for part in parts:
                yield part, words, weight, self.finish(x[part] @ weight.T, words)

    def slope(self, logits: torch.Tensor) -> torch.Tensor | float:
        """How a logit moves with what it was before the soft-cap."""
        return 1.0 if self.cap is None else 1 - (logits / self.cap).square()


def soft_cap(model: HookedModel) -> float | None:
    """The final soft-cap of the logits; None without one."""
    cap = getattr(model.cfg, "output_logits_soft_cap", None)
    return float(cap) if cap is not None and cap > 0 else None


def unembedding(model: HookedModel, *, before_cap: bool = False) -> Unembedding:
    """That of the model, with or without its soft-cap: views, nothing is copied."""
    module: Any = model.unembed  # pyright: ignore[reportAttributeAccessIssue]
    bias = getattr(module, "b_U", None)
    return Unembedding(
        module.W_U.detach().T,
        bias.detach() if bias is not None and bool(bias.any()) else None,
        None if before_cap else soft_cap(model),
        norm_of(model, model.ln_final),  # pyright: ignore[reportAttributeAccessIssue]
    )


def all_logits(out: Unembedding, x: Rows) -> Float[torch.Tensor, "*rows d_vocab"]:
    """Every logit of normed ``x``."""
    flat = x.reshape(-1, x.shape[-1])
    return out.finish(_Product.apply(flat, out), slice(None)).view(*x.shape[:-1], -1)


def log_normaliser(out: Unembedding, x: Rows) -> Values:
    """Log-sum-exp of all logits of normed ``x``."""
    flat = x.reshape(-1, x.shape[-1])
    return _LogSumExp.apply(flat, out).view(x.shape[:-1])


def mean_logit(out: Unembedding, x: Rows) -> Values:
    """Mean of all logits of normed ``x``."""
    flat = x.reshape(-1, x.shape[-1])
    return _Mean.apply(flat, out).view(x.shape[:-1])


def divergence(out: Unembedding, p: Reference, q: Rows) -> Values:
    """``KL(p || q)`` of normed rows, in nats; ``p`` is held."""
    shape, width = q.shape[:-1], q.shape[-1]
    p = p.expand_as(q).reshape(-1, width).detach().to(q)
    return _Divergence.apply(q.reshape(-1, width), p, out).view(shape)


@torch.no_grad()
def top_logits(
    out: Unembedding, x: Rows, k: int
) -> tuple[
    Float[torch.Tensor, "*rows k"], Int[torch.Tensor, "*rows k"], Float[torch.Tensor, "*rows"]
]:
    """The ``k`` largest logits of normed ``x``, their ids, and the log-sum-exp of all."""
    flat = x.reshape(-1, x.shape[-1])
    sums = Sums(len(flat), flat)
    best = flat.new_full((len(flat), k), -torch.inf)
    ids = torch.zeros(len(flat), k, dtype=torch.long, device=flat.device)
    for part, words, _, logits in out.each_tile(flat):
        # few rows have a word among their best in a tile, once they have seen some tiles
        better = logits.amax(-1) > best[part, -1]
        some, places = logits[better].topk(min(k, logits.shape[1]))
        both = torch.cat([best[part][better], some], 1)
        which = torch.cat([ids[part][better], places + words.start], 1)
        best[part][better], places = both.topk(k)
        ids[part][better] = which.gather(1, places)
        sums.add(part, logits)
    shape = x.shape[:-1]
    return best.view(*shape, k), ids.view(*shape, k), sums.log().view(shape)


class Sums:
    """Running sums of ``exp(logit)`` and of a weighted value per row, against overflow by the maximum."""

    def __init__(self, n_rows: int, like: torch.Tensor) -> None:
        self.top = like.new_full((n_rows,), -torch.inf)
        # float64 across tiles costs nothing: a number per row and tile
        self.sum = like.new_zeros(n_rows, dtype=torch.float64)
        self.weighted = torch.zeros_like(self.sum)

    def add(self, part: slice, logits: torch.Tensor, value: torch.Tensor | None = None) -> None:
        """Counts a tile; ``value`` is averaged with the probabilities as weights."""
        top = torch.maximum(self.top[part], logits.amax(-1))
        shrink = (self.top[part] - top).double().exp()
        weights = (logits - top[:, None]).exp_()
        self.sum[part] = self.sum[part] * shrink + weights.sum(-1)
        if value is not None:
            more = (weights * value).sum(-1)
            self.weighted[part] = self.weighted[part] * shrink + more
        self.top[part] = top

    def log(self) -> Float[torch.Tensor, " row"]:
        """Log-sum-exp."""
        return (self.top.double() + self.sum.log()).to(self.top.dtype)

    def mean(self) -> Float[torch.Tensor, " row"]:
        """Mean of the value."""
        return (self.weighted / self.sum).to(self.top.dtype)


def _pulled(
    out: Unembedding,
    x: torch.Tensor,
    by_logits: Callable[[slice, slice, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """The derivative by ``x``, from that by the logits at some rows and words, tile by tile."""
    gradient = torch.zeros_like(x)
    for part, words, weight, logits in out.each_tile(x):
        gradient[part] += (by_logits(part, words, logits) * out.slope(logits)) @ weight
    return gradient


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, out: Unembedding) -> torch.Tensor:
        sums = Sums(len(x), x)
        for part, _, _, logits in out.each_tile(x):
            sums.add(part, logits)
        ctx.out = out
        ctx.save_for_backward(x, lse := sums.log())
        return lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, lse = ctx.saved_tensors
        (grad,) = grads

        def softmax(part: slice, words: slice, logits: torch.Tensor) -> torch.Tensor:
            return (logits - lse[part, None]).exp_() * grad[part, None]

        return _pulled(ctx.out, x, softmax), None


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, out: Unembedding) -> torch.Tensor:
        total = x.new_zeros(len(x), dtype=torch.float64)
        for part, _, _, logits in out.each_tile(x):
            total[part] += logits.sum(-1)
        ctx.out = out
        ctx.save_for_backward(x)
        return (total / out.d_vocab).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        share = grads[0][:, None] / ctx.out.d_vocab

        def alike(part: slice, words: slice, logits: torch.Tensor) -> torch.Tensor:
            return share[part].expand_as(logits)

        return _pulled(ctx.out, x, alike), None


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, p: torch.Tensor, out: Unembedding) -> torch.Tensor:
        of_p, of_q = Sums(len(p), p), Sums(len(q), q)
        for words, weight, parts in out.tiles(len(q), q):
            for part in parts:
                logits_p, logits_q = (out.finish(x[part] @ weight.T, words) for x in (p, q))
                of_p.add(part, logits_p, logits_p - logits_q)
                of_q.add(part, logits_q)
        ctx.out = out
        ctx.save_for_backward(q, p, of_q.log(), of_p.log())
        # the logarithms of both sums, before they are rounded
        tops = of_q.top.double() - of_p.top.double()
        logs = tops + of_q.sum.log() - of_p.sum.log()
        return (of_p.weighted / of_p.sum + logs).to(q.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, p, lse_q, lse_p = ctx.saved_tensors
        out, gradient = ctx.out, torch.zeros_like(q)
        for words, weight, parts in out.tiles(len(q), q):
            for part in parts:
                logits_p, logits_q = (out.finish(x[part] @ weight.T, words) for x in (p, q))
                change = (logits_q - lse_q[part, None]).exp() - (logits_p - lse_p[part, None]).exp()
                change = change * grads[0][part, None] * out.slope(logits_q)
                gradient[part] += change @ weight
        return gradient, None, None


class _Product(torch.autograd.Function):
    """``x @ W_U`` without a copy of the weight in another type, forwards and backwards."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, out: Unembedding) -> torch.Tensor:
        ctx.out = out
        if out.weight.dtype == x.dtype:
            return x @ out.weight.to(x.device).T
        logits = x.new_empty(len(x), out.d_vocab)
        for words in out.converted():
            logits[:, words] = x @ out.rows(words, x).T
        return logits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        out, (grad,) = ctx.out, grads
        if out.weight.dtype == grad.dtype:
            return grad @ out.weight.to(grad.device), None
        total = grad.new_zeros(len(grad), out.weight.shape[1])
        for words in out.converted():
            total += grad[:, words] @ out.rows(words, grad)
        return total, None
