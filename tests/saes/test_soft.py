"""SoftSAE and the fixed soft top-k: what they compute, how they train, save, load and refuse."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from sae_lens import SAE, TopKSAE, TrainingSAE
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer

from gemmascope_plugin import saes
from gemmascope_plugin.errors import ModelError, UnknownNameError
from gemmascope_plugin.saes import (
    SoftSAE,
    SoftSAEConfig,
    SoftTopKTrainingSAE,
    SoftTopKTrainingSAEConfig,
    SoftTrainingSAE,
    SoftTrainingSAEConfig,
    soft_topk,
)
from gemmascope_plugin.saes.registration import register_class
from gemmascope_plugin.saes.training.soft_training import alpha_at, auxk_loss, is_hard_at, target_at
from gemmascope_plugin.saes.training.step_parts import geometric_median

D_IN, D_SAE, K = 32, 48, 4
STEPS = 600


def soft_sae(**changes: Any) -> SoftSAE:
    """A SoftSAE with weights that are not special."""
    sae = SoftSAE(SoftSAEConfig(**{"d_in": D_IN, "d_sae": D_SAE, "k": K, **changes}))
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) / 3)
    return sae


def training_config(cls: type = SoftTrainingSAEConfig, **changes: Any) -> Any:
    settings = {"d_in": D_IN, "d_sae": D_SAE, "k": K, "total_steps": STEPS}
    phases = {"alpha_steps": STEPS // 4, "hard_steps": STEPS // 10}
    return cls(**{**settings, **phases, **changes})


def planted(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of 1 to 7 out of 32 orthogonal directions, and how many."""
    rng = torch.Generator().manual_seed(1)
    directions = torch.linalg.qr(torch.randn(D_IN, 32, generator=rng)).Q.T
    rng = torch.Generator().manual_seed(seed)
    count = torch.randint(1, 8, (n,), generator=rng)
    rank = torch.rand(n, 32, generator=rng).argsort(-1).argsort(-1)
    size = 1 + 0.2 * torch.randn(n, 32, generator=rng)
    return ((rank < count[:, None]) * size) @ directions, count


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, D_IN, generator=torch.Generator().manual_seed(2))


def step_input(x: torch.Tensor, step: int, sae: Any, dead: Any = None) -> TrainStepInput:
    return TrainStepInput(
        sae_in=x,
        coefficients=sae.get_coefficients(),
        dead_neuron_mask=dead,
        n_training_steps=step,
        is_logging_step=False,
    )


# Inference


def test_it_equals_a_loop_over_tokens() -> None:
    sae, x = soft_sae(), tokens(30)
    acts, budget = sae.encode(x), sae.budget(x)
    first, _, last, _ = sae.k_estimator
    for token, row, k_hat in zip(x, acts, budget, strict=True):
        centred = token - sae.b_dec
        hidden = (first.weight @ centred + first.bias).relu()
        by_hand = (2 * K * torch.sigmoid(last.weight @ hidden + last.bias)).clamp(1, D_SAE)
        torch.testing.assert_close(k_hat, by_hand[0])
        z = (centred @ sae.W_enc + sae.b_enc).relu()
        best = z.argsort(descending=True)[: int(by_hand)]
        expected = torch.zeros_like(z)
        expected[best] = z[best]
        torch.testing.assert_close(row, expected)
    assert budget.min() >= 1 and budget.max() <= 2 * K and budget.std() > 0.5
    torch.testing.assert_close(sae.decode(acts), acts @ sae.W_dec + sae.b_dec)
    torch.testing.assert_close(sae(x), sae.decode(acts))
    torch.testing.assert_close(sae.encode(x.reshape(5, 6, -1)), acts.reshape(5, 6, -1))


def test_a_new_network_allots_about_k() -> None:
    torch.manual_seed(0)
    sae = SoftSAE(SoftSAEConfig(d_in=D_IN, d_sae=D_SAE, k=K))
    assert torch.equal(sae.k_estimator[0].weight, sae.W_enc.T)
    assert abs(sae.budget(tokens(50)).mean() - K) < K / 4


