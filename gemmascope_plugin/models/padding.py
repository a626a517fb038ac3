"""Prompts of several lengths in one batch, padded behind their end.

A causal model never looks ahead, so what stands behind a prompt changes nothing at its own tokens: no
attention mask, the same positions, the same numbers as one by one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int

from gemmascope_plugin.errors import EmptySelectionError, TaskError
from gemmascope_plugin.models.protocol import HookedModel, device_of
from gemmascope_plugin.models.tokens import to_tokens

Batch = tuple[Int[torch.Tensor, "prompt length"], Int[torch.Tensor, " prompt"]]
"""Token ids, padded behind the end, and the length of each prompt."""


def padded(model: HookedModel, prompts: str | Sequence[str] | torch.Tensor) -> Batch:
    """Texts or token ids as one batch; ids are taken as they are, without padding.

    Args:
        model: The model.
        prompts: One text, several, or ids ``[prompt, pos]``.

    Raises:
        EmptySelectionError: No prompt, or one without text.
        ModelError: Text was given and the model has no tokenizer.
    """
    if isinstance(prompts, torch.Tensor):
        tokens = to_tokens(model, prompts)
        return tokens, torch.full((len(tokens),), tokens.shape[1], device=tokens.device)
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts:
        raise EmptySelectionError("There are no prompts")
    rows = [to_tokens(model, text)[0] for text in texts]
    lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
    batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id(model))
    return batch, lengths


def right_padded(
    model: HookedModel,
    tokens: Int[torch.Tensor, "prompt pos"],
    mask: Bool[torch.Tensor, "prompt pos"],
) -> Batch:
    """Token ids with padding anywhere outside the prompts, moved behind their ends.

    Args:
        model: The model.
        tokens: Token ids.
        mask: True at the tokens of the prompts.

    Raises:
        EmptySelectionError: A prompt has no token.
        TaskError: A prompt has a hole.
    """
    tokens, mask = tokens.to(device_of(model)), mask.to(device_of(model))
    lengths = mask.sum(1)
    if not bool(lengths.all()):
        raise EmptySelectionError(f"Prompt {int((lengths == 0).nonzero()[0])} has no tokens")
    starts = mask.int().argmax(1)
    at = torch.arange(int(lengths.max()), device=tokens.device)
    places = starts[:, None] + at
    inside = at < lengths[:, None]
    clamped = places.clamp(max=mask.shape[1] - 1)
    whole = (mask.gather(1, clamped) | ~inside).all(1)
    if not bool(whole.all()):
        row = int((~whole).nonzero()[0])
        raise TaskError(f"The mask of prompt {row} has a hole", fix="True at one run of tokens")
    return tokens.gather(1, clamped).masked_fill(~inside, pad_id(model)), lengths


def pad_id(model: HookedModel) -> int:
    """The token that stands behind shorter prompts."""
    found = getattr(model.tokenizer, "pad_token_id", None)
    return 0 if found is None else int(found)
