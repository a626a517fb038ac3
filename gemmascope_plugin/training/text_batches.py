"""Text of any form as batches of token ids, in one order, from any place of it.

1. Strings are tokenised, cut into pieces of ``context`` tokens, each with BOS in front, and put into one
   random order; the rows of ids (a tensor, an array, lists, a tokenizer's output) and conversations are
   put into one random order too. Padding in front of ids is moved behind their end.
2. Anything else is iterated: every item is a batch ``[row, pos]``, used as it comes. What can be iterated
   again is read again when it ends; a mere iterator is read once.
3. The place is the number of batches read, with a checksum of all of them, which tells other text apart
   when the place is gone to again.

Cost: tokenising once; going to a place reads all tokens before it, without the model.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int

from gemmascope_plugin.errors import EmptySelectionError, InputError, ModelError
from gemmascope_plugin.models.prompts import pad_id, read_prompts
from gemmascope_plugin.models.protocol import HookedModel, describe, device_of
from gemmascope_plugin.models.tokens import text_ids

Corpus = str | Iterable[Any]
"""One text, texts, token ids ``[row, pos]`` of any kind, conversations, or batches of ids."""

_EXISTS = "texts, token ids [row, pos], or an iterable of batches of token ids"


class Rows(NamedTuple):
    """Token ids, and where they are real: False at what fills up short rows."""

    tokens: Int[torch.Tensor, "row pos"]
    real: Bool[torch.Tensor, "row pos"]


class TokenStream:
    """Batches of token ids from a corpus."""

    def __init__(
        self, model: HookedModel, corpus: Corpus, *, context: int, rows: int, seed: int
    ) -> None:
        self._model = model
        _check_kind(corpus)
        if isinstance(corpus, str) or _are_texts(corpus) or _are_rows(corpus):
            pieces = _pieces(model, corpus, context)
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(len(pieces), generator=generator).tolist()
            self._batches: Any = _Padded(pieces, order, rows, pad_id(model))
        else:
            self._batches = corpus
        self._items: Iterator[Any] | None = iter(self._batches)
        self.can_repeat = self._items is not self._batches
        self.read_batches = 0
        self._checksum = 0

    def read(self) -> Rows | None:
        """The next batch; None where the corpus ends, after which it begins again."""
        if self._items is None:
            if not self.can_repeat:
                raise EmptySelectionError(
                    f"The corpus ended after {self.read_batches} batches of text",
                    fix="something that can be iterated again, more text, or fewer steps",
                )
            self._items = iter(self._batches)
        item = next(self._items, None)
        if item is None:
            self._items = None
            return None
        batch = _batch(self._model, item)
        self.read_batches += 1
        self._checksum = zlib.crc32(batch.tokens.cpu().numpy().tobytes(), self._checksum)
        device = device_of(self._model)
        return Rows(batch.tokens.to(device), batch.real.to(device))

    def state(self) -> dict[str, Any]:
        """The place, as plain values."""
        return {
            "batches": self.read_batches,
            "checksum": self._checksum,
            "between_epochs": self._items is None,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to a place; the stream must be at its beginning."""
        assert self.read_batches == 0, "the stream has been read from"
        while self.read_batches < state["batches"]:
            self.read()
        if state["between_epochs"]:
            self._items = None


class _Padded:
    """Pieces of text in a fixed order, in batches filled up at the right."""

    def __init__(
        self, pieces: Sequence[torch.Tensor], order: list[int], rows: int, filler: int
    ) -> None:
        self.pieces, self.order, self.rows, self.filler = pieces, order, rows, filler

    def __iter__(self) -> Iterator[Rows]:
        for start in range(0, len(self.order), self.rows):
            pieces = [self.pieces[i] for i in self.order[start : start + self.rows]]
            tokens = torch.nn.utils.rnn.pad_sequence(pieces, True, self.filler)
            length = torch.tensor([len(piece) for piece in pieces])
            yield Rows(tokens, torch.arange(tokens.shape[1]) < length[:, None])


def _check_kind(corpus: object) -> None:
    """Refuses what is not a corpus, and the name of a file."""
    is_file = isinstance(corpus, str) and _is_file(corpus)
    if is_file or isinstance(corpus, Path):
        raise ModelError(
            f"{str(corpus)!r} is a file, and its text is meant",
            exists=_EXISTS,
            fix="Path(file).read_text().splitlines(), one document per line",
        )
    is_mapping = isinstance(corpus, Mapping) and "input_ids" not in corpus
    if is_mapping or not isinstance(corpus, Iterable):
        raise ModelError(f"{describe(corpus)} is not a corpus", exists=_EXISTS)


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # a text too long for a name, or with characters that none has
        return False


def _are_texts(corpus: object) -> bool:
    return isinstance(corpus, Sequence) and all(isinstance(item, str) for item in corpus)


def _are_rows(corpus: object) -> bool:
    """Whether it is ids or conversations, all of them at hand, and not batches of ids."""
    if isinstance(corpus, Mapping) or hasattr(corpus, "__array__"):
        return True
    return isinstance(corpus, Sequence) and not any(map(_is_batch, corpus))


def _is_batch(item: object) -> bool:
    """An array or a tokenizer's output."""
    return hasattr(item, "__array__") or (isinstance(item, Mapping) and "input_ids" in item)


def _pieces(model: HookedModel, corpus: Corpus, context: int) -> Sequence[torch.Tensor]:
    """What is read as one piece: rows of ids as they are, texts cut to the context."""
    if not isinstance(corpus, str) and not _are_texts(corpus):
        return [row.cpu() for row in read_prompts(model, corpus).rows()]
    texts = [text for text in ([corpus] if isinstance(corpus, str) else corpus) if text.strip()]
    if not texts:
        raise EmptySelectionError("The corpus is empty", fix="at least one text with a word")
    context = min(context, getattr(model.cfg, "n_ctx", None) or context)
    pieces = []
    for text in texts:
        ids = text_ids(model, text)
        bos, rest = ids[:1], ids[1:]
        pieces += [torch.cat([bos, part]) for part in rest.split(context - 1)]
    return pieces


def _batch(model: HookedModel, item: object) -> Rows:
    """A batch of token ids with a row axis, padding behind the end."""
    if isinstance(item, Rows):
        return item
    if not _is_batch(item):
        raise InputError(
            f"{describe(item)} is not a batch of token ids",
            exists="integer tensors [row, pos]",
            fix="list(corpus), where it is an iterator over texts",
        )
    prompts = read_prompts(model, item)
    if bool(prompts.mask[:, 0].all()):
        return Rows(prompts.tokens, prompts.mask)
    tokens, lengths = prompts.packed()
    return Rows(tokens, torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None])
