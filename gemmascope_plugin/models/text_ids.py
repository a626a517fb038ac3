"""The ids of one text or conversation, in the words that a Gemma was tuned on.

For chat messages the tokenizer's own template where it has one, else Gemma's, ``<start_of_turn>user ...
<end_of_turn>``, the words of a system message in front of the first user's. After a user's message the
model's turn is opened.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int

from gemmascope_plugin.errors import (
    EmptySelectionError,
    InputError,
    ModelError,
    UnknownNameError,
    nearest,
    shorten,
)
from gemmascope_plugin.models.protocol import HookedModel

_START, _END = "<start_of_turn>", "<end_of_turn>"
Messages = Sequence[Mapping[str, Any]]
"""One conversation: ``{"role": ..., "content": ...}`` each."""
_ROLES = {"user": "user", "model": "model", "assistant": "model"}


def is_chat(prompt: object) -> bool:
    """Whether something is one list of messages."""
    if not isinstance(prompt, Sequence) or isinstance(prompt, str) or not len(prompt):
        return False
    return all(isinstance(part, Mapping) and "role" in part for part in prompt)


def render(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> str:
    """The text of a conversation, special tokens written out; roles: system (first only), user, model."""
    plain = [_message(message) for message in messages]
    opens = plain[-1]["role"] == "user"
    if getattr(tokenizer, "chat_template", None):
        roles = {"model": "assistant"}
        named = [{**m, "role": roles.get(m["role"], m["role"])} for m in plain]
        return tokenizer.apply_chat_template(named, tokenize=False, add_generation_prompt=opens)
    if _START not in tokenizer.get_vocab():
        raise ModelError(
            f"The tokenizer has no chat template and no {_START}", fix="a text instead of messages"
        )
    system = ""
    if plain[0]["role"] == "system":
        system = plain.pop(0)["content"] + "\n\n"
    if not plain:
        raise EmptySelectionError("The conversation has no message of a user")
    text = tokenizer.bos_token or ""
    for place, message in enumerate(plain):
        if message["role"] not in _ROLES:
            raise InputError(
                f"There is no place for a message of {message['role']!r} there",
                exists="system (first), user, model",
            )
        words = (system if place == 0 else "") + message["content"]
        text += f"{_START}{_ROLES[message['role']]}\n{words}{_END}\n"
    return f"{text}{_START}model\n" if opens else text


def _message(message: Mapping[str, Any]) -> dict[str, str]:
    content = message.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str):
        parts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        content = "".join(part for part in parts if part) if all(parts) else None
    if not isinstance(content, str):
        raise InputError(
            "A message has no text",
            fix='{"role": "user", "content": "What is the capital of Peru?"}',
        )
    return {"role": str(message["role"]), "content": content.strip()}


def text_ids(model: HookedModel, prompt: str | Messages) -> Int[torch.Tensor, " _"]:
    """The ids of one text or conversation of any length, on the CPU."""
    if isinstance(prompt, str) and not prompt.strip():
        raise EmptySelectionError(
            "The prompt is empty", fix="give at least one word, or token ids [batch, pos]"
        )
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ModelError("The model has no tokenizer", fix="give token ids [batch, pos]")
    text = prompt if isinstance(prompt, str) else render(tokenizer, prompt)
    # add_special_tokens=False first: TransformerLens may hand over a tokenizer that adds BOS itself
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    bos = tokenizer.bos_token_id
    return torch.tensor(ids if bos is None or ids[:1] == [bos] else [bos, *ids])


def refuse_unknown_words(
    model: HookedModel, prompt: str | Messages, ids: Int[torch.Tensor, " _"]
) -> None:
    """An unknown word becomes UNK, and every number would be about another text.

    A corpus to train on may have some, so this is asked of prompts alone.
    """
    tokenizer: Any = model.tokenizer
    unk = getattr(tokenizer, "unk_token_id", None)
    if unk is None or unk not in ids:
        return
    text = prompt if isinstance(prompt, str) else render(tokenizer, prompt)
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
