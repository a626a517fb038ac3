"""Buckets of activations, from the model or from disk, and random batches out of them.

1. A reader gives bucket after bucket. ``ForwardReader`` sends rows of text through the model up to the
   last layer that is read; the tensors at all hooks are kept at the tokens that are neither excluded nor
   filled up (``models/points.py`` says what). Passes are strung together until a bucket is full, or the
   corpus ends; a corpus that fits into one bucket goes through the model once only. ``store.py`` has the
   reader of stored activations.
2. The tokens of a bucket are put into a random order that follows from the seed and the bucket's number
   alone, and dealt out in batches; what is left over at the end, less than a batch, is dropped. Gemma
   Scope shuffled in buckets of about a million (arXiv 2408.05147, section 3.1).
3. The place is the reader's place before the bucket, that of its first row in the corpus, and the number
   of batches dealt: a few numbers, no activations. Going there reads one bucket.

``collect_activations`` reads all tokens of some documents at once, in memory.

Cost: one partial forward pass per row of text, one permutation per bucket and one gather per batch;
memory ``bucket * sum of widths`` in the model's type.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int

from gemmascope_plugin.errors import BadFileError, EmptySelectionError
from gemmascope_plugin.models import flatten_heads, special_ids, to_tokens
from gemmascope_plugin.models.gate import gate
from gemmascope_plugin.models.points import Reading, reading
from gemmascope_plugin.models.protocol import HookedModel, check_model
from gemmascope_plugin.models.record import record
from gemmascope_plugin.models.tokens import kept_positions
from gemmascope_plugin.training.text_batches import Rows, TokenStream

Bucket = dict[str, torch.Tensor]
"""Hook name to activations ``[token, width]``, the same tokens at every hook."""

_SMALL = 3
"""Buckets in a row below one batch that prove that no bucket is larger: an epoch ends with at most one
small bucket, and the next may begin with it."""


@runtime_checkable
class Reader(Protocol):
    """Gives buckets in a fixed order, and can go to a place in it."""

    def next_bucket(self) -> Bucket:
        """The next activations."""
        ...

    def state(self) -> dict[str, Any]:
        """The place, as plain values."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to a place, from the beginning."""
        ...


