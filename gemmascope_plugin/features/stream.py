"""A corpus read batch by batch: which tokens count, and what is at a dictionary's sites there.

1. Documents are cut into batches; nothing is kept from one batch to the next.
2. A token counts unless it is excluded (BOS, EOS, PAD by default, as Gemma Scope was trained). A next
   token loss is read at a token that counts, unless padding follows.
3. The output site of a transcoder is another tensor than its input site; both are read in one pass.
4. Known concepts are given for all tokens and read at those that count.

Cost: one forward pass per sweep over the corpus, up to the last site, and memory for one batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int

from gemmascope_plugin.errors import EmptySelectionError, ModelError, WidthMismatchError
from gemmascope_plugin.models import flatten_heads, special_ids
from gemmascope_plugin.models.points import reading
from gemmascope_plugin.models.prompts import documents
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.models.record import record, refuse_compiled
from gemmascope_plugin.models.tokens import kept_positions
from gemmascope_plugin.saes import SparseActs
from gemmascope_plugin.splice import HookedSAE
from gemmascope_plugin.types import SAE

Tokens = Any
"""Token ids ``[document, pos]``, several such tensors for documents of several lengths, or texts."""


@dataclass(frozen=True, eq=False)
class Corpus:
    """Token ids in batches, with the ids that are left out."""

    batches: tuple[torch.Tensor, ...]
    excluded: frozenset[int]
    padding: frozenset[int]
    exclude: tuple[str | int, ...]
    """The excluded tokens as they were named."""

    def kept(self, tokens: Int[torch.Tensor, "batch pos"]) -> Bool[torch.Tensor, "batch pos"]:
        """True at tokens that count."""
        return kept_positions(tokens, self.excluded)

    def readable(self, tokens: Int[torch.Tensor, "batch pos"]) -> Bool[torch.Tensor, "batch next"]:
        """True where a loss is read: at tokens that count and are not followed by padding."""
        return self.kept(tokens)[:, :-1] & kept_positions(tokens, self.padding)[:, 1:]


def corpus(
    model: HookedModel, tokens: Tokens, exclude: str | int | Sequence[str | int], batch_size: int
) -> Corpus:
    """Token ids as batches on the model's device."""
    if batch_size < 1:
        raise ModelError(
            f"batch_size={batch_size} documents per pass is less than one", fix="batch_size=16"
        )
    named = (exclude,) if isinstance(exclude, (str, int)) else tuple(exclude)
    parts = [part for rows in documents(model, tokens) for part in rows.split(batch_size)]
    excluded = special_ids(model, named)
    padding = special_ids(model, ("pad",)) if model.tokenizer is not None else frozenset()
    if not any(bool(kept_positions(part, excluded).any()) for part in parts):
        raise EmptySelectionError(
            "The corpus has only excluded tokens" if parts else "The corpus has no documents",
            exists=f"{sum(part.numel() for part in parts)} tokens, exclude={named}",
            fix="documents with at least one word, or exclude=()",
        )
    return Corpus(tuple(parts), excluded, padding, named)


def hooked_for(sae: SAE | HookedSAE, exclude: tuple[str | int, ...]) -> HookedSAE:
    """A dictionary, or its level, that drops the error and leaves the excluded tokens alone.

    Of a :class:`HookedSAE` the level counts, and its other options do not.
    """
    if not isinstance(sae, HookedSAE):
        return HookedSAE(sae, error="drop", exclude=exclude)
    if sae.positions is not None:
        raise ModelError(
            "The dictionary works at chosen positions only, and a corpus is measured at all",
            fix="HookedSAE(sae) without positions=",
        )
    return HookedSAE(sae.sae, error="drop", exclude=exclude, level=sae.level)


@torch.no_grad()
def site_tensors(
    model: HookedModel, hooked: HookedSAE, text: Corpus
) -> Iterator[tuple[Float[torch.Tensor, "token d_in"], Float[torch.Tensor, "token d_out"]]]:
    """Input and target of the dictionary at the tokens that count, one batch at a time."""
    refuse_compiled(model)
    read = reading(model, hooked.hook_in)
    write = reading(model, hooked.hook_out) if hooked.is_transcoder else read
    device = hooked.weights.W_dec.device
    for tokens in text.batches:
        keep = text.kept(tokens)
        cache = record(model, tokens, [read.hook, write.hook])
        x = flatten_heads(read(cache[read.hook]))[keep].to(device)
        y = flatten_heads(write(cache[write.hook]))[keep].to(device)
        names = (hooked.hook_in, hooked.hook_out)
        for name, tensor, width in zip(names, (x, y), hooked.widths, strict=True):
            if tensor.shape[-1] != width:
                raise WidthMismatchError(
                    f"The dictionary has width {width}, the model's {name} has {tensor.shape[-1]}",
                    fix=f"a dictionary of this model; this one says {hooked.model_name}",
                )
        yield x, y


def joined(parts: Sequence[SparseActs]) -> SparseActs:
    """The tokens of several records of one dictionary, one after another."""
    lengths = torch.cat([part.offsets.diff() for part in parts])
    return SparseActs(
        torch.nn.functional.pad(lengths.cumsum(0), (1, 0)),
        torch.cat([part.indices for part in parts]),
        torch.cat([part.values for part in parts]),
        (len(lengths), parts[0].d_sae),
    )


def encoded(model: HookedModel, hooked: HookedSAE, text: Corpus) -> SparseActs:
    """The dictionary's activations at the tokens that count."""
    return joined([hooked.weights.encode_sparse(x) for x, _ in site_tensors(model, hooked, text)])


def kept_concepts(
    text: Corpus, concepts: Bool[torch.Tensor, "document pos concept"]
) -> Bool[torch.Tensor, "token concept"]:
    """Known concepts at the tokens that count."""
    shapes = [tuple(part.shape) for part in text.batches]
    documents = sum(n for n, _ in shapes)
    if {(documents, pos) for _, pos in shapes} != {tuple(concepts.shape[:2])}:
        raise ModelError(
            f"The concepts are given for {list(concepts.shape[:2])} tokens, and the documents are "
            f"{shapes[0] if len(shapes) == 1 else shapes}",
            fix="concepts [document, pos, concept] for tokens [document, pos]",
        )
    keep = torch.cat([text.kept(part) for part in text.batches]).to(concepts.device)
    return concepts[keep]


def check_names(concepts: Bool[torch.Tensor, "*tokens concept"], names: Sequence[str]) -> None:
    """Refuses names that do not fit the concepts."""
    if len(names) != concepts.shape[-1]:
        raise ModelError(
            f"{len(names)} names were given for {concepts.shape[-1]} concepts",
            fix="one name per column of concepts",
        )


def check_concepts(concepts: torch.Tensor | None, names: Sequence[str] | None) -> None:
    """Refuses concepts without names, names without concepts, and names that do not fit."""
    if (concepts is None) != (names is None):
        present, missing = ("names", "concepts") if concepts is None else ("concepts", "names")
        raise ModelError(
            f"There are {present} and no {missing}",
            fix="both concepts= and names=, or neither of them",
        )
    if concepts is not None and names is not None:
        check_names(concepts, names)
