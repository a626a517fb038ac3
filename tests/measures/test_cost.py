"""What a dictionary costs: counts by hand for every architecture; times are positive and no more."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from gemmascope_plugin.errors import EmptySelectionError, ModelError
from gemmascope_plugin.measures import Cost, cost
from gemmascope_plugin.splice import HookedSAE
from tests import factories
from tests.factories import D_SAE, activations, unchecked
from tests.measures.test_measure import with_skip
from tests.splice.kinds import TWO_KINDS
from tests.splice.reference import features
from tests.splice.test_level_and_encoder import matryoshka
from tests.splice.test_rank_splice import N as RANK_N
from tests.splice.test_rank_splice import dictionary
from tests.splice.test_tree_splice import N as TREE_N
from tests.splice.test_tree_splice import tree
from tests.tiny_models import PAD_ID, random_tokens

TOKENS = random_tokens(batch_size=5)
TOKENS[3, 14:] = PAD_ID
D = 32


def counted(sae: Any) -> int:
    return sum(parameter.numel() for parameter in sae.parameters())


@torch.no_grad()
@TWO_KINDS
@pytest.mark.parametrize("make", [factories.residual, factories.attention, factories.transcoder])
def test_a_jumprelu_dictionary(model, make) -> None:
    sae = make(model, 1)
    costs = cost(model, sae, TOKENS, n_tokens=50, repeats=1, batch_size=2)
    x = activations(model, TOKENS, sae.cfg.metadata.hook_name)[TOKENS > 3][:50]
    l0 = float((features(sae, x) > 0).sum()) / 50
    d_in, d_out = sae.W_enc.shape[0], sae.W_dec.shape[1]
    assert (costs.n_tokens, costs.l0) == (50, pytest.approx(l0))
    assert costs.n_parameters == D_SAE * (d_in + d_out + 2) + d_out
    assert costs.nbytes == 4 * costs.n_parameters
    assert costs.encode_madds == d_in * D_SAE
    assert costs.decode_madds == pytest.approx(l0 * d_out)
    assert costs.encode_seconds > 0 and costs.round_trip_seconds > 0


def test_an_affine_skip_is_decoded_too(hooked2) -> None:
    plain = cost(hooked2, factories.transcoder(hooked2, 1), TOKENS, repeats=1)
    costs = cost(hooked2, with_skip(factories.transcoder(hooked2, 1)), TOKENS, repeats=1)
    assert costs.decode_madds == pytest.approx(plain.decode_madds + D * D)
    assert costs.encode_madds == plain.encode_madds
    assert costs.n_parameters == plain.n_parameters + D * D


def test_a_tree_has_no_encoder_bias_and_keeps_its_parents(hooked2) -> None:
    costs = cost(hooked2, tree(), TOKENS, repeats=1)
    assert costs.n_parameters == 2 * D * TREE_N + D
    assert costs.nbytes == 4 * costs.n_parameters + 8 * TREE_N
    assert costs.encode_madds == D * TREE_N


def test_a_budget_network_is_encoded_too(hooked2) -> None:
    fixed, costs = (cost(hooked2, dictionary(name), TOKENS, repeats=1) for name in ("topk", "soft"))
    network = D * RANK_N + RANK_N
    assert fixed.encode_madds == D * RANK_N and costs.encode_madds == D * RANK_N + network
    assert costs.n_parameters == fixed.n_parameters + network + RANK_N + 1  # with its biases
    assert costs.n_parameters == counted(dictionary("soft"))


def test_a_level_costs_its_part(hooked2) -> None:
    whole = matryoshka(hooked2)
    costs = cost(hooked2, HookedSAE(whole, level=0), TOKENS, repeats=1)
    assert (costs.level, costs.d_sae) == (0, 8)
    assert costs.n_parameters == 8 * (D + D + 2) + D and costs.nbytes == 4 * costs.n_parameters
    assert costs.encode_madds == 8 * D
    part = cost(hooked2, HookedSAE(tree(), level=0), TOKENS, repeats=1)
    assert part.n_parameters == 8 * 2 * D + D and part.nbytes == 4 * part.n_parameters + 8 * 8


def test_bytes_follow_the_type(hooked2) -> None:
    sae = copy.deepcopy(factories.residual(hooked2, 1)).to(torch.bfloat16)
    costs = cost(hooked2, sae, TOKENS, repeats=1)
    assert costs.nbytes == 2 * costs.n_parameters == 2 * counted(sae)


def test_fewer_tokens_than_asked_for(hooked2) -> None:
    costs = cost(hooked2, factories.residual(hooked2, 1), TOKENS, repeats=2)
    assert costs.n_tokens == int((TOKENS > 3).sum())


def test_a_row_and_a_sentence(hooked2) -> None:
    costs = cost(hooked2, factories.residual(hooked2, 1), TOKENS, repeats=1)
    assert isinstance(costs, Cost)
    assert costs.to_frame()["encode_madds"][0] == costs.encode_madds == D * D_SAE
    assert list(costs.row())[-6:] == list(costs.costs())
    assert "6,368 parameters, 0.0 MB; per token 3,072 multiply-adds to encode" in repr(costs)
    assert "<table" in costs._repr_html_()


def test_what_cannot_be_measured_is_an_error(hooked2) -> None:
    sae = factories.residual(hooked2, 1)
    with pytest.raises(ModelError, match="repeats=0 is less than one.*Try: repeats=5"):
        unchecked(cost)(hooked2, sae, TOKENS, repeats=0)
    with pytest.raises(ModelError, match="n_tokens=0 is less than one.*Try: n_tokens="):
        unchecked(cost)(hooked2, sae, TOKENS, n_tokens=0)
    with pytest.raises(EmptySelectionError, match="only excluded tokens"):
        unchecked(cost)(hooked2, sae, TOKENS[:, :1])