def test_hooks_fire_and_heads_are_flattened() -> None:
    sae, flat = soft_sae(reshape_activations="hook_z"), soft_sae()
    x = tokens(7)
    apart = x.reshape(7, 4, D_IN // 4)
    out, cache = sae.run_with_cache(apart)
    torch.testing.assert_close(out, flat(x).reshape(apart.shape))
    torch.testing.assert_close(cache["hook_sae_acts_post"], flat.encode(x))
    assert {"hook_sae_input", "hook_sae_acts_pre", "hook_sae_recons", "hook_sae_output"} <= set(
        cache
    )


def test_save_and_load_change_nothing(tmp_path) -> None:
    sae, x = soft_sae(k=3.5), tokens(20)
    sae.save_model(tmp_path)
    for cls in (SAE, SoftSAE):
        again = cls.load_from_disk(tmp_path)
        assert type(again) is SoftSAE and again.cfg.k == 3.5
        assert torch.equal(again(x), sae(x)) and torch.equal(again.budget(x), sae.budget(x))
    half = SoftSAE.load_from_disk(tmp_path, dtype="bfloat16")
    assert half(x).dtype == torch.bfloat16


@pytest.mark.parametrize("make", [soft_sae, lambda: SoftTrainingSAE(training_config()).eval()])
def test_folding_the_unit_of_the_input_changes_nothing(make) -> None:
    sae, x = make(), tokens(20)
    acts, out = sae.encode(7 * x), sae(7 * x)
    sae.fold_activation_norm_scaling_factor(7.0)
    torch.testing.assert_close(sae.encode(x), acts)
    torch.testing.assert_close(sae(x), out / 7)


# Schedules and losses


def test_schedules_start_end_and_stay() -> None:
    alphas = [alpha_at(s, alpha_steps=100, final_alpha=1e-4) for s in (0, 50, 100, 10**6)]
    assert alphas == [1.0, pytest.approx(0.50005), 1e-4, 1e-4]
    targets = [target_at(s, target_steps=10, d_in=64, k=4) for s in (0, 5, 10, 11)]
    assert targets == [64.0, 34.0, 4.0, 4.0]
    assert target_at(0, target_steps=0, d_in=64, k=4) == 4.0
    hard = [is_hard_at(s, total_steps=100, hard_steps=10) for s in (0, 89, 90, 200)]
    assert hard == [False, False, True, True]
    assert not is_hard_at(99, total_steps=100, hard_steps=0)


def test_a_step_computes_the_losses_of_the_paper() -> None:
    sae, x = SoftTrainingSAE(training_config()), tokens(64)
    dead = torch.arange(D_SAE) % 3 == 0
    with torch.no_grad():
        sae.b_enc.add_(0.1)
    output = sae.training_forward_pass(step_input(x, 5, sae, dead))
    alpha, target = 1 + 5 / 150 * (1e-4 - 1), D_IN + 5 / 6 * (K - D_IN)
    z = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()
    k_hat = sae.budget_of(x - sae.b_dec)
    acts = z * soft_topk(z, k_hat, alpha)
    torch.testing.assert_close(output.feature_acts, acts)
    residual = x - acts @ sae.W_dec - sae.b_dec
    budget = torch.log(1 + torch.exp(5 * (k_hat.mean() - target))) / 5
    strongest = (z * dead).topk(D_IN // 2)
    guess = torch.zeros_like(z).scatter(-1, strongest.indices, strongest.values) @ sae.W_dec
    aux = (residual - guess).pow(2).sum() / (residual - residual.mean(0)).pow(2).sum()
    expected = {
        "mse_loss": residual.pow(2).sum(-1).mean(),
        "auxiliary_reconstruction_loss": aux / 32,
        "budget_loss": budget,
    }
    assert output.losses.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(output.losses[name], value)
    torch.testing.assert_close(output.loss, sum(expected.values()))
    torch.testing.assert_close(output.metrics["mean_k"], k_hat.mean())
    assert output.metrics["alpha"] == pytest.approx(alpha)


def test_hard_steps_have_no_budget_loss_and_leave_the_network_alone() -> None:
    sae, x = SoftTrainingSAE(training_config()), tokens(64)
    output = sae.training_forward_pass(step_input(x, STEPS - 60, sae))
    output.loss.backward()
    assert "budget_loss" not in output.losses
    assert all(parameter.grad is None for parameter in sae.k_estimator.parameters())
    assert sae.W_enc.grad is not None
    assert torch.equal((output.feature_acts > 0).sum(-1), sae.budget_of(x - sae.b_dec).long())
    assert torch.equal(sae.eval().encode(x), output.feature_acts)


def test_decoder_rows_are_units_and_their_gradient_is_orthogonal() -> None:
    sae = SoftTrainingSAE(training_config(decoder_init_norm=0.3))
    sae.training_forward_pass(step_input(tokens(64), 0, sae)).loss.backward()
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(D_SAE))
    along = (sae.W_dec * sae.W_dec.grad).sum(-1)
    assert along.abs().max() < 1e-6 < sae.W_dec.grad.norm(dim=-1).min()


def test_only_a_zero_bias_becomes_the_median_and_only_at_first() -> None:
    x = tokens(64) + 3
    fresh, later, loaded = (SoftTrainingSAE(training_config()) for _ in range(3))
    loaded.b_dec.data.fill_(0.5)
    for sae, step in ((fresh, 0), (later, 1), (loaded, 0)):
        sae.training_forward_pass(step_input(x, step, sae))
    torch.testing.assert_close(fresh.b_dec.data, geometric_median(x))
    assert not later.b_dec.any() and (loaded.b_dec == 0.5).all()


def test_geometric_median_is_where_the_unit_vectors_cancel() -> None:
    points = tokens(101)
    points[0] += 1e4
    to_points = points - geometric_median(points)
    assert torch.nn.functional.normalize(to_points, dim=-1).sum(0).norm() < 1e-2
    assert torch.equal(geometric_median(torch.ones(5, 2)), torch.ones(2))


def test_auxk_of_a_constant_residual_is_zero_not_nan() -> None:
    dead = torch.ones(D_SAE, dtype=torch.bool)
    single = auxk_loss(torch.ones(1, D_IN), torch.ones(1, D_SAE), dead, torch.ones(D_SAE, D_IN))
    assert single == 0


# Training


def fit(sae: Any, steps: int = STEPS) -> tuple[Any, list[float]]:
    """Trains on the planted features; returns the reconstruction loss of every step."""
    torch.manual_seed(0)
    losses: list[float] = []
    forward = sae.training_forward_pass

    def recorded(step_input: TrainStepInput) -> Any:
        output = forward(step_input)
        losses.append(float(output.losses["mse_loss"].detach()))
        return output

    sae.training_forward_pass = recorded
    config = SAETrainerConfig(
        total_training_samples=steps * 256,
        train_batch_size_samples=256,
        lr=3e-3,
        lr_end=3e-4,
        lr_warm_up_steps=20,
        lr_decay_steps=steps // 5,
        dead_feature_window=100,
        logger=LoggingConfig(log_to_wandb=False),
    )
    batches = iter(planted(256 * steps)[0].split(256))
    return SAETrainer(config, sae, batches).fit(), losses


@pytest.fixture(scope="module")
def trained() -> tuple[SoftTrainingSAE, list[float]]:
    torch.manual_seed(0)
    return fit(SoftTrainingSAE(training_config()))


def test_training_meets_the_budget_and_allots_more_where_there_is_more(trained) -> None:
    sae, losses = trained
    x, count = planted(2000, seed=5)
    sae.eval()
    with torch.no_grad():
        acts = sae.encode(x)
        budget, out = sae.budget_of(x - sae.b_dec), sae.decode(acts)
    fvu = (x - out).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
    correlation = torch.corrcoef(torch.stack([budget, count.float()]))[0, 1]
    assert sum(losses[-20:]) < 0.3 * sum(losses[:20])
    assert fvu < 0.25
    assert abs(budget.mean() - K) < 0.5
    assert correlation > 0.9
    assert ((acts > 0).sum(-1) <= budget).all()


def test_what_was_trained_is_saved_for_inference_as_it_is(trained, tmp_path) -> None:
    sae, _ = trained
    x = planted(200, seed=6)[0]
    sae.eval().save_inference_model(tmp_path)
    again = SAE.load_from_disk(tmp_path)
    assert type(again) is SoftSAE
    assert torch.equal(again.encode(x), sae.encode(x)) and torch.equal(again(x), sae(x))
    details = json.loads((tmp_path / "cfg.json").read_text())["metadata"]
    assert details["training_architecture"] == "softsae"
    assert details["training_architecture_details"]["total_steps"] == STEPS


def test_training_can_be_saved_and_resumed(trained, tmp_path) -> None:
    sae, _ = trained
    x = planted(200, seed=6)[0]
    sae.eval().save_model(tmp_path)
    again = TrainingSAE.load_from_disk(tmp_path).eval()
    assert type(again) is SoftTrainingSAE and again.cfg.hard_steps == sae.cfg.hard_steps
    assert torch.equal(again(x), sae(x))


def test_a_fixed_budget_trains_and_is_saved_as_a_top_k_sae(tmp_path) -> None:
    torch.manual_seed(0)
    config = training_config(SoftTopKTrainingSAEConfig, total_steps=300, alpha_steps=150)
    sae, losses = fit(SoftTopKTrainingSAE(config), steps=300)
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])
    x = planted(200, seed=6)[0]
    acts = sae.eval().encode(x)
    assert (acts > 0).sum(-1).max() == K
    sae.save_inference_model(tmp_path)
    again = SAE.load_from_disk(tmp_path)
    assert type(again) is TopKSAE
    assert torch.equal(again.encode(x), acts) and torch.equal(again(x), sae(x))
    sae.save_model(tmp_path / "training")
    assert torch.equal(TrainingSAE.load_from_disk(tmp_path / "training").eval()(x), sae(x))


