"""Which features stand for known concepts, into how many they split, and what absorbs them.

Where the concepts of every token are known, as in the bundled corpus, nothing needs a probe. With
``A_i`` the tokens where feature ``i`` is active and ``C`` those where the concept holds:

1. Main feature: the one with the best ``F1 = 2 |A_i & C| / (|A_i| + |C|)``, the lowest index of equals.
   Precision is ``|A_i & C| / |A_i|``, recall ``|A_i & C| / |C|``.
2. Splitting: start with the main feature; again and again add the feature that covers most tokens of
   ``C`` not covered so far, among those with a precision of at least ``min_precision``, as long as that
   raises recall by at least ``min_gain``. The number of features in the end, 1 for no splitting.
3. Absorption: the share of ``C`` where the main feature is silent although a more specific one is
   active. More specific: other than the main feature, ``A_i`` within ``C`` (a share of at least
   ``subset`` of it), active on fewer tokens of ``C`` than the main feature, and on at least
   ``min_tokens`` of them.

Sources: Chanin et al., arXiv 2409.14507, and SAEBench, arXiv 2503.09532. They differ: the concept there
is the first letter of a token, known to a linear probe. *Splitting* there is the ``k`` at which a
k-sparse probe's F1 stops rising by 0.03 (0.03 is kept here); here a union of features' recall, under a
floor of precision, since a union's recall rises with any dense feature. *Absorption* there needs all
split features to be silent and the absorber to have a share of the probe's projection and a cosine with
the probe; here the main feature to be silent and the absorber's tokens to lie within the concept. So a
feature split into unequal parts counts as absorption here, and not there: read both columns together.

Cost: the active entries once, and once more per concept for the tokens where it holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int64

from gemmascope_plugin.errors import EmptySelectionError, InputError, ModelError
from gemmascope_plugin.features.stream import (
    Tokens,
    check_names,
    corpus,
    encoded,
    hooked_for,
    kept_concepts,
)
from gemmascope_plugin.models.gate import gate
from gemmascope_plugin.models.protocol import HookedModel, check_model, describe
from gemmascope_plugin.saes import SparseActs
from gemmascope_plugin.splice import HookedSAE
from gemmascope_plugin.splice.hooked_sae import check_sae
from gemmascope_plugin.types import SAE

COLUMNS = (
    *("concept", "n_tokens", "feature", "precision", "recall", "f1"),
    *("splitting", "absorption", "absorbed_by", "split_features"),
)


@dataclass(frozen=True, kw_only=True)
class _Rules:
    """The numbers in the definitions above."""

    min_gain: float
    min_precision: float
    subset: float
    min_tokens: int


@dataclass(frozen=True, eq=False)
class _Entries:
    """Pairs of token and feature where the feature is active."""

    tokens: Int64[torch.Tensor, " entry"]
    features: Int64[torch.Tensor, " entry"]
    n_tokens: int
    d_sae: int

    def counts(self) -> Int64[torch.Tensor, " d_sae"]:
        """Tokens per feature."""
        return torch.bincount(self.features, minlength=self.d_sae)

    def at(self, where: Bool[torch.Tensor, " token"]) -> _Entries:
        """The entries at some of the tokens."""
        hit = where[self.tokens]
        return _Entries(self.tokens[hit], self.features[hit], self.n_tokens, self.d_sae)

    def of(self, which: Bool[torch.Tensor, " d_sae"]) -> Bool[torch.Tensor, " token"]:
        """The tokens where any of some features is active."""
        mask = torch.zeros(self.n_tokens, dtype=torch.bool, device=self.tokens.device)
        mask[self.tokens[which[self.features]]] = True
        return mask


def _check_active(active: object, call: str = "") -> None:
    """Refuses what does not say where features are active."""
    is_table = isinstance(active, torch.Tensor) and active.ndim == 2
    if not is_table and not isinstance(active, SparseActs):
        raise InputError(
            f"{describe(active)} does not say where features are active",
            exists="a tensor [token, feature], SparseActs",
            fix=f"concept_scores_of(model, sae, tokens, ...), or {call}",
        )


@gate(active=_check_active)
def concept_scores(
    active: Bool[torch.Tensor, "token d_sae"] | SparseActs,
    concepts: Bool[torch.Tensor, "token concept"],
    names: Sequence[str],
    *,
    min_gain: float = 0.03,
    min_precision: float = 0.5,
    subset: float = 1.0,
    min_tokens: int = 5,
) -> Any:
    """Best feature, splitting and absorption of every concept; definitions at the top of this file.

    Args:
        active: Where each feature is active, dense or sparse.
        concepts: Where each concept holds, at the same tokens.
        names: One name per concept.
        min_gain: Rise of recall that a further feature must bring.
        min_precision: Precision that a further feature must have.
        subset: Share of a more specific feature's tokens that must lie within the concept.
        min_tokens: Tokens of the concept on which it must be active.

    Returns:
        A DataFrame, one row per concept in the given order: ``concept``, ``n_tokens``, ``feature``,
        ``precision``, ``recall``, ``f1``, ``splitting``, ``absorption``, ``absorbed_by`` (the
        more specific feature that is most often active where the main one is silent) and
        ``split_features``, the main feature and those that were added to it. A concept that holds
        nowhere, or where no feature is active, has no feature and no absorption (NA and NaN), and a
        splitting of 0.

    Raises:
        ModelError: Tokens or names do not fit together.
        EmptySelectionError: There are no tokens.
    """
    import pandas as pd

    entries = _entries(active)
    _check(entries, concepts, names)
    rules = _Rules(
        min_gain=min_gain, min_precision=min_precision, subset=subset, min_tokens=min_tokens
    )
    fires, holds = entries.counts(), concepts.to(entries.tokens.device)
    rows = [(name, *_score(entries, fires, holds[:, c], rules)) for c, name in enumerate(names)]
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    return frame.astype({"feature": "Int64", "absorbed_by": "Int64"})


@gate(model=check_model, sae=check_sae)
@torch.no_grad()
def concept_scores_of(
    model: HookedModel,
    sae: SAE | HookedSAE,
    tokens: Tokens,
    concepts: Bool[torch.Tensor, "document pos concept"],
    names: Sequence[str],
    *,
    exclude: str | int | Sequence[str | int] = ("bos", "eos", "pad"),
    batch_size: int = 16,
    **rules: Any,
) -> Any:
    """:func:`concept_scores` of a dictionary on documents whose concepts are known.

    Args:
        model: The bare model.
        sae: A JumpReLU SAE or transcoder, or ``HookedSAE(sae, level=...)`` for a level of it.
        tokens: Token ids ``[document, pos]``.
        concepts: Where each concept holds.
        names: One name per concept.
        exclude: Special tokens to leave out, of the concepts too.
        batch_size: Documents per forward pass.
        **rules: ``min_gain``, ``min_precision``, ``subset`` and ``min_tokens``.

    Raises:
        ModelError: Tokens, concepts or names do not fit together; not a JumpReLU dictionary.
        EmptySelectionError: No token, or excluded ones only.
    """
    text = corpus(model, tokens, exclude, batch_size)
    here = kept_concepts(text, concepts)
    active = encoded(model, hooked_for(sae, text.exclude), text)
    return concept_scores(active, here, names, **rules)


def _score(
    entries: _Entries,
    fires: Int64[torch.Tensor, " d_sae"],
    holds: Bool[torch.Tensor, " token"],
    rules: _Rules,
) -> tuple[int, int | None, float, float, float, int, float, int | None, tuple[int, ...]]:
    n, inside = int(holds.sum()), entries.at(holds)
    if not n or not len(inside.tokens):
        nothing = 0.0 if n else math.nan
        return n, None, math.nan, nothing, nothing, 0, math.nan, None, ()
    both = inside.counts()
    main = int(((2 * both).double() / (fires + n)).argmax())
    hit = int(both[main])
    precision, recall = hit / int(fires[main]), hit / n
    absorption, by = _absorption(inside, fires, both, main, n, rules)
    f1 = 2 * hit / (int(fires[main]) + n)
    split = _split(inside, fires, main, n, rules)
    return n, main, precision, recall, f1, len(split), absorption, by, split


def _split(
    inside: _Entries, fires: Int64[torch.Tensor, " d_sae"], main: int, n: int, rules: _Rules
) -> tuple[int, ...]:
    """Features until recall stops rising; ``inside`` are the entries of the concept."""
    allowed = inside.counts().double() / fires.clamp(min=1) >= rules.min_precision
    remaining, mains = inside, [main]
    while True:
        chosen = torch.zeros_like(allowed)
        chosen[mains[-1]] = True
        remaining = remaining.at(~remaining.of(chosen))
        gain = remaining.counts() * allowed
        best = int(gain.argmax())
        if not int(gain[best]) or int(gain[best]) / n < rules.min_gain:
            return tuple(mains)
        mains.append(best)


def _absorption(
    inside: _Entries,
    fires: Int64[torch.Tensor, " d_sae"],
    both: Int64[torch.Tensor, " d_sae"],
    main: int,
    n: int,
    rules: _Rules,
) -> tuple[float, int | None]:
    """Share of the concept's ``n`` tokens that are absorbed, and the feature that absorbs most."""
    specific = (both >= rules.subset * fires) & (both < both[main]) & (both >= rules.min_tokens)
    is_main = torch.zeros_like(specific)
    is_main[main] = True
    silent = inside.at(~inside.of(is_main))
    absorbed = int(silent.of(specific).sum())
    if not absorbed:
        return 0.0, None
    return absorbed / n, int((silent.counts() * specific).argmax())


def _entries(active: torch.Tensor | SparseActs) -> _Entries:
    if isinstance(active, SparseActs):
        is_active = active.values > 0
        return _Entries(
            active.rows[is_active], active.indices[is_active], active.n_tokens, active.d_sae
        )
    tokens, features = active.nonzero(as_tuple=True)
    return _Entries(tokens, features, *active.shape)


def _check(entries: _Entries, concepts: torch.Tensor, names: Sequence[str]) -> None:
    if len(concepts) != entries.n_tokens:
        raise ModelError(
            f"The concepts are given for {len(concepts)} tokens, the features for "
            f"{entries.n_tokens}",
            fix="both for the same tokens; concept_scores_of(model, sae, tokens, ...) sees to it",
        )
    check_names(concepts, names)
    if not entries.n_tokens:
        raise EmptySelectionError("There are no tokens", fix="at least one token with its concepts")
