"""Activations on the fly: buckets of them, collected at several hooks by one forward pass.

1. Rows of text go through the model up to the last layer that is read; the tensors at all hooks are kept
   at the tokens that are neither excluded nor filled up (``models/points.py`` says what).
2. Passes are strung together until a bucket is full, or the corpus ends.
3. A corpus that fits into one bucket goes through the model once only.
4. The place of a bucket is that of its first row in the corpus.

``collect_activations`` reads all tokens of some documents at once, in memory.

Cost: one partial forward pass per row of text; memory ``bucket * sum of widths`` in the model's type.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int

from gemmascope_plugin.errors import BadFileError, EmptySelectionError
from gemmascope_plugin.models import flatten_heads, special_ids, to_tokens
from gemmascope_plugin.models.gate import gate
from gemmascope_plugin.models.points import Reading, reading
from gemmascope_plugin.models.protocol import HookedModel, check_model
from gemmascope_plugin.models.record import record
from gemmascope_plugin.models.tokens import kept_positions
from gemmascope_plugin.training.shuffle import Bucket
from gemmascope_plugin.training.text_batches import Rows, TokenStream


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
