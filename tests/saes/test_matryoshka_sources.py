"""Checkpoints of others, in files of exactly their layout."""

from __future__ import annotations

import json

import pytest
import torch
from planted import D_IN, D_SAE, planted_batches, randomised, step_input
from sae_lens import SAE, JumpReLUSAE, MatryoshkaBatchTopKTrainingSAE
from sae_lens import MatryoshkaBatchTopKTrainingSAEConfig as TheirConfig

from gemmascope_plugin import saes
from gemmascope_plugin.errors import BadFileError, ModelError
from gemmascope_plugin.saes import MatryoshkaSAE, from_dictionary_learning, with_levels

LEVELS = [4, 12, D_SAE]
SIZES = [4, 8, D_SAE - 12]


@pytest.fixture
def saelens_folder(tmp_path):
    """A Matryoshka that SAELens trained for one step and saved."""
    sae = randomised(
        MatryoshkaBatchTopKTrainingSAE(
            TheirConfig(d_in=D_IN, d_sae=D_SAE, k=3.0, matryoshka_widths=list(LEVELS))
        )
    )
    sae.training_forward_pass(step_input(next(planted_batches())))
    sae.save_inference_model(tmp_path)
    return tmp_path


def test_saelens_checkpoints_with_their_levels(saelens_folder) -> None:
    plain = SAE.load_from_disk(saelens_folder)
    assert type(plain) is JumpReLUSAE
    matryoshka, x = with_levels(plain), next(planted_batches())
    assert type(matryoshka) is MatryoshkaSAE and matryoshka.cfg.levels == tuple(LEVELS)
    assert torch.equal(matryoshka.encode(x), plain.encode(x)) and torch.equal(
        matryoshka(x), plain(x)
    )
    assert matryoshka.W_enc is plain.W_enc and matryoshka.device == plain.device
    assert plain.cfg.metadata.levels is None
    with pytest.raises(ModelError, match=r"given are \[4, 32\], .* trained with \[4, 12, 32\]"):
        with_levels(plain, [4, 32])


def test_saelens_checkpoints_that_lost_their_levels(saelens_folder) -> None:
    path = saelens_folder / "cfg.json"
    cfg = json.loads(path.read_text())
    del cfg["metadata"]["training_architecture_details"]
    path.write_text(json.dumps(cfg))
    plain = SAE.load_from_disk(saelens_folder)
    with pytest.raises(ModelError, match="does not say which levels .* before 6.54"):
        with_levels(plain)
    assert with_levels(plain, LEVELS).truncate(0).cfg.d_sae == 4
    with pytest.raises(ModelError, match="last level is 12"):
        with_levels(plain, [4, 12])


def dictionary_learning_state() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    W_dec = torch.nn.functional.normalize(torch.randn(D_SAE, D_IN, generator=rng), dim=-1)
    return {
        "k": torch.tensor(3, dtype=torch.int),
        "threshold": torch.tensor(1.3),
        "group_sizes": torch.tensor(SIZES),
        "W_enc": W_dec.T.contiguous(),
        "b_enc": torch.randn(D_SAE, generator=rng) / 5,
        "W_dec": W_dec,
        "b_dec": torch.randn(D_IN, generator=rng) / 5,
    }


def test_dictionary_learning_checkpoints(tmp_path) -> None:
    torch.save(dictionary_learning_state(), tmp_path / "ae.pt")
    s = torch.load(tmp_path / "ae.pt", weights_only=True)
    sae = from_dictionary_learning(s, {"hook_name": "blocks.2.hook_resid_post"})
    assert sae.cfg.levels == tuple(LEVELS) and sae.cfg.metadata.hook_name.startswith("blocks.2")
    saes.check_architecture(sae)
    assert not any(p.requires_grad for p in sae.parameters())
    x = next(planted_batches())
    pre = ((x - s["b_dec"]) @ s["W_enc"] + s["b_enc"]).relu()
    acts = pre * (pre > s["threshold"])
    torch.testing.assert_close(sae.encode(x), acts, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae(x), acts @ s["W_dec"] + s["b_dec"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae.encode(x, 1), acts[:, :12], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threshold": torch.tensor(-1.0)}, "threshold is -1: it was never set"),
        ({"threshold": torch.ones(D_SAE)}, r"threshold has shape \[32\], not \[\]"),
        ({"W_dec": torch.ones(D_IN, D_SAE)}, r"W_dec has shape \[16, 32\], not \[32, 16\]"),
        ({"group_sizes": torch.tensor([4, 8])}, r"group_sizes \[4, 8\]: The last level is 12"),
        ({"group_sizes": torch.tensor([4, 0, 28])}, "do not increase"),
        ({"gate_bias": torch.ones(3)}, r"missing \[\], unknown \['gate_bias'\]"),
    ],
)
def test_states_that_are_not_a_matryoshka(changes: dict, message: str) -> None:
    with pytest.raises(BadFileError, match=message):
        from_dictionary_learning({**dictionary_learning_state(), **changes})


def test_a_flat_state_is_refused() -> None:
    state = {k: v for k, v in dictionary_learning_state().items() if k != "group_sizes"}
    with pytest.raises(BadFileError, match=r"missing \['group_sizes'\]"):
        from_dictionary_learning(state)
