"""Gemma Scope's JumpReLU training class."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from planted import D_IN, D_SAE, l0, planted_batches, randomised, step_input
from sae_lens import SAE, JumpReLUSAE, JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig, TrainingSAE

from gemmascope_plugin import saes
from gemmascope_plugin.errors import ModelError, UnknownNameError
from gemmascope_plugin.saes import GemmaScopeConfig, GemmaScopeTrainingSAE
from gemmascope_plugin.saes.training.jumprelu_training import excess_frequency
from gemmascope_plugin.saes.training.step_parts import unit_rows

BANDWIDTH = 0.2


def config(**changes: Any) -> GemmaScopeConfig:
    settings = {"d_in": D_IN, "d_sae": D_SAE, "jumprelu_bandwidth": BANDWIDTH}
    return GemmaScopeConfig(**{**settings, **changes})


def batch() -> torch.Tensor:
    return next(planted_batches()) / 7


def test_the_defaults_are_gemma_scope_s() -> None:
    cfg = GemmaScopeConfig(d_in=D_IN, d_sae=D_SAE)
    assert cfg.jumprelu_bandwidth == cfg.jumprelu_init_threshold == 0.001
    assert cfg.jumprelu_sparsity_loss_mode == "step" and cfg.l0_warm_up_steps == 10_000
    assert cfg.apply_b_dec_to_input and not cfg.jumprelu_ste_to_input
    sae = GemmaScopeTrainingSAE(cfg)
    assert torch.equal(sae.W_enc, sae.W_dec.T) and (sae.threshold == 0.001).all()
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(D_SAE))
    assert not sae.b_enc.any() and not sae.b_dec.any()


@pytest.mark.parametrize("mode", ["step", "quadratic"])
def test_the_loss_is_saelens_on_unit_rows(mode: str) -> None:
    changes = {"jumprelu_sparsity_loss_mode": mode, "target_l0": 3.0}
    gemma_scope = randomised(GemmaScopeTrainingSAE(config(**changes)))
    peer = JumpReLUTrainingSAE(
        JumpReLUTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, jumprelu_bandwidth=BANDWIDTH, **changes)
    )
    peer.load_state_dict(
        {**gemma_scope.state_dict(), "W_dec": unit_rows(gemma_scope.W_dec.detach())}
    )
    batch_input = step_input(batch(), l0=0.7, frequency=0.0)
    output, peer_output = (
        gemma_scope.training_forward_pass(batch_input),
        peer.training_forward_pass(batch_input),
    )
    assert (
        torch.equal(output.loss, peer_output.loss)
        and output.losses.keys() == peer_output.losses.keys()
    )
    output.loss.backward()
    peer_output.loss.backward()
    for name in ("W_enc", "b_enc", "b_dec", "threshold"):
        torch.testing.assert_close(getattr(gemma_scope, name).grad, getattr(peer, name).grad)
    along = (peer.W_dec.grad * peer.W_dec).sum(-1, keepdim=True) * peer.W_dec
    torch.testing.assert_close(gemma_scope.W_dec.grad, peer.W_dec.grad - along)
    assert (gemma_scope.W_dec.grad * gemma_scope.W_dec).sum(-1).abs().max() < 1e-4


def test_the_projection_survives_copies_and_new_parameters() -> None:
    sae = GemmaScopeTrainingSAE(config())
    sae.training_forward_pass(step_input(batch(), l0=0.1, frequency=0.0)).loss.backward()
    others = [copy.deepcopy(sae), GemmaScopeTrainingSAE(config())]
    others[1].load_state_dict(sae.state_dict(), assign=True)
    for other in (*others, sae):
        other.zero_grad()
        other.training_forward_pass(step_input(batch(), l0=0.1, frequency=0.0)).loss.backward()
        assert other.W_dec.grad.abs().max() > 0
        assert (other.W_dec.grad * other.W_dec).sum(-1).abs().max() < 1e-4


def test_the_estimator_against_a_loop() -> None:
    """Value and gradient of the excess frequency, feature by feature."""
    rng = torch.Generator().manual_seed(0)
    pre = torch.randn(50, 6, generator=rng)
    threshold = torch.linspace(-0.5, 1.5, 6).clamp(min=0).requires_grad_()
    ceiling = 0.25
    excess = excess_frequency(pre, threshold, ceiling, BANDWIDTH)
    excess.backward()
    theta = threshold.tolist()
    value, gradient = 0.0, torch.zeros(6)
    for i in range(6):
        frequency = sum(z > theta[i] for z in pre[:, i].tolist()) / 50
        if frequency > ceiling:
            value += frequency - ceiling
            near = sum(abs(z - theta[i]) < BANDWIDTH / 2 for z in pre[:, i].tolist())
            gradient[i] = -near / BANDWIDTH / 50
    assert excess.item() == pytest.approx(value) and value > 0
    assert gradient.any() and (gradient == 0).any()
    torch.testing.assert_close(threshold.grad, gradient)


def test_nothing_above_the_ceiling_costs_nothing() -> None:
    threshold = torch.full((3,), 9.0, requires_grad=True)
    excess = excess_frequency(torch.zeros(4, 3), threshold, 0.1, BANDWIDTH)
    excess.backward()
    assert excess.item() == 0 and not threshold.grad.any()


def test_the_penalty_thins_out_frequent_features() -> None:
    def frequencies(coefficient: float) -> torch.Tensor:
        torch.manual_seed(0)
        sae = GemmaScopeTrainingSAE(config(frequency_coefficient=coefficient))
        optimiser = torch.optim.Adam(sae.parameters(), lr=3e-3, betas=(0.0, 0.999))
        for _, x in zip(range(300), planted_batches(), strict=False):
            optimiser.zero_grad()
            batch_input = step_input(x / 7, l0=0.003, frequency=coefficient)
            sae.training_forward_pass(batch_input).loss.backward()
            optimiser.step()
        return (sae.encode(batch()) > 0).float().mean(0)

    free, charged = frequencies(0.0), frequencies(1.0)
    assert (free > 0.25).sum() > 5
    assert (charged > 0.25).sum() == 0


def test_saved_dictionaries_are_plain_and_compute_the_same(tmp_path) -> None:
    sae = randomised(GemmaScopeTrainingSAE(config()))
    x = batch()
    with torch.no_grad():
        before = sae(x)
    saved_state = {name: value.clone() for name, value in sae.state_dict().items()}
    sae.save_inference_model(tmp_path)
    assert all(torch.equal(value, saved_state[name]) for name, value in sae.state_dict().items())
    saved = SAE.load_from_disk(tmp_path)
    assert type(saved) is JumpReLUSAE and l0(saved.encode(x)) > 1
    saes.check_architecture(saved)
    torch.testing.assert_close(saved.W_dec.norm(dim=-1), torch.ones(D_SAE))
    torch.testing.assert_close(saved(x), before, rtol=1e-4, atol=1e-5)
    assert saved.cfg.metadata.training_architecture == "gemma_scope_jumprelu"


def test_folding_the_trainer_s_factor_gives_raw_units() -> None:
    sae = randomised(GemmaScopeTrainingSAE(config()))
    x = batch()
    with torch.no_grad():
        acts, out = sae.encode(x / 4), sae(x / 4)
        acts = acts * sae.W_dec.norm(dim=-1)
        sae.fold_activation_norm_scaling_factor(0.25)
        torch.testing.assert_close(sae.encode(x), 4 * acts, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(sae(x), 4 * out, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(D_SAE))


def test_checkpoints_of_the_training_class_come_back(tmp_path) -> None:
    sae = randomised(GemmaScopeTrainingSAE(config(frequency_coefficient=0.5)))
    sae.save_model(tmp_path)
    again = TrainingSAE.load_from_disk(tmp_path)
    assert type(again) is GemmaScopeTrainingSAE and again.cfg.frequency_coefficient == 0.5
    assert torch.equal(again.encode(batch()), sae.encode(batch()))


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ModelError, match="max_frequency is 0.0, not a share"):
        config(max_frequency=0.0)
    with pytest.raises(ModelError, match="frequency_coefficient is -1.0, below 0"):
        config(frequency_coefficient=-1.0)
    with pytest.raises(ModelError, match="'layer_norm' depends on the token.*covariance_whitening"):
        config(normalize_activations="layer_norm")
    with pytest.raises(UnknownNameError, match="no setting 'bandwidth'.*'jumprelu_bandwidth'"):
        GemmaScopeConfig.from_dict({**config().to_dict(), "bandwidth": 0.1})