# Refusals


@pytest.mark.parametrize("make", [SoftSAEConfig, training_config])
@pytest.mark.parametrize("k", [0, 0.5, D_SAE / 2, D_SAE, -3, float("nan")])
def test_mean_budgets_that_do_not_fit_are_refused(make, k) -> None:
    shape = {"d_in": D_IN, "d_sae": D_SAE, "k": k}
    with pytest.raises(ModelError, match=rf"k is {k}, for 48 .* from 1 to below 24"):
        make(**shape) if make is SoftSAEConfig else make(SoftTrainingSAEConfig, **shape)


@pytest.mark.parametrize("k", [0, D_SAE, 2.5])
def test_fixed_budgets_that_do_not_fit_are_refused(k) -> None:
    with pytest.raises(ModelError, match=rf"k is {k}, for 48 features.*whole numbers from 1 to 47"):
        training_config(SoftTopKTrainingSAEConfig, k=k)


def test_schedules_that_do_not_fit_are_refused() -> None:
    with pytest.raises(
        ModelError, match=r"2500 alpha_steps and 10000 hard_steps do not fit .* 600"
    ):
        SoftTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=K, total_steps=STEPS)
    with pytest.raises(ModelError, match="-1 alpha_steps"):
        training_config(alpha_steps=-1)
    for alpha in (0.0, 1.0):
        with pytest.raises(ModelError, match=rf"final_alpha is {alpha}\. There is: values between"):
            training_config(final_alpha=alpha)