class ShuffledActivations:
    """Endless random batches, the same tokens at every hook."""

    def __init__(self, reader: Reader, *, batch_size: int, seed: int) -> None:
        self._reader, self._batch, self._seed = reader, batch_size, seed
        self._number = -1
        self._served = 0
        self._before: dict[str, Any] = {}
        self._bucket: Bucket = {}
        self._order: Int[torch.Tensor, " token"] = torch.empty(0, dtype=torch.int64)

    def bucket(self) -> Bucket:
        """The bucket that batches are dealt from, in the reader's order."""
        if not self._bucket:
            self._open()
        return self._bucket

    def next_batch(self) -> Bucket:
        """Activations ``[batch, width]`` by hook."""
        if self._batch * (self._served + 1) > len(self._order):
            self._open()
        chosen = self._order[self._batch * self._served : self._batch * (self._served + 1)]
        self._served += 1
        return {name: values[chosen.to(values.device)] for name, values in self._bucket.items()}

    def _open(self) -> None:
        n = 0
        for _ in range(_SMALL):
            self._before = self._reader.state()
            self._bucket = self._reader.next_bucket()
            self._number, self._served = self._number + 1, 0
            n = len(next(iter(self._bucket.values())))
            if n >= self._batch:
                generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._number)
                self._order = torch.randperm(n, generator=generator)
                return
        raise EmptySelectionError(
            f"{n} tokens are fewer than one batch of {self._batch}",
            fix="more text, or a smaller batch",
        )

    def state(self) -> dict[str, Any]:
        """The place, as plain values."""
        return {
            "bucket": self._number,
            "served": self._served,
            "before": self._before,
            "after": self._reader.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to a place; nothing may have been read yet."""
        assert self._number == -1, "activations have been read"
        if state["bucket"] < 0:
            return
        self._reader.restore(state["before"])
        self._number = state["bucket"] - 1
        self._open()
        if not 0 <= state["served"] <= len(self._order) // self._batch:
            raise ValueError(f"{state['served']} batches of a bucket of {len(self._order)} tokens")
        self._served = state["served"]
        if self._reader.state() != state["after"]:
            raise BadFileError(
                "The activations are not those of the checkpoint",
                exists=f"{self._reader.state()}, where there was {state['after']}",
                fix="the same text in the same order with the same tokenizer, or the same folder",
            )


class ForwardReader:
    """Buckets of at least ``bucket`` activations from a model and a corpus."""

    def __init__(
        self,
        model: HookedModel,
        stream: TokenStream,
        hooks: Sequence[str],
        *,
        exclude: Sequence[str | int],
        bucket: int,
    ) -> None:
        self._model, self._stream, self._size = model, stream, bucket
        points = model.hook_dict
        self._readings = [reading(model, name, points) for name in hooks]
        self._excluded = special_ids(model, exclude)
        self._whole: Bucket | None = None

    def next_bucket(self) -> Bucket:
        """The next activations."""
        if self._whole is not None:
            return self._whole
        first, parts, n = self._stream.read_batches == 0, [], 0
        while n < self._size:
            rows = self._stream.read()
            if rows is None and (parts or first):
                break
            if rows is not None:
                part = self.run(rows)
                n += len(next(iter(part.values())))
                parts.append(part)
        if n == 0:
            raise EmptySelectionError(
                "The corpus has only excluded tokens" if parts else "The corpus is empty",
                fix="more text, or another exclude=",
            )
        bucket = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        for name, values in bucket.items():
            if not torch.isfinite(values).all():
                raise BadFileError(
                    f"The activations at {name!r} hold values that are not finite",
                    fix="load the model as float32 or bfloat16: float16 overflows on Gemma",
                )
        if first and n < self._size and self._stream.can_repeat:
            self._whole = bucket
        return bucket

    def run(self, rows: Rows) -> Bucket:
        """The activations of some rows of text."""
        keep = kept_positions(rows.tokens, self._excluded) & rows.real
        return read_activations(self._model, self._readings, rows.tokens, keep)

    def state(self) -> dict[str, Any]:
        """The place, as plain values; the beginning if the corpus is one bucket."""
        here = self._stream.state()
        return here if self._whole is None else {"whole": here["checksum"]}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to a place."""
        if "whole" not in state:
            self._stream.restore(state)


@gate(model=check_model)
@torch.no_grad()
def collect_activations(
    model: HookedModel,
    tokens: Int[torch.Tensor, "document pos"],
    hooks: Sequence[str],
    *,
    exclude: Sequence[str | int] = ("bos", "eos", "pad"),
    batch_size: int = 128,
) -> dict[str, Float[torch.Tensor, "token width"]]:
    """Activations of every token that is not excluded, heads flattened.

    Args:
        model: Any supported model.
        tokens: Token ids.
        hooks: Hook names.
        exclude: Special tokens to leave out.
        batch_size: Documents per forward pass.

    Raises:
        MissingHookError: The model has no such hook.
    """
    points = model.hook_dict
    readings = [reading(model, name, points) for name in hooks]
    excluded = special_ids(model, exclude)
    parts = [
        read_activations(model, readings, chunk, kept_positions(chunk, excluded))
        for chunk in to_tokens(model, tokens).split(batch_size)
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in hooks}


@torch.no_grad()
def read_activations(
    model: HookedModel,
    readings: Sequence[Reading],
    tokens: Int[torch.Tensor, "row pos"],
    keep: Bool[torch.Tensor, "row pos"],
) -> dict[str, Float[torch.Tensor, "token width"]]:
    """Activations of some tokens of one forward pass."""
    cache = record(model, tokens, [read.hook for read in readings])
    return {read.name: flatten_heads(read(cache[read.hook]))[keep] for read in readings}
