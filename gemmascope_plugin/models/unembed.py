"""From the end of the residual stream to logits: only where they are asked for, never all at once.

1. ``x = norm(resid)``, in float32 at least; a caller that has ``unembed.hook_in`` says ``normed=True``.
2. A logit is ``cap(<x, W_U[:, v]> + b_U[v])``. For tokens that are named, their rows of ``W_U`` are read
   and nothing else; what needs all words goes through the vocabulary in tiles (``vocabulary.py``).

Products and sums are made in float32 (float64 in a model of that type). A bfloat16 weight becomes
float32 tile by tile, so that nothing is rounded after the weights and the stream; the logits that such a
model makes itself carry eight bits, 0.06 at a logit of 20.

``[d_vocab, d_model]`` in memory is the quicker layout; the other one is right, and is not copied either.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int

from gemmascope_plugin.models.norm import Norm, gain_of
from gemmascope_plugin.models.protocol import HookedModel

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

    @classmethod
    def of(cls, model: HookedModel) -> Unembedding:
        """That of ``HookedTransformer`` or ``TransformerBridge``: views, nothing is copied."""
        module: Any = model.unembed  # pyright: ignore[reportAttributeAccessIssue]
        ln: Any = model.ln_final  # pyright: ignore[reportAttributeAccessIssue]
        bias = getattr(module, "b_U", None)
        cap = getattr(model.cfg, "output_logits_soft_cap", None)
        eps = getattr(ln, "eps", None)
        return cls(
            module.W_U.detach().T,
            bias.detach() if bias is not None and bool(bias.any()) else None,
            float(cap) if cap is not None and cap > 0 else None,
            Norm(gain_of(model, ln), float(model.cfg.eps if eps is None else eps)),
        )

    @property
    def d_vocab(self) -> int:
        """Number of words."""
        return len(self.weight)

    def uncapped(self) -> Unembedding:
        """The same before the soft-cap."""
        return Unembedding(self.weight, self.bias, None, self.norm)

    def read(self, x: Rows, *, normed: bool = False) -> Rows:
        """What the words are multiplied with, wide enough for sums; ``normed`` rows are past the norm."""
        wide = x if x.dtype == torch.float64 else x.float()
        return wide if normed else self.norm(wide)

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
        if (
            len(different) <= words.shape[-1] * x.shape[-1]
        ):  # copies of prompts ask for the same words
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


def unembedding(model: HookedModel, *, before_cap: bool = False) -> Unembedding:
    """That of the model, with or without its soft-cap."""
    out = Unembedding.of(model)
    return out.uncapped() if before_cap else out
