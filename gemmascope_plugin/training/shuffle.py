"""Random batches out of buckets of activations, from any place.

1. A reader gives bucket after bucket: from a model (``forward_reader.py``) or from disk (``store.py``).
2. The tokens of a bucket are put into a random order that follows from the seed and the bucket's number
   alone, and dealt out in batches; what is left over at the end, less than a batch, is dropped. Gemma
   Scope shuffled in buckets of about a million (arXiv 2408.05147, section 3.1).
3. The place is the reader's place before the bucket and the number of batches dealt: a few numbers, no
   activations. Going there reads one bucket.

Cost: one permutation per bucket and one gather per batch; memory is one bucket.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int

from gemmascope_plugin.errors import BadFileError, EmptySelectionError

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
