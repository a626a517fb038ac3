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
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int

from gemmascope_plugin.errors import EmptySelectionError, ModelError
from gemmascope_plugin.models.chat import is_chat
from gemmascope_plugin.models.prompts import check_context, read_prompts, text_ids
from gemmascope_plugin.models.protocol import HookedModel, device_of

Corpus = str | Sequence[str] | torch.Tensor | Iterable[torch.Tensor]
"""One text, texts, token ids ``[row, pos]`` of any kind, conversations, or batches of ids."""


class Rows(NamedTuple):
    """Token ids, and where they are real: False at what fills up short rows."""

    tokens: Int[torch.Tensor, "row pos"]
    real: Bool[torch.Tensor, "row pos"]


class TokenStream:
    """Batches of token ids from a corpus.

    Args:
        model: Whose tokenizer and device count.
        corpus: Texts or token ids.
        context: Longest row made of texts, BOS included.
        rows: Rows per batch, where batches are not given.
        seed: Of the order of rows.

    Raises:
        EmptySelectionError: There is no text.
        ModelError: What is given is no corpus, or text without a tokenizer.
    """

    def __init__(
        self, model: HookedModel, corpus: Any, *, context: int, rows: int, seed: int
    ) -> None:
        self._model = model
        if isinstance(corpus, (str, torch.Tensor)) or _are_texts(corpus):
            pieces = _pieces(model, corpus, context)
        elif _are_prompts(corpus):
            pieces = read_prompts(model, corpus).rows()
        else:
            pieces = None
        if pieces is not None:
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(len(pieces), generator=generator).tolist()
            self._batches: Any = _Padded(pieces, order, rows, _filler(model))
        elif isinstance(corpus, Iterable):
            self._batches = corpus
        else:
            raise ModelError(
                f"A {type(corpus).__name__} is no corpus",
                exists="texts, token ids [row, pos], or an iterable of batches of token ids",
            )
        self._given: Iterator[Any] | None = iter(self._batches)
        self.can_repeat = self._given is not self._batches
        self.read_batches = 0
        self._checksum = 0

    def read(self) -> Rows | None:
        """The next batch; None where the corpus ends, after which it begins again.

        Raises:
            EmptySelectionError: The corpus can be read only once and has ended.
            ModelError: An item is no batch of token ids.
        """
        if self._given is None:
            if not self.can_repeat:
                raise EmptySelectionError(
                    f"The corpus ended after {self.read_batches} batches of text",
                    fix="something that can be iterated again, more text, or fewer steps",
                )
            self._given = iter(self._batches)
        item = next(self._given, None)
        if item is None:
            self._given = None
            return None
        batch = _packed(self._model, _checked(item))
        check_context(self._model, batch.tokens.shape[1])
        self.read_batches += 1
        self._checksum = zlib.crc32(batch.tokens.cpu().numpy().tobytes(), self._checksum)
        device = device_of(self._model)
        return Rows(batch.tokens.to(device), batch.real.to(device))

    def state(self) -> dict[str, Any]:
        """The place, as plain values."""
        return {
            "batches": self.read_batches,
            "checksum": self._checksum,
            "between_epochs": self._given is None,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to a place; the stream must be at its beginning.

        Raises:
            EmptySelectionError: The corpus ends before it.
        """
        assert self.read_batches == 0, "the stream has been read from"
        while self.read_batches < state["batches"]:
            self.read()
        if state["between_epochs"]:
            self._given = None


class _Padded:
    """Pieces of text in a fixed order, in batches filled up at the right."""

    def __init__(
        self, pieces: Sequence[torch.Tensor], order: list[int], rows: int, filler: int
    ) -> None:
        self.pieces, self.order, self.rows, self.filler = pieces, order, rows, filler

    def __iter__(self) -> Iterator[Rows]:
        for start in range(0, len(self.order), self.rows):
            own = [self.pieces[i] for i in self.order[start : start + self.rows]]
            tokens = torch.nn.utils.rnn.pad_sequence(own, True, self.filler)
            length = torch.tensor([len(piece) for piece in own])
            yield Rows(tokens, torch.arange(tokens.shape[1]) < length[:, None])


def _are_texts(corpus: Any) -> bool:
    return isinstance(corpus, Sequence) and all(isinstance(item, str) for item in corpus)


def _are_prompts(corpus: Any) -> bool:
    """Whether something is ids or conversations, and not batches of ids."""
    if isinstance(corpus, Mapping) or (
        hasattr(corpus, "__array__") and not isinstance(corpus, torch.Tensor)
    ):
        return True
    if not isinstance(corpus, (list, tuple)) or not corpus:
        return False
    return is_chat(corpus) or all(isinstance(row, (list, tuple, Mapping)) for row in corpus)


def _packed(model: HookedModel, batch: Rows) -> Rows:
    """Padding in front moved behind the end: attended to, it would change what is learnt."""
    if not bool((batch.tokens[:, 0] == _filler(model)).any()) or not bool(batch.real.all()):
        return batch
    tokens, lengths = read_prompts(model, batch.tokens).packed()
    at = torch.arange(tokens.shape[1], device=tokens.device)
    return Rows(tokens, at < lengths[:, None])


def _filler(model: HookedModel) -> int:
    pad = None if model.tokenizer is None else model.tokenizer.pad_token_id
    return 0 if pad is None else int(pad)


def _pieces(
    model: HookedModel, corpus: str | Sequence[str] | torch.Tensor, context: int
) -> Sequence[torch.Tensor]:
    if isinstance(corpus, torch.Tensor):
        batch = _packed(model, _checked(corpus))
        if bool(batch.real.all()):
            return list(batch.tokens.cpu())
        return [ids[real].cpu() for ids, real in zip(batch.tokens, batch.real, strict=True)]
    texts = [text for text in ([corpus] if isinstance(corpus, str) else corpus) if text.strip()]
    if not texts:
        raise EmptySelectionError("The corpus is empty", fix="at least one text with a word")
    pieces = []
    for text in texts:
        ids = text_ids(model, text)
        bos, rest = ids[:1], ids[1:]
        pieces += [torch.cat([bos, part]) for part in rest.split(context - 1)]
    return pieces


def _checked(item: Any) -> Rows:
    """A batch of token ids with a row axis.

    Raises:
        EmptySelectionError: It has no tokens.
        ModelError: It holds something else.
    """
    if isinstance(item, Rows):
        return item
    if not isinstance(item, torch.Tensor) or item.is_floating_point() or item.ndim not in (1, 2):
        shape = f" {list(item.shape)} of {item.dtype}" if isinstance(item, torch.Tensor) else ""
        raise ModelError(
            f"A {type(item).__name__}{shape} is no batch of token ids",
            exists="integer tensors [row, pos]",
        )
    tokens = item if item.ndim == 2 else item[None]
    if tokens.numel() == 0:
        raise EmptySelectionError("The corpus has a batch without tokens")
    return Rows(tokens.long(), torch.ones_like(tokens, dtype=torch.bool))
