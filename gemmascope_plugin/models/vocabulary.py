"""Sums over the whole vocabulary, never all logits at once.

Log-sum-exp, divergence, entropy and the best words go through the vocabulary in tiles of at most ``TILE``
logits (``unembed.py``). A backward pass computes the tiles again instead of keeping them:
``d/dx lse = softmax @ W_U``, ``d/dx_q KL(p || q) = (q - p) @ W_U``.

Cost: ``2 * rows * d_model * d_vocab`` operations, twice that with a backward pass, and ``TILE`` numbers
of memory beside a tile of the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int

from gemmascope_plugin.models.unembed import Reference, Rows, Unembedding, Values


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
    """The same of normed rows."""
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


class _Tiled(torch.autograd.Function):
    """What is summed over the vocabulary; a subclass says the derivative by the logits, tile by tile."""

    @staticmethod
    def pulled(
        out: Unembedding,
        x: torch.Tensor,
        by_logits: Callable[[slice, slice, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """The derivative by ``x``, from that by the logits at some rows and words."""
        gradient = torch.zeros_like(x)
        for part, words, weight, logits in out.each_tile(x):
            gradient[part] += (by_logits(part, words, logits) * out.slope(logits)) @ weight
        return gradient


class _LogSumExp(_Tiled):
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

        return _Tiled.pulled(ctx.out, x, softmax), None


class _Mean(_Tiled):
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

        return _Tiled.pulled(ctx.out, x, alike), None


class _Divergence(_Tiled):
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


class _Product(_Tiled):
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
