"""Absorption with a probe for each concept, as SAEBench measures it: who carries a concept in silence?

Chanin et al., arXiv 2409.14507, and SAEBench, arXiv 2503.09532, with its thresholds. ``y`` is the tensor
at the output site, centred, ``p`` the unit direction of a logistic probe for the concept (``probe.py``):

1. Tokens that count: those of the concept that the probe tells right, its threshold on ``y . p`` being
   the one with the best F1. Concepts with a probe of a lower F1 than ``min_probe_f1`` have no figures.
2. Main features: the best one and those that it is split into (``concepts.py``).
3. What feature ``i`` adds along the probe: ``f_i * s * (W_dec[i] . p)``, with ``s`` the token's scale.
4. Full absorption: no main feature is active, and the feature that adds most has a cosine of at least
   0.025 with ``p`` and makes up at least 0.4 of ``y . p``.
5. Absorption fraction: with ``M`` what the main features add, and ``B`` what the three others with the
   largest parts add, of those with a cosine of at least 0.1: ``a / (a + M)`` with ``a = min(B, y . p -
   M)``, 1 where ``M <= 0``; 0 where ``M >= y . p`` or ``B`` is less than 0.4 of ``y . p``.

SAEBench differs: concepts are first letters, main features are found by sparse probes, ``y`` is not
centred. ``concepts.py`` has another absorption, without probes, from where features are active alone.

Cost: one forward pass and one encode of the corpus, the probes, and per concept one product of the
decoder with ``p`` and a few passes over the active entries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float

from gemmascope_plugin.errors import EmptySelectionError, ModelError
from gemmascope_plugin.features.stream import (
    Corpus,
    Tokens,
    check_names,
    corpus,
    hooked_for,
    joined,
    kept_concepts,
    site_tensors,
)
from gemmascope_plugin.measures.concepts import concept_scores
from gemmascope_plugin.measures.probe import train_probes
from gemmascope_plugin.models.gate import gate
from gemmascope_plugin.models.protocol import HookedModel, check_model
from gemmascope_plugin.saes import SparseActs
from gemmascope_plugin.splice import HookedSAE
from gemmascope_plugin.splice.hooked_sae import check_sae
from gemmascope_plugin.types import SAE

FULL_COSINE, FRACTION_COSINE = 0.025, 0.1
"""Least cosine of an absorber with the probe, for full absorption and for the fraction."""
SHARE = 0.4
"""Least share of the token's projection that absorbers make up."""
ABSORBERS = 3
"""Features that can stand in for the main ones together, in the fraction."""


@dataclass(frozen=True, eq=False)
class _Along:
    """One concept's probe and what the dictionary adds along it."""

    acts: SparseActs
    parts: Float[torch.Tensor, " entry"]
    """What each active entry adds."""
    cosine: Float[torch.Tensor, " d_sae"]
    whole: Float[torch.Tensor, " token"]
    """``y . p``."""


@gate(model=check_model, sae=check_sae)
def probe_absorption(
    model: HookedModel,
    sae: SAE | HookedSAE,
    tokens: Tokens,
    concepts: Bool[torch.Tensor, "document pos concept"],
    names: Sequence[str],
    *,
    min_tokens: int = 20,
    min_probe_f1: float | int = 0.8,
    steps: int = 500,
    seed: int = 0,
    exclude: str | int | Sequence[str | int] = ("bos", "eos", "pad"),
    batch_size: int = 16,
) -> Any:
    """Absorption of every concept; definitions at the top of this file.

    Args:
        model: The bare model.
        sae: A dictionary with one site, or ``HookedSAE(sae, level=...)`` for a level of it.
        tokens: Token ids ``[document, pos]``.
        concepts: Where each concept holds.
        names: One name per concept.
        min_tokens: Tokens on which a concept must hold, and must not.
        min_probe_f1: Least F1 of a concept's probe.
        steps: Training steps of the probes.
        seed: Of the order of their tokens.
        exclude: Special tokens to leave out, of the concepts too.
        batch_size: Documents per forward pass.

    Returns:
        A DataFrame, one row per concept in the given order: ``concept``, ``n_tokens``, ``probe_f1``,
        ``n_right`` (tokens that count), ``full_absorption`` and ``absorption_fraction``, means over
        them; NaN for concepts that are too rare, have no feature, or no good probe.

    Raises:
        ModelError: Tokens, concepts or names do not fit together; not a dictionary with one site.
        EmptySelectionError: No token, excluded ones only, or no concept that is frequent enough.
    """
    import pandas as pd

    check_names(concepts, names)
    if not 0 <= min_probe_f1 <= 1:
        raise ModelError(f"min_probe_f1={min_probe_f1} is not an F1", exists="numbers from 0 to 1")
    text = corpus(model, tokens, exclude, batch_size)
    holds = kept_concepts(text, concepts)
    n = holds.sum(0)
    is_scored = (n >= max(min_tokens, 1)) & (len(holds) - n >= max(min_tokens, 1))
    if not bool(is_scored.any()):
        raise EmptySelectionError(
            f"No concept holds on {min_tokens} tokens and not on as many others",
            fix="more documents, or a smaller min_tokens",
        )
    hooked = hooked_for(sae, text.exclude)
    acts, y, scale = _read(model, hooked, text)
    columns = is_scored.nonzero()[:, 0].tolist()
    rng = torch.Generator().manual_seed(seed)
    probes = train_probes(y, holds[:, is_scored].to(y.device), steps=steps, rng=rng)
    mains = concept_scores(acts, holds, names)["split_features"]
    rows = {}
    for column, probe in zip(columns, probes, strict=True):
        along = _along(acts, y - y.mean(0), scale, hooked.weights.W_dec, probe)
        holds_here = holds[:, column].to(y.device)
        rows[column] = _scores(along, holds_here, mains[column], min_probe_f1)
    nothing = (math.nan, 0, math.nan, math.nan)
    table = [(names[c], int(n[c]), *rows.get(c, nothing)) for c in range(len(names))]
    titles = ["concept", "n_tokens", "probe_f1", "n_right", "full_absorption"]
    return pd.DataFrame(table, columns=[*titles, "absorption_fraction"])


