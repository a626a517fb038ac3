"""Prefix losses: equal to the paper's sum, to SAELens' where that is the paper's, and trainable."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from planted import BATCH, D_IN, D_SAE, fitted, fvu, l0, planted_batches, randomised, step_input
from sae_lens import SAE, TrainingSAE, TrainingSAEConfig
from sae_lens import MatryoshkaBatchTopKTrainingSAE as TheirSAE
from sae_lens import MatryoshkaBatchTopKTrainingSAEConfig as TheirConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

from gemmascope_plugin import saes
from gemmascope_plugin.errors import ModelError, UnknownNameError
from gemmascope_plugin.saes import (
    MatryoshkaBatchTopK,
    MatryoshkaBatchTopKConfig,
    MatryoshkaJumpReLU,
    MatryoshkaJumpReLUConfig,
    MatryoshkaSAE,
)

LEVELS = (4, 12, D_SAE)
KINDS = [
    (MatryoshkaBatchTopK, MatryoshkaBatchTopKConfig, {"k": 3.0}),
    (MatryoshkaJumpReLU, MatryoshkaJumpReLUConfig, {"jumprelu_bandwidth": 0.2}),
]


def built(sae_class: Any, config_class: Any, settings: dict[str, Any], **changes: Any) -> Any:
    values = {"d_in": D_IN, "d_sae": D_SAE, "levels": LEVELS, **settings, **changes}
    return randomised(sae_class(config_class(**values)))


def given(dead: torch.Tensor | None = None) -> Any:
    batch_input = step_input(next(planted_batches()) / 7, l0=0.3, frequency=0.0)
    batch_input.dead_neuron_mask = dead
    return batch_input


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("some_dead", [True, False])
def test_equal_weights_are_saelens_loss_and_gradients(rescale: bool, some_dead: bool) -> None:
    settings = {"k": 3.0, "rescale_acts_by_decoder_norm": rescale}
    prefix_sae = built(MatryoshkaBatchTopK, MatryoshkaBatchTopKConfig, settings)
    shared = {"d_in": D_IN, "d_sae": D_SAE, "aux_loss_coefficient": 1 / 32, **settings}
    reference = TheirSAE(TheirConfig(matryoshka_widths=list(LEVELS), **shared))
    reference.load_state_dict(prefix_sae.state_dict())
    dead = torch.arange(D_SAE) % 3 == 0 if some_dead else None
    prefix_output, peer = (
        prefix_sae.training_forward_pass(given(dead)),
        reference.training_forward_pass(given(dead)),
    )
    torch.testing.assert_close(prefix_output.loss, peer.loss)
    assert prefix_output.losses.keys() == peer.losses.keys()
    for name, value in peer.losses.items():
        torch.testing.assert_close(prefix_output.losses[name], value)
    assert (prefix_output.losses["auxiliary_reconstruction_loss"] > 0) == some_dead
    torch.testing.assert_close(prefix_output.sae_out, peer.sae_out)
    torch.testing.assert_close(prefix_sae.topk_threshold, reference.topk_threshold)
    prefix_output.loss.backward()
    peer.loss.backward()
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(
            getattr(prefix_sae, name).grad, parameter.grad, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(("sae_class", "config_class", "settings"), KINDS)
@pytest.mark.parametrize("weights", [None, (0.5, 0.0, 2.0)])
def test_the_loss_is_the_sum_over_levels(
    sae_class: Any, config_class: Any, settings: dict[str, Any], weights: Any
) -> None:
    sae = built(sae_class, config_class, settings, level_weights=weights)
    output = sae.training_forward_pass(given())
    x = given().sae_in
    acts = sae.in_decoder_units(output.feature_acts)
    slow = torch.zeros(())
    for level, weight in zip(LEVELS, weights or (1.0, 1.0, 1.0), strict=True):
        for token, f in zip(x, acts, strict=True):
            prefix = sum((f[i] * sae.W_dec[i] for i in range(level)), start=sae.b_dec)
            slow = slow + weight * (token - prefix).pow(2).sum() / len(x)
    errors = sum(value for name, value in output.losses.items() if "mse_loss" in name)
    torch.testing.assert_close(errors, slow, rtol=1e-4, atol=1e-4)
    others = sum(value for name, value in output.losses.items() if "mse_loss" not in name)
    torch.testing.assert_close(output.loss, errors + others)
    torch.testing.assert_close(
        output.sae_out, sae.decode(output.feature_acts), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(("sae_class", "config_class", "settings"), KINDS)
def test_one_level_is_the_class_without_levels(
    sae_class: Any, config_class: Any, settings: dict[str, Any]
) -> None:
    sae = built(sae_class, config_class, settings, levels=(D_SAE,))
    flat_class = sae_class.__bases__[0]
    flat_config = config_class.__bases__[1]
    flat = flat_class(flat_config(d_in=D_IN, d_sae=D_SAE, **settings))
    flat.load_state_dict(sae.state_dict())
    prefix_output, reference = (
        sae.training_forward_pass(given()),
        flat.training_forward_pass(given()),
    )
    torch.testing.assert_close(prefix_output.loss, reference.loss)
    assert prefix_output.losses.keys() == reference.losses.keys()


@pytest.mark.parametrize(("sae_class", "config_class", "settings"), KINDS)
def test_saving_keeps_levels_and_reconstructions(
    tmp_path, sae_class: Any, config_class: Any, settings: dict[str, Any]
) -> None:
    sae = built(sae_class, config_class, settings, level_weights=(1.0, 1.0, 3.0))
    x = given().sae_in
    if sae_class is MatryoshkaBatchTopK:
        sae.topk_threshold.fill_(0.4)
    sae.save_inference_model(tmp_path)
    saved = SAE.load_from_disk(tmp_path)
    assert type(saved) is MatryoshkaSAE and saved.cfg.levels == LEVELS
    saes.check_architecture(saved)
    torch.testing.assert_close(saved.W_dec.norm(dim=-1), torch.ones(D_SAE))
    details = saved.cfg.metadata.training_architecture_details
    assert details["level_weights"] == [1.0, 1.0, 3.0]
    with torch.no_grad():
        pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
        norm = sae.W_dec.norm(dim=-1)
        passed = pre * norm > 0.4 if sae_class is MatryoshkaBatchTopK else pre > sae.threshold
        whole = torch.where(passed, pre, 0.0).relu()
    assert whole.any()
    for level, width in enumerate(LEVELS):
        expected = whole[:, :width] @ sae.W_dec[:width] + sae.b_dec
        torch.testing.assert_close(
            saved.decode(saved.encode(x, level), level), expected, rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize(("sae_class", "config_class", "settings"), KINDS)
def test_checkpoints_of_training_come_back(
    tmp_path, sae_class: Any, config_class: Any, settings: dict[str, Any]
) -> None:
    sae = built(sae_class, config_class, settings)
    sae.save_model(tmp_path)
    again = TrainingSAE.load_from_disk(tmp_path)
    assert type(again) is sae_class and again.cfg.levels == LEVELS
    assert torch.equal(again.encode(given().sae_in), sae.encode(given().sae_in))
    # what SAELens' runner does with a config
    anew = TrainingSAE.from_dict(TrainingSAEConfig.from_dict(sae.cfg.to_dict()).to_dict())
    assert type(anew) is sae_class and anew.cfg.levels == LEVELS


@pytest.mark.parametrize(("sae_class", "config_class", "settings"), KINDS)
def test_settings_that_cannot_be(
    sae_class: Any, config_class: Any, settings: dict[str, Any]
) -> None:
    with pytest.raises(ModelError, match="do not increase"):
        built(sae_class, config_class, settings, levels=(12, 4, D_SAE))
    with pytest.raises(ModelError, match=r"Level 64 exceeds the 32 features"):
        built(sae_class, config_class, settings, levels=(4, 64))
    with pytest.raises(ModelError, match="2 level weights for 3 levels"):
        built(sae_class, config_class, settings, level_weights=(1.0, 1.0))
    with pytest.raises(ModelError, match="depends on the token"):
        built(sae_class, config_class, settings, normalize_activations="layer_norm")
    values = built(sae_class, config_class, settings).cfg.to_dict()
    with pytest.raises(UnknownNameError, match="no setting 'matryoshka_widths'"):
        config_class.from_dict({**values, "matryoshka_widths": [4]})


def test_training_on_planted_features(tmp_path) -> None:
    torch.manual_seed(0)
    cfg = MatryoshkaBatchTopKConfig(
        d_in=D_IN,
        d_sae=D_SAE,
        levels=LEVELS,
        k=3.0,
        topk_threshold_lr=0.05,
        normalize_activations="expected_average_only_in",
    )
    sae = MatryoshkaBatchTopK(cfg)
    x = next(planted_batches(4096, seed=1))
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=500 * BATCH,
            train_batch_size_samples=BATCH,
            lr=5e-3,
            lr_end=5e-3 / 10,
            lr_scheduler_name="cosineannealing",
            n_batches_for_norm_estimate=4,
        ),
        sae,
        planted_batches(),
    )
    sae, losses = fitted(trainer)
    assert sum(losses[-20:]) < sum(losses[:20]) / 2
    sae.save_inference_model(tmp_path)
    saved = SAE.load_from_disk(tmp_path)
    assert isinstance(saved, MatryoshkaSAE)
    assert l0(saved.encode(x)) == pytest.approx(3.0, rel=0.15)
    errors = [fvu(x, saved.decode(saved.encode(x, level), level)) for level in range(3)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.3
