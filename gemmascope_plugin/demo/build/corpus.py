"""Documents of the bundled corpus as token tensors, with the concepts that hold at each token.

1. A document is ``<bos> sentence . sentence . ... <eos>`` of at most ``length`` tokens, padded with
   ``<pad>`` on the right.
2. Sentences are drawn until the next one would not fit.
3. Concepts come as a boolean matrix over the tokens, one column per concept, built on request only.

Cost: about 40 microseconds per sentence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import torch
from jaxtyping import Bool, Int

import gemmascope_plugin.demo.grammar as grammar
import gemmascope_plugin.demo.lexicon as lexicon

DOCUMENT_LENGTH = 64
"""Tokens per document, four times the local attention window."""

_IDS = {word: i for i, word in enumerate(lexicon.vocabulary())}


@dataclass(frozen=True)
class Corpus:
    """Token ids with the concepts that hold at each token."""

    tokens: Int[torch.Tensor, "document pos"]
    concepts: tuple[tuple[frozenset[str], ...], ...]
    """Concepts per document and position; empty at special tokens and full stops."""

    def concept_matrix(self) -> tuple[list[str], Bool[torch.Tensor, "document pos concept"]]:
        """All concepts, grammar roles and ``word=...`` identities, as one boolean tensor."""
        roles = sorted({c for doc in self.concepts for token in doc for c in token})
        words = [f"word={word}" for word in lexicon.vocabulary()]
        column = {name: i for i, name in enumerate(roles)}
        marks = torch.zeros(*self.tokens.shape, len(roles), dtype=torch.bool)
        for d, doc in enumerate(self.concepts):
            for p, token in enumerate(doc):
                for name in token:
                    marks[d, p, column[name]] = True
        identity = torch.nn.functional.one_hot(self.tokens, len(words)).bool()
        return roles + words, torch.cat([marks, identity], -1)


def encode_words(words: list[str]) -> list[int]:
    """Ids of known words.

    Raises:
        KeyError: A word is not in the vocabulary; the grammar never produces one.
    """
    return [_IDS[word] for word in words]


def document(rng: Random, length: int = DOCUMENT_LENGTH) -> grammar.Sentence:
    """One document, special tokens included, padded to ``length`` words."""
    doc = grammar.Sentence().add(lexicon.BOS)
    while True:
        sentence = grammar.random_sentence(rng)
        if len(doc.words) + len(sentence.words) + 2 > length:
            break
        doc.words += sentence.words
        doc.concepts += sentence.concepts
        doc.add(".", "end_of_sentence")
    doc.add(lexicon.EOS)
    return doc.add(" ".join([lexicon.PAD] * (length - len(doc.words))))


def make_corpus(n_documents: int, seed: int, length: int = DOCUMENT_LENGTH) -> Corpus:
    """``n_documents`` documents; the same seed gives the same corpus."""
    rng = Random(seed)
    docs = [document(rng, length) for _ in range(n_documents)]
    tokens = torch.tensor([encode_words(doc.words) for doc in docs])
    return Corpus(tokens, tuple(tuple(doc.concepts) for doc in docs))


def token_batches(
    batch_size: int, seed: int, length: int = DOCUMENT_LENGTH
) -> Iterator[Int[torch.Tensor, "batch pos"]]:
    """An endless stream of document batches."""
    rng = Random(seed)
    while True:
        docs = [encode_words(document(rng, length).words) for _ in range(batch_size)]
        yield torch.tensor(docs)