def test_normalisations_the_network_cannot_follow_are_refused() -> None:
    for make in (soft_sae, training_config):
        with pytest.raises(
            ModelError, match="cannot normalise its input by 'covariance_whitening'"
        ):
            make(normalize_activations="covariance_whitening")
    with pytest.raises(ModelError, match="cannot normalise its input by 'layer_norm'.*none, exp"):
        training_config(SoftTopKTrainingSAEConfig, normalize_activations="layer_norm")


def test_standardised_tokens_find_back_with_their_own_mean_and_deviation() -> None:
    sae = soft_sae(normalize_activations="layer_norm")
    x = torch.randn(9, D_IN, generator=torch.Generator().manual_seed(2)) * 7 + 3
    with torch.no_grad():
        acts, out = sae.encode(x), sae(x)
        mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        plain = soft_sae()
        torch.testing.assert_close(acts, plain.encode((x - mean) / (std + 1e-5)))
        torch.testing.assert_close(out, plain.decode(acts.clone()) * std + mean)
        sae.encode(x.flip(0))  # another text in between changes nothing
        torch.testing.assert_close(sae.decode(acts), out)
        torch.testing.assert_close(sae.decode(acts.clone(), like=x), out)
        with pytest.raises(ModelError, match=r"not the tensor that encode returned.*like=x"):
            sae.decode(acts.clone())


def test_losses_of_standardised_tokens_weigh_all_tokens_alike() -> None:
    raw = torch.randn(9, D_IN, generator=torch.Generator().manual_seed(2))
    lengths = torch.linspace(1, 50, 9)[:, None]
    outputs = []
    for x in (raw, raw * lengths):
        torch.manual_seed(0)
        sae = SoftTrainingSAE(training_config(normalize_activations="layer_norm"))
        outputs.append(sae.training_forward_pass(step_input(x, 1, sae)))
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs[0].sae_out, outputs[1].sae_out, rtol=1e-3, atol=1e-3)


def test_unknown_keys_are_refused_by_the_configs_and_the_class(tmp_path) -> None:
    for config in (soft_sae().cfg, training_config(), training_config(SoftTopKTrainingSAEConfig)):
        settings = config.to_dict()
        assert type(config).from_dict(settings) == config
        with pytest.raises(UnknownNameError, match=r"no setting 'd_sea'.*Did you mean 'd_sae'"):
            type(config).from_dict({**settings, "d_sea": 3})
    soft_sae().save_model(tmp_path)
    path = tmp_path / "cfg.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "budget": 3}))
    with pytest.raises(UnknownNameError, match="no setting 'budget'"):
        SoftSAE.load_from_disk(tmp_path)


def test_folding_decoder_norms_is_refused() -> None:
    for sae in (soft_sae(), SoftTrainingSAE(training_config())):
        with pytest.raises(ModelError, match=r"changes which features .* selects"):
            sae.fold_W_dec_norm()


def test_a_name_that_is_taken_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert SAE_CLASS_REGISTRY["softsae"] == (SoftSAE, SoftSAEConfig)
    assert {"softsae", "soft_topk"} <= SAE_TRAINING_CLASS_REGISTRY.keys()
    monkeypatch.setitem(SAE_CLASS_REGISTRY, "softsae", (TopKSAE, SoftSAEConfig))
    with pytest.raises(ModelError, match=r"architecture 'softsae'. There is: .*TopKSAE"):
        register_class(SoftSAE, SoftSAEConfig)


def test_every_exported_name_resolves_and_others_do_not() -> None:
    assert all(getattr(saes, name) is not None for name in saes.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'SoftSea'"):
        _ = saes.SoftSea
