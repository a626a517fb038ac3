"""The words that a direction of the residual stream speaks for, and those against which it speaks.

1. ``(direction * gain) @ W_U``, the gain being that of the last norm: what the direction adds to each
   logit up to a factor, if nothing reads it on the way.
2. The words with the largest and smallest sums.

Cost: ``2 * directions * d_model * d_vocab`` operations, in chunks of ``CHUNK`` numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float

from gemmascope_plugin.errors import EmptySelectionError
from gemmascope_plugin.models.anatomy import Anatomy
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.models.tokens import token_strings

CHUNK = 1 << 26


class TopWords(NamedTuple):
    """Words, the strongest first."""

    top: tuple[str, ...]
    """Whose logits rise most."""
    bottom: tuple[str, ...]
    """Whose logits fall most."""


def top_words(
    model: HookedModel, directions: Float[torch.Tensor, "some d_model"], k: int = 5
) -> list[TopWords]:
    """Words of each direction."""
    anatomy = Anatomy(model)
    W_U, gain = anatomy.W_U, anatomy.ln_final.gain
    if not 1 <= k <= W_U.shape[1]:
        raise EmptySelectionError(f"k={k} is not a number of words", exists=f"1 to {W_U.shape[1]}")
    pairs = []
    for part in directions.split(max(1, CHUNK // W_U.shape[1])):
        read = part.to(W_U) if gain is None else part.to(W_U) * gain.to(W_U)
        logits = read @ W_U
        best, worst = logits.topk(k).indices.tolist(), (-logits).topk(k).indices.tolist()
        pairs += list(zip(best, worst, strict=True))
    tokens = torch.tensor(
        sorted({i for pair in pairs for ids in pair for i in ids}), dtype=torch.long
    )
    names = dict(zip(tokens.tolist(), token_strings(model, tokens), strict=True))
    return [TopWords(*(tuple(names[i] for i in ids) for ids in pair)) for pair in pairs]
