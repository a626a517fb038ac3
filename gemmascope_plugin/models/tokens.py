"""Text to token ids and back, and which tokens are special."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Bool, Int

from gemmascope_plugin.errors import EmptySelectionError, ModelError, UnknownNameError, nearest
from gemmascope_plugin.models.protocol import HookedModel, device_of

SPECIAL_NAMES = ("bos", "eos", "pad")
"""What ``exclude=`` may name; token ids may stand beside them."""


def to_tokens(
    model: HookedModel, text: str | Sequence[str] | Int[torch.Tensor, "*batch pos"]
) -> Int[torch.Tensor, "batch pos"]:
    """Token ids on the model's device, BOS in front exactly once.

    Args:
        model: Model with a tokenizer; without one only token ids are accepted.
        text: One prompt, several prompts of equal length in tokens, or ids ``[batch, pos]`` or
            ``[pos]``.

    Raises:
        EmptySelectionError: No prompt, or a prompt without any text.
        ModelError: Text was given and the model has no tokenizer, or lengths differ.
    """
    if isinstance(text, torch.Tensor):
        ids = text if text.ndim == 2 else text[None]
        if ids.numel() == 0:
            raise EmptySelectionError("The prompt has no tokens")
        return ids.to(device_of(model))
    prompts = [text] if isinstance(text, str) else list(text)
    if not prompts or any(not prompt.strip() for prompt in prompts):
        raise EmptySelectionError(
            "The prompt is empty", fix="give at least one word, or token ids [batch, pos]"
        )
    if model.tokenizer is None:
        raise ModelError("The model has no tokenizer", fix="give token ids [batch, pos]")
    rows = [_encode(model, prompt) for prompt in prompts]
    lengths = sorted({len(row) for row in rows})
    if len(lengths) > 1:
        raise ModelError(
            f"The prompts have different lengths: {lengths} tokens",
            fix="give prompts of one length, or call once per prompt",
        )
    return torch.tensor(rows, device=device_of(model))


def _encode(model: HookedModel, prompt: str) -> list[int]:
    # add_special_tokens=False first: TransformerLens may hand over a tokenizer that adds BOS itself
    ids = list(model.tokenizer(prompt, add_special_tokens=False)["input_ids"])
    bos = model.tokenizer.bos_token_id
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


def word_id(model: HookedModel, word: str) -> int:
    """The id of a word that is a single token, with or without a space before it.

    Raises:
        UnknownNameError: The word is unknown or is more than one token.
    """
    if model.tokenizer is None:
        raise ModelError("The model has no tokenizer", fix="give token ids instead of words")
    unknown = model.tokenizer.unk_token_id
    for candidate in (f" {word}", word):
        ids = model.tokenizer(candidate, add_special_tokens=False)["input_ids"]
        if len(ids) == 1 and ids[0] != unknown:
            return int(ids[0])
    raise UnknownNameError(
        f"{word!r} is not a single token of this model",
        nearest=nearest(word, model.tokenizer.get_vocab()),
        fix="give the token id",
    )


def token_strings(model: HookedModel, ids: Int[torch.Tensor, " pos"]) -> list[str]:
    """One readable string per token."""
    if model.tokenizer is None:
        return [str(int(i)) for i in ids]
    return [model.tokenizer.decode([int(i)]) for i in ids]


def special_ids(model: HookedModel, exclude: Iterable[str | int]) -> frozenset[int]:
    """Token ids behind names like ``"bos"``; ids pass through.

    Raises:
        UnknownNameError: A name other than bos, eos, pad.
        ModelError: A name was given and the model has no tokenizer.
    """
    ids = set()
    for item in exclude:
        if isinstance(item, int):
            ids.add(item)
            continue
        if item not in SPECIAL_NAMES:
            raise UnknownNameError(
                f"Unknown special token {item!r} in exclude",
                exists=", ".join(SPECIAL_NAMES) + ", or token ids",
                nearest=nearest(item, SPECIAL_NAMES),
            )
        if model.tokenizer is None:
            raise ModelError(
                f"exclude={item!r} needs a tokenizer and the model has none",
                fix="exclude=(0, 1, 2) with your token ids, or exclude=() to keep every token",
            )
        found = getattr(model.tokenizer, f"{item}_token_id")
        if found is not None:
            ids.add(int(found))
    return frozenset(ids)


def kept_positions(
    tokens: Int[torch.Tensor, "batch pos"], excluded: frozenset[int]
) -> Bool[torch.Tensor, "batch pos"]:
    """True where a token is not excluded."""
    keep = torch.ones_like(tokens, dtype=torch.bool)
    for token in excluded:
        keep &= tokens != token
    return keep
