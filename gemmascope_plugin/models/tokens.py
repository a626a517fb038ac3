"""Tokens by their number: words to ids, ids to readable labels, and which tokens are special.

A token is known by its id everywhere. Real vocabularies hold most words twice, with a space in front and
without (``" Paris"`` and ``"Paris"`` of Gemma are 9079 and 50429), and bytes that are not text:

1. A word means the token that is exactly this text. Only where there is none, the one with a space.
2. Where both exist the prompt decides (``_exact_follows``); where it does not, nothing is guessed.
3. ``token_label`` is the one text for people; two tokens may share it, so nothing is looked up by it.
4. A text has BOS in front exactly once (``text_ids``); a prompt has no word that the vocabulary lacks.
5. An answer has any number of tokens, as they stand behind a prompt (``answer_ids``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, SupportsInt

import torch
from jaxtyping import Bool, Int

from gemmascope_plugin.arguments import as_index, as_indices
from gemmascope_plugin.errors import (
    EmptySelectionError,
    InputError,
    ModelError,
    TaskError,
    UnknownNameError,
    nearest,
    shorten,
)
from gemmascope_plugin.models.protocol import HookedModel

SPECIAL_NAMES = ("bos", "eos", "pad")
"""What ``exclude=`` may name; token ids may stand beside them."""

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_ATTACHED = ".,;:!?)]}%\u2019\u201d\u2026"
"""A text that begins with one of these follows a word without a space."""
_OPENING = "([{\u201c\u2018\u00ab/\\_@#$\u20ac\u00a3>"
"""After one of these a text follows without a space."""


def token_id(model: HookedModel, word: object, prompt: str | Iterable[Any] | None = None) -> int:
    """The id of a token, given as a word or as its id.

    Args:
        model: The model; for words it needs a tokenizer.
        word: Text that is a single token, or an id of any library's integers.
        prompt: What stands before the token, as text or ids; decides between a word and the same word
            with a space in front, where the vocabulary has both.

    Raises:
        UnknownNameError: The word is not a single token, the id is outside the vocabulary, or the word
            may be either of two tokens.
        InputError: Neither a word nor an id.
        ModelError: A word, and the model has no tokenizer.
    """
    number = as_index(word)
    if number is not None:
        return check_ids(model, [number])[0]
    if not isinstance(word, str):
        raise InputError(
            f"{word!r} is neither a word nor a token id", fix='" Paris" or 9079, one for one token'
        )
    if model.tokenizer is None:
        raise ModelError("The model has no tokenizer", fix="give token ids instead of words")
    exact = _single(model, word)
    spaced = _single(model, f" {word}") if word[:1].strip() else None
    if exact is None and spaced is None:
        raise _unknown(model, word)
    if exact is None or spaced is None or exact == spaced:
        return exact if exact is not None else spaced  # pyright: ignore[reportReturnType]
    if _exact_follows(word, _text_before(model, prompt)):
        return exact
    raise UnknownNameError(
        f"{word!r} may be the token {word!r} (id {exact}) or the token {' ' + word!r} (id {spaced})",
        fix=f"{' ' + word!r} for the next word of a sentence, or the id of the one that you mean",
    )


def check_ids(model: HookedModel, ids: Iterable[int]) -> list[int]:
    """Token ids, each inside the vocabulary."""
    listed, n = list(ids), int(model.cfg.d_vocab)
    for number in listed:
        if not 0 <= number < n:
            raise UnknownNameError(
                f"Token id {number} does not exist", exists=f"token ids 0 to {n - 1}"
            )
    return listed


def token_label(model: HookedModel, token: SupportsInt) -> str:
    """Readable text of a token; bytes as ``<0xE0>``, tokens without text by their name."""
    number = int(token)
    if model.tokenizer is None:
        return str(number)
    text = model.tokenizer.decode([number])
    name = _name(model, number)
    if name is not None and (_BYTE.fullmatch(name) or not text or "\ufffd" in text):
        return name
    return text or str(number)


def quoted_label(model: HookedModel, token: SupportsInt) -> str:
    """Label and id, where two tokens may look alike: ``' Paris' (9079)``."""
    return f"{token_label(model, token)!r} ({int(token)})"


def token_strings(model: HookedModel, ids: Int[torch.Tensor, " pos"]) -> list[str]:
    """One readable string per token; see :func:`token_label`."""
    return [token_label(model, number) for number in ids.tolist()]


def special_ids(model: HookedModel, exclude: str | int | Iterable[str | int]) -> frozenset[int]:
    """Token ids behind names like ``"bos"``; ids pass through.

    Raises:
        UnknownNameError: A name other than bos, eos, pad, or an id outside the vocabulary.
        ModelError: A name was given and the model has no tokenizer.
    """
    ids = set()
    for item in [exclude] if isinstance(exclude, str | int) else exclude:
        number = as_index(item)
        if number is not None:
            ids.update(check_ids(model, [number]))
            continue
        if item not in SPECIAL_NAMES:
            raise UnknownNameError(
                f"Unknown special token {item!r} in exclude",
                exists=", ".join(SPECIAL_NAMES) + ", or token ids",
                nearest=nearest(str(item), SPECIAL_NAMES),
            )
        if model.tokenizer is None:
            raise ModelError(
                f"exclude={item!r} needs a tokenizer and the model has none",
                fix="exclude=(0, 1, 2) with your token ids, or exclude=() to keep every token",
            )
        number = getattr(model.tokenizer, f"{item}_token_id")
        if number is not None:
            ids.add(int(number))
    return frozenset(ids)


def kept_positions(
    tokens: Int[torch.Tensor, "batch pos"], excluded: frozenset[int]
) -> Bool[torch.Tensor, "batch pos"]:
    """True where a token is not excluded."""
    keep = torch.ones_like(tokens, dtype=torch.bool)
    for token in excluded:
        keep &= tokens != token
    return keep


def _ids_of(model: HookedModel, text: str) -> list[int]:
    return list(model.tokenizer(text, add_special_tokens=False)["input_ids"])


def _single(model: HookedModel, text: str) -> int | None:
    """The token that a text is; None where it is none or several."""
    ids = _ids_of(model, text)
    return int(ids[0]) if len(ids) == 1 and ids[0] != model.tokenizer.unk_token_id else None


def _text_before(model: HookedModel, prompt: str | Iterable[Any] | None) -> str | None:
    """The end of a prompt as text; None where nothing is known of it."""
    if prompt is None or isinstance(prompt, str):
        return prompt
    ids: Any = prompt
    ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    return model.tokenizer.decode(ids[-8:]) if ids else None


def _exact_follows(word: str, before: str | None) -> bool:
    """Whether a text follows a prompt as it is, and a space in front of it would be wrong.

    Signs that attach to the word before them do everywhere; after a line break, a space, an opening
    bracket or sign everything does, and so do digits after digits. After a word it depends on what was
    meant (``walk`` + ``ing``, ``is`` + ``Paris``), which nobody but the asker knows.
    """
    if word[0] in _ATTACHED:
        return True
    if not before:
        return False
    last = before[-1]
    if last.isspace() or last in _OPENING or (last.isdigit() and word[0].isdigit()):
        return True
    within = before[-2:-1].isalnum()
    # a straight quotation mark opens unless it stands behind a word; a hyphen joins where it does
    return within if last == "-" else last in "\"'" and not within


def _unknown(model: HookedModel, word: str) -> UnknownNameError:
    """Why a word is not a token: its pieces, or its nearest neighbours where it is unknown."""
    problem = f"{word!r} is not a single token of this model"
    if _BYTE.fullmatch(word) and (byte := _byte_id(model, word)) is not None:
        return UnknownNameError(
            f"{word!r} is the name of a byte token, not a text; its id is {byte}", fix=str(byte)
        )
    ids = _ids_of(model, word)
    if not ids or model.tokenizer.unk_token_id in ids:
        close = nearest(word, model.tokenizer.get_vocab())
        return UnknownNameError(problem, nearest=close, fix="give the token id")
    pieces = " + ".join(repr(token_label(model, piece)) for piece in ids)
    return UnknownNameError(
        f"{problem}, it is {len(ids)}: {pieces}",
        fix=f"sequence_logprob([{word!r}]) for an answer of several tokens, or give the token id of "
        "the piece that you mean",
    )


def _byte_id(model: HookedModel, name: str) -> int | None:
    """The token with the name of a byte; None where the vocabulary has none."""
    vocabulary = model.tokenizer.get_vocab()
    return vocabulary.get(name, vocabulary.get(f"<0x{name[3:5].upper()}>"))


def _name(model: HookedModel, number: int) -> str | None:
    """A token as the vocabulary spells it; None where the tokenizer cannot say."""
    convert = getattr(model.tokenizer, "convert_ids_to_tokens", None)
    return None if convert is None else convert(number)


def text_ids(model: HookedModel, text: str) -> Int[torch.Tensor, " _"]:
    """The ids of one text of any length, BOS in front, on the CPU."""
    if not text.strip():
        raise EmptySelectionError(
            "The prompt is empty", fix="give at least one word, or token ids [batch, pos]"
        )
    if model.tokenizer is None:
        raise ModelError("The model has no tokenizer", fix="give token ids [batch, pos]")
    # without special tokens first: TransformerLens may hand over a tokenizer that adds BOS itself
    ids, bos = _ids_of(model, text), model.tokenizer.bos_token_id
    return torch.tensor(ids if bos is None or ids[:1] == [bos] else [bos, *ids])


def refuse_unknown_words(model: HookedModel, text: str, ids: Int[torch.Tensor, " _"]) -> None:
    """An unknown word becomes UNK, and every number would be about another text.

    A corpus to train on may have some, so this is asked of prompts alone.
    """
    tokenizer: Any = model.tokenizer
    unk = getattr(tokenizer, "unk_token_id", None)
    if unk is None or unk not in ids:
        return
    if int((ids == unk).sum()) <= text.count(tokenizer.unk_token):
        return
    words = [text]
    if getattr(tokenizer, "is_fast", False):
        spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        pairs = zip(spans["input_ids"], spans["offset_mapping"], strict=True)
        texts = (text[start:stop] for number, (start, stop) in pairs if number == unk)
        words = [word for word in texts if word != tokenizer.unk_token]
    raise UnknownNameError(
        f"The tokenizer of this model does not know {shorten(repr(w) for w in dict.fromkeys(words))}",
        exists=f"{len(tokenizer)} tokens: model.tokenizer.get_vocab()",
        nearest=nearest(words[0], tokenizer.get_vocab()),
        fix=f"{tokenizer.unk_token!r} in its place if an unknown word is meant",
    )


def answer_ids(model: HookedModel, text: str | Sequence[int], end: int, noun: str) -> list[int]:
    """Token ids of an answer as it stands behind a prompt that ends with token ``end``, blanks included.

    ``noun`` is what errors call it.
    """
    if not isinstance(text, str):
        ids = as_indices(text)
        if ids is None:
            raise TaskError(
                f"{noun} is {text!r}, neither a text nor token ids", fix='" Paris", or [9079]'
            )
        outside = [i for i in ids if not 0 <= i < model.cfg.d_vocab]
        if outside:
            raise TaskError(
                f"Token id {outside[0]} of {noun} does not exist",
                exists=f"token ids 0 to {model.cfg.d_vocab - 1}",
            )
    else:
        ids = _encode(model, text)
        last = token_strings(model, torch.tensor([end]))[0]
        if text[:1].isalnum() and last[-1:].isalnum() and _encode(model, f" {text}") != ids:
            raise TaskError(
                f"{noun} is {text!r}, which would run into the last word of its prompt, {last!r}",
                fix=f"{' ' + text!r}, or token ids",
            )
    if not ids:
        raise TaskError(f"{noun} is empty", fix="a text with a token, or token ids")
    return ids


def _encode(model: HookedModel, text: str) -> list[int]:
    if model.tokenizer is None:
        raise TaskError("The model has no tokenizer", fix="answers as lists of token ids")
    ids = _ids_of(model, text)
    unknown = model.tokenizer.unk_token_id
    if unknown is not None and unknown in ids:
        raise TaskError(
            f"{text!r} has a part that this tokenizer does not know",
            fix="other words, or token ids",
        )
    return ids
