"""Absorption with probes: against a loop over tokens, and a planted case where it is known."""

from __future__ import annotations

import math

import pytest
import torch

from gemmascope_plugin.errors import EmptySelectionError, ModelError
from gemmascope_plugin.measures import probe_absorption
from gemmascope_plugin.measures.absorption import _Along, _fraction, _full, _predicted
from gemmascope_plugin.saes import SparseActs
from tests import factories
from tests.tiny_models import FIRST_WORD_ID, random_tokens

TOKENS = random_tokens(batch_size=20)
KEEP = TOKENS >= FIRST_WORD_ID
CONCEPTS = torch.stack([TOKENS < 200, TOKENS < 130, KEEP], -1)
NAMES = ["below 200", "below 130", "word"]


def along(n: int = 300, d_sae: int = 9, seed: int = 0) -> _Along:
    rng = torch.Generator().manual_seed(seed)
    dense = torch.rand(n, d_sae, generator=rng) * (torch.rand(n, d_sae, generator=rng) < 0.4)
    acts = SparseActs.from_dense(dense)
    cosine = torch.rand(d_sae, generator=rng) - 0.2
    parts = acts.values * cosine[acts.indices]
    return _Along(acts, parts, cosine, torch.randn(n, generator=rng))


@pytest.mark.parametrize("mains", [(2,), (0, 5, 7)])
def test_every_token_follows_the_definition(mains: tuple[int, ...]) -> None:
    line = along()
    dense = line.acts.to_dense()
    added = dense * line.cosine
    full, fraction = _full(line, mains), _fraction(line, mains)
    for token, whole in enumerate(line.whole.tolist()):
        added_here = added[token].tolist()
        active = [i for i, a in enumerate(dense[token].tolist()) if a > 0]
        others = [i for i in active if i not in mains]
        expected = False
        if active and len(others) == len(active) and whole > 0:
            top = max(active, key=lambda i: added_here[i])
            expected = bool(line.cosine[top] >= 0.025 and added_here[top] >= 0.4 * whole)
        assert bool(full[token]) == expected
        main = sum(added_here[i] for i in active if i in mains)
        parts = sorted((added_here[i] for i in others if line.cosine[i] >= 0.1), reverse=True)[:3]
        b = sum(part for part in parts if part > 0)
        if main >= whole or b < 0.4 * whole or whole <= 0:
            share = 0.0
        elif main <= 0:
            share = 1.0
        else:
            share = min(b, whole - main) / (min(b, whole - main) + main)
        assert float(fraction[token]) == pytest.approx(share, abs=1e-5)
    assert full.any() and ((fraction > 0) & (fraction < 1)).any()


def test_the_threshold_of_a_probe_has_the_best_f1() -> None:
    whole = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    f1, predicted = _predicted(whole, torch.tensor([True, True, False, True, False]))
    assert f1 == pytest.approx(6 / 7) and predicted.tolist() == [True, True, True, True, False]


def test_a_token_with_a_feature_of_its_own_is_absorbed(hooked2, monkeypatch) -> None:
    """Its feature adds too little recall to count as a part of the concept, and carries it alone."""
    import gemmascope_plugin.measures.absorption as module

    rng = torch.Generator().manual_seed(3)
    words = TOKENS[KEEP]
    low = words < 200
    ids, counts = words[low].unique(return_counts=True)
    rare = words == ids[(counts > 1) & (counts < 0.03 * int(low.sum()))][0]
    direction = torch.nn.functional.normalize(torch.randn(32, generator=rng), dim=0)
    y = direction * (4.0 * low - 2.0)[:, None] + 0.1 * torch.randn(len(words), 32, generator=rng)
    sae = factories.residual(hooked2, 1)
    with torch.no_grad():
        sae.W_dec[:2] = direction
    for silent in (True, False):
        dense = torch.zeros(len(y), sae.cfg.d_sae)
        dense[:, 0] = 2.0 * (low & ~rare if silent else low)
        dense[:, 1] = 2.0 * rare
        acts = SparseActs.from_dense(dense)
        monkeypatch.setattr(module, "_read", lambda *_, a=acts: (a, y, torch.ones(len(y))))
        row = probe_absorption(hooked2, sae, TOKENS, CONCEPTS[..., :1], ["low"]).iloc[0]
        share = int(rare.sum()) / int(low.sum()) if silent else 0
        assert row["probe_f1"] > 0.99 and row["n_right"] == int(low.sum())
        assert row["full_absorption"] == pytest.approx(share)
        assert (row["absorption_fraction"] >= share) and (silent or share == 0)


def test_of_a_dictionary_in_a_model(hooked2) -> None:
    sae = factories.residual(hooked2, 1)
    frame = probe_absorption(hooked2, sae, TOKENS, CONCEPTS, NAMES, steps=40, min_probe_f1=0.0)
    assert list(frame["concept"]) == NAMES
    assert list(frame["n_tokens"]) == [int((n > TOKENS)[KEEP].sum()) for n in (200, 130)] + [
        int(KEEP.sum())
    ]
    assert frame["full_absorption"][:2].between(0, 1).all()
    assert frame["absorption_fraction"][:2].between(0, 1).all()
    assert math.isnan(frame["probe_f1"][2])  # it holds everywhere: nothing to tell
    strict = probe_absorption(hooked2, sae, TOKENS, CONCEPTS, NAMES, steps=1, min_probe_f1=1.0)
    assert strict["full_absorption"].isna().all()


def test_refusals(hooked2) -> None:
    sae = factories.residual(hooked2, 1)
    with pytest.raises(ModelError, match="2 names were given for 3 concepts"):
        probe_absorption(hooked2, sae, TOKENS, CONCEPTS, NAMES[:2])
    with pytest.raises(
        ModelError, match="min_probe_f1=2 is not an F1. There is: numbers from 0 to 1"
    ):
        probe_absorption(hooked2, sae, TOKENS, CONCEPTS, NAMES, min_probe_f1=2)
    with pytest.raises(EmptySelectionError, match="No concept holds on 9999 tokens"):
        probe_absorption(hooked2, sae, TOKENS, CONCEPTS, NAMES, min_tokens=9999)
