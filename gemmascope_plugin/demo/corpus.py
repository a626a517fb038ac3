"""Documents of the bundled corpus as token tensors, and labels by the concepts that hold at each token.

1. A document is ``<bos> sentence . sentence . ... <eos>`` of at most ``length`` tokens, padded with
   ``<pad>`` on the right. Sentences are drawn until the next one would not fit.
2. Concepts are the grammar's roles and the identity of the word (``word=to``). They come as a boolean
   matrix over the tokens, one column per concept, built on request only.
3. A feature's label is the concept with the best F1 (``features/cooccurrence.py``); precision is the
   share of the feature's tokens where the concept holds, recall the share of the concept's tokens where
   the feature is active.

Cost: about 40 microseconds per sentence; for labels the meetings of active features with concepts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from jaxtyping import Bool, Int

import gemmascope_plugin.demo.grammar as grammar
import gemmascope_plugin.demo.lexicon as lexicon
from gemmascope_plugin.features.cooccurrence import MIN_F1, best_concepts
from gemmascope_plugin.saes import SparseActs

DOCUMENT_LENGTH = 64
"""Tokens per document, four times the local attention window."""

TRAIN_SEED, HELD_OUT_SEED = 1000, 2000
"""Of the suite's documents."""

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
    """Ids of known words."""
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


def token_batches(batch_size: int, seed: int) -> Iterator[Int[torch.Tensor, "batch pos"]]:
    """An endless stream of document batches."""
    rng = Random(seed)
    while True:
        docs = [encode_words(document(rng).words) for _ in range(batch_size)]
        yield torch.tensor(docs)


@dataclass(frozen=True)
class Label:
    """What a feature stands for, and how well the description fits."""

    concept: str
    precision: float
    """Share of the tokens on which the feature is active where the concept holds."""
    recall: float
    """Share of the concept's tokens on which the feature is active."""
    f1: float

    def __str__(self) -> str:
        return f"{self.concept} (precision {self.precision:.2f}, recall {self.recall:.2f})"


def label_features(
    active: Bool[torch.Tensor, "token d_sae"],
    concepts: Bool[torch.Tensor, "token concept"],
    names: Sequence[str],
) -> dict[int, Label]:
    """The best concept of every feature whose F1 reaches ``MIN_F1``, by feature."""
    best = best_concepts(SparseActs.from_dense(active.float()), concepts)
    labels = {}
    for i in (best.f1 >= MIN_F1).nonzero().flatten().tolist():
        scores = (float(best.precision[i]), float(best.recall[i]), float(best.f1[i]))
        labels[i] = Label(names[int(best.concept[i])], *(round(score, 4) for score in scores))
    return labels


def labels_to_json(labels: dict[int, Label]) -> dict[str, list[Any]]:
    """Compact form: feature to ``[concept, precision, recall, f1]``."""
    return {str(i): [x.concept, x.precision, x.recall, x.f1] for i, x in labels.items()}


def labels_from_json(rows: dict[str, list[Any]]) -> dict[int, Label]:
    """Inverse of :func:`labels_to_json`."""
    return {int(i): Label(*row) for i, row in rows.items()}
