"""Chat messages as the text that a Gemma was tuned on.

The tokenizer's own template where it has one, else Gemma's, ``<start_of_turn>user ... <end_of_turn>``,
the words of a system message in front of the first user's. After a user's message the model's turn is
opened.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gemmascope_plugin.errors import EmptySelectionError, InputError, ModelError

_START, _END = "<start_of_turn>", "<end_of_turn>"
_ROLES = {"user": "user", "model": "model", "assistant": "model"}


def is_chat(prompt: Any) -> bool:
    """Whether something is one list of messages."""
    if not isinstance(prompt, Sequence) or isinstance(prompt, str) or not len(prompt):
        return False
    return all(isinstance(part, Mapping) and "role" in part for part in prompt)


def render(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> str:
    """The text of a conversation, special tokens written out.

    Args:
        tokenizer: The model's.
        messages: ``{"role": ..., "content": ...}``; roles system (first only), user, model or assistant.

    Raises:
        InputError: Another role, or a message without text.
        EmptySelectionError: No message of a user or the model.
        ModelError: The tokenizer has neither a template nor Gemma's tokens for turns.
    """
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
