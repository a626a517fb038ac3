"""Turns of a conversation: their text in the words that a Gemma was tuned on, and which tokens end one.

1. The text of chat messages is made by the tokenizer's own template where it has one, else by Gemma's,
   ``<start_of_turn>user ... <end_of_turn>``, the words of a system message in front of the first user's.
   After a user's message the model's turn is opened.
2. What a model writes ends at the tokens that its generation config names: of tuned Gemmas ``<eos>`` and
   ``<end_of_turn>``; without it a turn never ends and the model goes on to write the user's.
3. Else at the config's or the tokenizer's, and ``<end_of_turn>`` where the tokenizer has a chat template;
   and at whatever is asked for beside them, one token each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, SupportsIndex, cast

from gemmascope_plugin.arguments import as_index, as_indices
from gemmascope_plugin.errors import EmptySelectionError, InputError, ModelError
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.models.tokens import check_ids, token_id

_START, _END = "<start_of_turn>", "<end_of_turn>"
Messages = Sequence[Mapping[str, Any]]
"""One conversation: ``{"role": ..., "content": ...}`` each."""
Words = str | SupportsIndex | Iterable[str | SupportsIndex] | None
"""Tokens by word or id, one or several."""
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


def conversation_text(model: HookedModel, messages: Messages) -> str:
    """The text of a conversation in the words of the model's tokenizer."""
    if model.tokenizer is None:
        raise ModelError("The model has no tokenizer", fix="give token ids [batch, pos]")
    return render(model.tokenizer, messages)


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


def stop_ids(model: HookedModel, stop: Words = (), *, with_own: bool = True) -> list[int]:
    """Ids of the tokens after which a continuation ends, sorted; empty where none is known.

    ``stop`` are words or ids beside the model's own, which count unless ``with_own=False``.
    """
    several = isinstance(stop, Iterable) and not isinstance(stop, str) and as_index(stop) is None
    words = [] if stop is None else list(cast("Iterable[str]", stop)) if several else [stop]
    named = _named(model) if with_own else []
    return sorted({*named, *(token_id(model, word, "\n") for word in words)})


def _named(model: HookedModel) -> list[int]:
    """Those that the model's own files name."""
    holders = (model, getattr(model, "original_model", None))
    for holder in holders:
        config = getattr(holder, "generation_config", None)
        ids = as_indices(getattr(config, "eos_token_id", None))
        if ids:
            return check_ids(model, ids)
    tokenizer = model.tokenizer
    ids = as_indices(getattr(model.cfg, "eos_token_id", None)) or []
    ids = ids or as_indices(getattr(tokenizer, "eos_token_id", None)) or []
    if getattr(tokenizer, "chat_template", None):
        turn = tokenizer.get_vocab().get(_END)
        ids += [] if turn is None else [int(turn)]
    return ids
