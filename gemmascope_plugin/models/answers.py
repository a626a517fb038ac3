"""Answers of any number of tokens, as they stand behind a prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gemmascope_plugin.errors import TaskError
from gemmascope_plugin.indices import as_indices
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.models.tokens import token_strings


def answer_ids(model: HookedModel, text: str | Sequence[int], end: int, what: str) -> list[int]:
    """Token ids of an answer behind a prompt.

    Args:
        model: The model.
        text: The answer as it stands behind its prompt, blanks included, or its ids.
        end: The last token of the prompt.
        what: What the answer is called, for errors.

    Raises:
        TaskError: An empty answer, unknown words, or one that would run into the prompt's last word.
    """
    if not isinstance(text, str):
        ids = as_indices(text)
        if ids is None:
            raise TaskError(
                f"{what} is {text!r}, neither a text nor token ids", fix='" Paris", or [9079]'
            )
        outside = [i for i in ids if not 0 <= i < model.cfg.d_vocab]
        if outside:
            raise TaskError(
                f"Token id {outside[0]} of {what} does not exist",
                exists=f"token ids 0 to {model.cfg.d_vocab - 1}",
            )
    else:
        ids = _encode(model, text)
        last = token_strings(model, torch.tensor([end]))[0]
        if text[:1].isalnum() and last[-1:].isalnum() and _encode(model, f" {text}") != ids:
            raise TaskError(
                f"{what} is {text!r}, which would run into the last word of its prompt, {last!r}",
                fix=f"{' ' + text!r}, or token ids",
            )
    if not ids:
        raise TaskError(f"{what} is empty", fix="a text with a token, or token ids")
    return ids


def _encode(model: HookedModel, text: str) -> list[int]:
    if model.tokenizer is None:
        raise TaskError("The model has no tokenizer", fix="answers as lists of token ids")
    ids = list(model.tokenizer(text, add_special_tokens=False)["input_ids"])
    unknown = model.tokenizer.unk_token_id
    if unknown is not None and unknown in ids:
        raise TaskError(
            f"{text!r} has a part that this tokenizer does not know",
            fix="other words, or token ids",
        )
    return ids
