"""Prompts of several lengths in one batch, padded behind their end; see ``prompts.py``."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int

from gemmascope_plugin.models.prompts import Batch, PromptLike, read_prompts
from gemmascope_plugin.models.protocol import HookedModel


def padded(model: HookedModel, prompts: PromptLike) -> Batch:
    """One prompt or several as one batch.

    Args:
        model: The model.
        prompts: Texts, ids, messages; see ``prompts.py``.

    Raises:
        EmptySelectionError: No prompt, or one without text.
        ModelError: Text was given and the model has no tokenizer.
    """
    return read_prompts(model, prompts).packed()


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
    return read_prompts(model, tokens, mask).packed()
