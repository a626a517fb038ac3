"""Which tokens end what a model writes.

1. Those that its generation config names: of tuned Gemmas ``<eos>`` and ``<end_of_turn>``; without it a
   turn never ends and the model goes on to write the user's.
2. Else the config's or the tokenizer's, and ``<end_of_turn>`` where the tokenizer has a chat template.
3. Whatever is asked for beside them, one token each.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import SupportsIndex, cast

from gemmascope_plugin.arguments import as_index, as_indices
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.models.tokens import check_ids, token_id

_TURN = "<end_of_turn>"
Words = str | SupportsIndex | Iterable[str | SupportsIndex] | None
"""Tokens by word or id, one or several."""


def stop_ids(model: HookedModel, stop: Words = (), *, with_own: bool = True) -> list[int]:
    """Ids of the tokens after which a continuation ends, sorted; empty where none is known.

    ``stop`` are words or ids beside the model's own, which count unless ``with_own=False``.
    """
    several = isinstance(stop, Iterable) and not isinstance(stop, str) and as_index(stop) is None
    words = [] if stop is None else list(cast("Iterable[str]", stop)) if several else [stop]
    named = _named(model) if with_own else []
    return sorted({*named, *(token_id(model, word, "\n") for word in words)})


def _named(model: HookedModel) -> list[int]:
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
        turn = tokenizer.get_vocab().get(_TURN)
        ids += [] if turn is None else [int(turn)]
    return ids


def end_ids(model: HookedModel) -> tuple[int, ...]:
    """Ids at which a generated text ends: those of the generation config, else the tokenizer's EOS."""
    ids = getattr(model, "gemmascope_eos_ids", None)
    if ids is not None:
        return ids
    eos = getattr(model.tokenizer, "eos_token_id", None)
    return () if eos is None else (int(eos),)