@torch.no_grad()
def _read(
    model: HookedModel, hooked: HookedSAE, text: Corpus
) -> tuple[SparseActs, Float[torch.Tensor, "token d_out"], Float[torch.Tensor, " token"]]:
    """Activations, the output site, and the scale of every token that counts."""
    acts, outputs, scales = [], [], []
    for x, y in site_tensors(model, hooked, text):
        acts.append(hooked.weights.encode_sparse(x))
        outputs.append(y.float())
        scale = hooked.weights.scale(x)
        scales.append(y.new_ones(len(y)) if scale is None else scale[:, 0].float())
    return joined(acts), torch.cat(outputs), torch.cat(scales)


def _along(
    acts: SparseActs,
    y: Float[torch.Tensor, "token d_out"],
    scale: Float[torch.Tensor, " token"],
    W_dec: Float[torch.Tensor, "d_sae d_out"],
    probe: Float[torch.Tensor, " d_out"],
) -> _Along:
    rows, p = W_dec.detach().float(), torch.nn.functional.normalize(probe, dim=0)
    along_probe = rows @ p
    cosine = along_probe / rows.norm(dim=-1).clamp(min=torch.finfo(rows.dtype).tiny)
    parts = acts.values.float() * scale[acts.rows] * along_probe[acts.indices]
    return _Along(acts, parts, cosine, y @ p)


def _scores(
    along: _Along,
    holds: Bool[torch.Tensor, " token"],
    mains: Sequence[int],
    min_f1: float | int,
) -> tuple[float, int, float, float]:
    """F1 of the probe, number of tokens that count, and both absorptions."""
    f1, predicted = _predicted(along.whole, holds)
    right = predicted & holds
    if f1 < min_f1 or not mains or not bool(right.any()):
        return f1, 0, math.nan, math.nan
    full, fraction = _full(along, mains), _fraction(along, mains)
    share = float(full[right].double().mean()), float(fraction[right].double().mean())
    return f1, int(right.sum()), *share


def _predicted(
    whole: Float[torch.Tensor, " token"], holds: Bool[torch.Tensor, " token"]
) -> tuple[float, Bool[torch.Tensor, " token"]]:
    """The best F1 of a threshold on the projection, and the tokens at or above it."""
    order = whole.argsort(descending=True, stable=True)
    hits = holds[order].cumsum(0).double()
    f1 = 2 * hits / (torch.arange(1, len(order) + 1, device=hits.device) + holds.sum())
    best = int(f1.argmax())
    return float(f1[best]), whole >= whole[order[best]]


def _full(along: _Along, mains: Sequence[int]) -> Bool[torch.Tensor, " token"]:
    """Step 4, whatever the token."""
    acts = along.acts
    loud = _sums(acts, torch.isin(acts.indices, _features(mains, acts)).to(along.parts.dtype)) > 0
    aligned = along.cosine[acts.indices] >= FULL_COSINE
    most, most_aligned = (_largest(acts, along.parts, where) for where in (None, aligned))
    carried = (most_aligned == most) & (most >= SHARE * along.whole) & (along.whole > 0)
    return ~loud & carried & (most > 0)


def _fraction(along: _Along, mains: Sequence[int]) -> Float[torch.Tensor, " token"]:
    """Step 5, whatever the token."""
    acts, parts, whole = along.acts, along.parts, along.whole
    is_main = torch.isin(acts.indices, _features(mains, acts))
    main = _sums(acts, torch.where(is_main, parts, 0))
    may = ~is_main & (along.cosine[acts.indices] >= FRACTION_COSINE) & (parts > 0)
    others = _sums(acts, torch.where(_first(acts, parts, may, ABSORBERS), parts, 0))
    absorbed = torch.minimum(others, whole - main)
    share = torch.where(main <= 0, 1.0, absorbed / (absorbed + main))
    return torch.where((main >= whole) | (others < SHARE * whole) | (whole <= 0), 0.0, share)


def _features(features: Sequence[int], acts: SparseActs) -> torch.Tensor:
    return torch.tensor(list(features), device=acts.indices.device)


def _sums(acts: SparseActs, values: Float[torch.Tensor, " entry"]) -> Float[torch.Tensor, " token"]:
    return values.new_zeros(acts.n_tokens).index_add(0, acts.rows, values)


def _largest(
    acts: SparseActs, values: Float[torch.Tensor, " entry"], where: torch.Tensor | None
) -> Float[torch.Tensor, " token"]:
    """The largest value of each token, of some of its entries; minus infinity without any."""
    shown = values if where is None else torch.where(where, values, -math.inf)
    least = values.new_full((acts.n_tokens,), -math.inf)
    return least.scatter_reduce(0, acts.rows, shown, "amax")


def _first(
    acts: SparseActs, values: Float[torch.Tensor, " entry"], may: torch.Tensor, n: int
) -> Bool[torch.Tensor, " entry"]:
    """The ``n`` entries of each token with the largest values, of those that may be chosen."""
    shown = torch.where(may, values, -math.inf)
    order = shown.argsort(descending=True, stable=True)
    order = order[acts.rows[order].argsort(stable=True)]
    place = torch.arange(len(order), device=order.device) - acts.offsets[acts.rows[order]]
    chosen = torch.zeros_like(may)
    chosen[order] = place < n
    return chosen & may
