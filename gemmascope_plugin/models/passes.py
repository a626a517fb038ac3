"""Which tokens the running forward pass sees, however the model was called.

1. A hook before the model reads what the call says: earlier tokens in a key-value cache, an attention
   mask, tokens that belong to a residual (``start_at_layer``).
2. A hook before the embedding remembers the token ids. ``HookedTransformer.generate`` embeds new tokens
   one by one and never calls the model itself, so ids are also strung together.
3. A hook before the first block tells how many earlier tokens lie in the key-value cache, where the call
   did not.

Positions are absolute: with a key-value cache the first token of a pass is at ``start``, not at 0.
Whoever asks twice without a new embedding in between is told that the tokens are not known: the pass
started above it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int

from gemmascope_plugin.models.protocol import HookedModel


@dataclass(frozen=True, eq=False)
class Pass:
    """One forward pass, as far as tokens are concerned."""

    tokens: Int[torch.Tensor, "batch pos"] | None
    """Token ids; None where they are not known."""
    start: int
    """Absolute position of the first token."""
    prompt: int
    """Length of the text that the pass, or the generation it belongs to, started with."""
    horizon: int
    """One more than the last position that will be seen: those to be generated count."""
    attention: Bool[torch.Tensor, "batch pos"] | None
    """False at padding, where the caller gave an attention mask."""
    rows: tuple[int, ...] | None = None
    """Which rows of a larger batch run in this pass; None for all."""
    n_rows: int | None = None
    """Rows of that batch."""
    grown: bool = False
    """Whether the text is that of the pass before plus one token, as generation without a key-value
    cache makes it: where its prompt ended is not known."""


class PassWatch:
    """Watches the forward passes of a model between ``attach`` and ``detach``."""

    def __init__(self, model: HookedModel) -> None:
        self._model = model
        self._handles: list[Any] = []
        self._embedded: torch.Tensor | None = None
        self._text: torch.Tensor | None = None
        self._start = 0
        self._prompt = 0
        self._mask: torch.Tensor | None = None
        self._generation: tuple[int, int] | None = None
        self._rows: tuple[tuple[int, ...] | None, int | None] = (None, None)
        self._whole: torch.Tensor | None = None
        self._grown = False
        self._asked: set[object] = set()
        self.serial = 0
        """Changes with every pass."""
        self.ran = False
        """Whether the model, its embedding or its first block was called."""

    def attach(self) -> None:
        """Starts watching."""
        watched = (
            (self._model, self._on_call),
            (self._model.embed, self._on_embedding),
            (self._model.blocks[0], self._on_first_block),
        )
        for module, fn in watched:
            self._handles.append(module.register_forward_pre_hook(fn, with_kwargs=True))
        # What a call said must not outlive it: the next pass may not go through the model itself.
        self._handles.append(self._model.register_forward_hook(self._on_return, always_call=True))

    def detach(self) -> None:
        """Stops watching and lets go of the tokens."""
        for handle in self._handles:
            handle.remove()
        self._embedded = self._text = self._mask = self._whole = None

    @contextmanager
    def generation(
        self, prompt: int, new: int, rows: Sequence[int] | None = None, n_rows: int | None = None
    ) -> Iterator[None]:
        """Passes inside the block continue a prompt of this length by up to ``new`` tokens.

        ``rows`` are those of a larger batch of ``n_rows``; None for all.
        """
        self._generation = (prompt, prompt + new)
        self._rows = (None if rows is None else tuple(rows), n_rows)
        try:
            yield
        finally:
            self._generation, self._rows = None, (None, None)

    def current(self, asker: object, shape: torch.Size) -> Pass:
        """The running pass, for an activation of this shape; whoever asks does so once per pass."""
        n_pos = shape[1]
        tokens = None if asker in self._asked else self._tokens(shape)
        self._asked.add(asker)
        stop = self._start + n_pos
        length = self._prompt if tokens is not None else 0
        prompt, horizon = self._generation or (length or stop, stop)
        mask = None if self._mask is None else self._mask[:, -n_pos:].bool()
        grown = self._grown and self._generation is None
        return Pass(tokens, self._start, prompt, horizon, mask, *self._rows, grown)

    def _on_call(self, module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._next()
        self._start = cached_length(kwargs)
        self._mask = _flat_mask(kwargs)
        if kwargs.get("start_at_layer") is not None:
            self._embedded = self._text = kwargs.get("tokens")
            self._prompt = 0

    def _on_return(self, module: object, args: object, output: object) -> None:
        self._mask, self._start = None, 0

    def _on_embedding(self, module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = (args[0] if args else next(iter(kwargs.values()))).detach()
        before = self._text if self._text is not None else tokens[:, :0]
        self._text = torch.cat([before, tokens], 1) if len(before) == len(tokens) else tokens
        self._embedded = tokens
        self._next()

    def _on_first_block(
        self, module: object, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.ran = True
        if "past_kv_cache_entry" in kwargs or "past_key_values" in kwargs:
            self._start = cached_length(kwargs)
        if (mask := _flat_mask(kwargs)) is not None:
            self._mask = mask
        stream = args[0] if args else kwargs["hidden_states"]
        tokens = self._embedded
        if self._start == 0 and tokens is not None and tokens.shape == stream.shape[:2]:
            self._text, self._prompt = tokens, tokens.shape[1]
            before, self._whole = self._whole, tokens
            self._grown = before is not None and _extends(tokens, before)

    def _next(self) -> None:
        self.serial += 1
        self.ran = True
        self._asked.clear()

    def _tokens(self, shape: torch.Size) -> torch.Tensor | None:
        """The ids behind an activation: those embedded last, or all that were embedded one by one."""
        for tokens in (self._embedded, self._text):
            if tokens is not None and tokens.shape == shape:
                return tokens
        return None


def _extends(tokens: torch.Tensor, before: torch.Tensor) -> bool:
    """Whether a text is an earlier one plus one token."""
    longer = (len(before), before.shape[1] + 1) == tuple(tokens.shape)
    return longer and torch.equal(tokens[:, :-1], before)


def cached_length(kwargs: dict[str, Any]) -> int:
    """Number of earlier tokens in the key-value cache among a module's keyword arguments."""
    entry = kwargs.get("past_kv_cache_entry")
    if entry is None and kwargs.get("past_kv_cache") is not None:
        entry = kwargs["past_kv_cache"][0]
    if entry is not None:
        return int(entry.past_keys.shape[1])
    cache = kwargs.get("past_key_values")
    return int(cache.get_seq_length()) if cache is not None else 0


def _flat_mask(kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The attention mask by token; blocks of the bridge get one by pair of tokens, which says less."""
    mask = kwargs.get("attention_mask")
    return mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None
