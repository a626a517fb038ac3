"""Measures of a dictionary: each equal to a slow, obvious reference; nothing counted that should not."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from gemmascope_plugin.errors import (
    EmptySelectionError,
    InputError,
    MissingHookError,
    ModelError,
    UnknownNameError,
    WidthMismatchError,
)
from gemmascope_plugin.measures import Measures, measure
from gemmascope_plugin.measures.measure import max_cosines, mean_max_cosine, uniformity
from gemmascope_plugin.models import flatten_heads, restore_heads
from gemmascope_plugin.saes import weights_of
from gemmascope_plugin.splice import HookedSAE
from tests import factories
from tests.factories import activations, n_hooks
from tests.splice.reference import features, reconstructed, reconstruction
from tests.splice.test_level_and_encoder import matryoshka, prefix
from tests.tiny_models import FIRST_WORD_ID, PAD_ID, random_tokens

TOKENS = random_tokens(batch_size=5)
TOKENS[3, 14:] = PAD_ID
KEEP = TOKENS >= FIRST_WORD_ID
KINDS = [factories.residual, factories.attention, factories.mlp, factories.transcoder]


def sites(model: Any, sae: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What the dictionary reads and what it should give, at the tokens that count."""
    hook_in = sae.cfg.metadata.hook_name
    hook_out = sae.cfg.metadata.hook_name_out or hook_in
    return activations(model, TOKENS, hook_in)[KEEP], activations(model, TOKENS, hook_out)[KEEP]


def figures_of(measures: Measures) -> dict[str, float]:
    return {name: x for name, x in measures.row().items() if isinstance(x, (int, float))}


def slow_loss(logits: torch.Tensor) -> float:
    losses = [
        -float(logits[row, pos].log_softmax(-1)[TOKENS[row, pos + 1]])
        for row in range(len(TOKENS))
        for pos in range(TOKENS.shape[1] - 1)
        if KEEP[row, pos] and TOKENS[row, pos + 1] != PAD_ID
    ]
    return sum(losses) / len(losses)


def constant(sae: Any, value: torch.Tensor) -> Any:
    """A dictionary that writes ``value`` whatever it reads."""
    sae = copy.deepcopy(sae)
    sae.W_dec.data.zero_()
    sae.b_dec.data = value
    return sae


@torch.no_grad()
@pytest.mark.parametrize("make", KINDS)
def test_sparsity_and_fit_equal_a_slow_count(model, make) -> None:
    sae = make(model, 1)
    measures = measure(model, sae, TOKENS, batch_size=2, n_positions=0)
    x, y = sites(model, sae)
    active = features(sae, x) > 0
    error = (y - reconstruction(sae, x)).pow(2).sum()
    assert measures.n_tokens == len(x) == int(KEEP.sum())
    assert measures.l0 == pytest.approx(sum(int(row.sum()) for row in active) / len(x))
    assert measures.fvu == pytest.approx(float(error / (y - y.mean(0)).pow(2).sum()), rel=1e-4)
    for feature in range(active.shape[1]):
        assert float(measures.frequencies[feature]) == int(active[:, feature].sum()) / len(x)
    dead = [f for f in range(active.shape[1]) if not active[:, f].any()]
    dense = [f for f in range(active.shape[1]) if int(active[:, f].sum()) > 0.1 * len(x)]
    assert measures.dead_share == pytest.approx(len(dead) / active.shape[1])
    assert measures.dense_share == pytest.approx(len(dense) / active.shape[1])
    assert 0 < measures.dense_share < 1


@torch.no_grad()
@pytest.mark.parametrize("make", KINDS)
def test_losses_are_those_of_the_transformers_model(model, hf, make) -> None:
    """Zeros and means are written there by a dictionary that knows nothing else."""
    sae = make(model, 1)
    measures = measure(model, sae, TOKENS, batch_size=2, n_positions=0)
    _, y = sites(model, sae)
    with reconstructed(hf, [sae], TOKENS):
        spliced = slow_loss(hf(TOKENS).logits)
    with reconstructed(hf, [constant(sae, torch.zeros(y.shape[1]))], TOKENS):
        zeroed = slow_loss(hf(TOKENS).logits)
    with reconstructed(hf, [constant(sae, y.mean(0))], TOKENS):
        mean = slow_loss(hf(TOKENS).logits)
    clean = slow_loss(hf(TOKENS).logits)
    losses = measures.losses
    assert losses.clean == pytest.approx(clean, abs=1e-5)
    assert losses.spliced == pytest.approx(spliced, abs=1e-5)
    assert losses.zeroed == pytest.approx(zeroed, abs=1e-5)
    assert losses.mean_ablated == pytest.approx(mean, abs=1e-5)
    assert measures.delta_loss == losses.spliced - losses.clean
    delta = losses.spliced - losses.clean
    assert losses.share_of_zero == pytest.approx(delta / (losses.zeroed - losses.clean))
    assert losses.share_of_mean == pytest.approx(delta / (losses.mean_ablated - losses.clean))


@torch.no_grad()
@pytest.mark.parametrize("make", [factories.residual, factories.attention, factories.transcoder])
def test_evenness_equals_finite_differences(double, make) -> None:
    """Each active feature pushed a little at its own token, the logit read off, one by one."""
    sae = make(double, 1)
    tokens = random_tokens(batch_size=2, length=6)
    hook_in = sae.cfg.metadata.hook_name
    hook_out = sae.cfg.metadata.hook_name_out or hook_in
    acts = features(sae, activations(double, tokens, hook_in))

    def score(row: int, pos: int, change: torch.Tensor) -> float:
        def add(y: torch.Tensor, hook: Any) -> torch.Tensor:
            flat = flatten_heads(y).clone()
            flat[row, pos] += change
            return restore_heads(flat, y)

        with double.hooks(fwd_hooks=[(hook_out, add)]):
            logits = double(tokens)[row, pos]
        return float(logits[tokens[row, pos + 1]] - logits.mean())

    expected = []
    for row in range(2):
        for pos in range(1, 5):
            active = acts[row, pos].nonzero().flatten().tolist()
            effects = []
            for i in active:
                step = 1e-4 * acts[row, pos, i] * sae.W_dec[i]
                effects.append(abs(score(row, pos, step) - score(row, pos, -step)))
            if active:
                shares = [effect / sum(effects) for effect in effects]
                entropy = -sum(p * math.log(p) for p in shares)
                expected.append(math.exp(entropy) / len(active))
    measures = measure(double, sae, tokens, n_positions=20)
    assert measures.r_l0_tokens == len(expected) > 2
    assert measures.r_l0 == pytest.approx(sum(expected) / len(expected), rel=1e-3)


def test_evenness_is_between_one_over_l0_and_one(hooked2) -> None:
    weights = weights_of(factories.residual(hooked2, 1))
    x, _ = sites(hooked2, factories.residual(hooked2, 1))
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    values = uniformity(weights, x, grad)
    counts = (features(factories.residual(hooked2, 1), x) > 0).sum(-1)
    counts = counts[counts > 0]
    assert len(values) == len(counts)
    assert (values <= 1 + 1e-6).all() and (values >= 1 / counts - 1e-6).all()
    assert torch.allclose(values[counts == 1], torch.ones(1))
    assert len(uniformity(weights, x, torch.zeros_like(grad))) == 0


def with_skip(plain: Any) -> Any:
    """The transcoder as one with an affine skip, as SAELens starts it."""
    from sae_lens import SAE

    architecture = "jumprelu_skip_transcoder"
    config = {**plain.cfg.to_dict(), "architecture": architecture}
    config["metadata"] = dict(
        hook_name=plain.cfg.metadata.hook_name, hook_name_out=plain.cfg.metadata.hook_name_out
    )
    config_class = SAE.get_sae_config_class_for_architecture(architecture)
    skip: Any = SAE.get_sae_class_for_architecture(architecture)(config_class.from_dict(config))
    for name in ("W_enc", "b_enc", "threshold", "W_dec", "b_dec"):
        getattr(skip, name).data = getattr(plain, name).data.clone()
    return skip


@torch.no_grad()
def test_the_affine_skip_is_part_of_the_reconstruction(hooked2) -> None:
    plain = factories.transcoder(hooked2, 1)
    skip = with_skip(plain)
    x, y = sites(hooked2, plain)
    # what the features leave over, as far as a linear map of the input can give it
    A = torch.linalg.lstsq(x, y - reconstruction(plain, x)).solution
    skip.W_skip.data = A.T.contiguous()
    measures = measure(hooked2, skip, TOKENS, n_positions=0)
    error = (y - reconstruction(plain, x) - x @ A).pow(2).sum()
    assert measures.fvu == pytest.approx(float(error / (y - y.mean(0)).pow(2).sum()), rel=1e-3)
    assert measures.fvu < 0.9 * measure(hooked2, plain, TOKENS, n_positions=0).fvu


@pytest.mark.parametrize("level", [0, 1])
def test_a_level_is_measured_as_the_dictionary_of_its_first_features(hooked2, level) -> None:
    sae = matryoshka(hooked2)
    width = sae.cfg.metadata.levels[level]
    measures = measure(hooked2, HookedSAE(sae, level=level, error="keep", exclude=()), TOKENS)
    expected = measure(hooked2, prefix(sae, width), TOKENS)
    assert (measures.level, measures.d_sae) == (level, width)
    row = figures_of(measures)
    assert row.pop("level") == level
    assert row == pytest.approx(figures_of(expected))


def test_neither_batches_nor_lengths_matter(hooked2) -> None:
    sae = factories.residual(hooked2, 1)
    whole = measure(hooked2, sae, TOKENS, n_positions=50)
    alone = measure(hooked2, sae, TOKENS, n_positions=50, batch_size=1)
    # the padding cut off by hand
    parts = [TOKENS[:3], TOKENS[3:4, :14], TOKENS[4:]]
    cut = measure(hooked2, sae, parts, n_positions=50)
    for other in (alone, cut):
        assert figures_of(other) == pytest.approx(figures_of(whole), rel=1e-4)
        assert other.r_l0_tokens == whole.r_l0_tokens
    assert torch.equal(cut.frequencies, whole.frequencies)


def test_every_token_counts_when_none_is_excluded(hooked2) -> None:
    sae = factories.residual(hooked2, 1)
    measures = measure(hooked2, sae, TOKENS, exclude=(), n_positions=0)
    assert measures.n_tokens == TOKENS.numel() and measures.exclude == ()
    assert measure(hooked2, sae, TOKENS, exclude="pad", n_positions=0).n_tokens == int(
        (TOKENS != PAD_ID).sum()
    )


def test_the_histogram_counts_every_feature_once(hooked2) -> None:
    measures = measure(hooked2, factories.residual(hooked2, 1), TOKENS, n_positions=0)
    frame = measures.histogram()
    assert list(frame.columns) == ["above", "up_to", "n_features"]
    assert frame["n_features"].sum() == measures.d_sae
    assert frame["n_features"][0] == round(measures.dead_share * measures.d_sae)
    frequencies = measures.frequencies.tolist()
    for row in frame.iloc[1:].itertuples():
        assert row.n_features == sum(row.above < f <= row.up_to for f in frequencies)
    assert frame["up_to"].iloc[-1] == 1.0


def test_maximum_cosines_in_blocks_equal_the_whole_matrix() -> None:
    W_dec = torch.randn(23, 5, generator=torch.Generator().manual_seed(0)) * 7
    W_dec[4] = 0
    W_dec[9] = -3 * W_dec[2]
    expected = []
    for i in range(23):
        cosines = [
            float(torch.nn.functional.cosine_similarity(W_dec[i], W_dec[j], dim=0))
            for j in range(23)
            if j not in (i, 4)
        ]
        if i != 4:
            expected.append(max(cosines))
    for chunk in (None, 1, 7, 23):
        measures = max_cosines(W_dec, chunk=chunk)
        assert measures.tolist() == pytest.approx(expected, abs=1e-6)
    assert mean_max_cosine(W_dec.bfloat16()) == pytest.approx(sum(expected) / 22, abs=1e-2)
    assert math.isnan(mean_max_cosine(W_dec[4:6]))


def test_a_row_and_a_sentence(hooked2) -> None:
    measures = measure(hooked2, factories.transcoder(hooked2, 1), TOKENS, n_positions=2)
    frame = measures.to_frame()
    assert len(frame) == 1 and frame["l0"][0] == measures.l0
    text = repr(measures)
    assert "blocks.1.ln2.hook_normalized -> blocks.1.hook_mlp_out, 96 features" in text
    assert "excluded ('bos', 'eos', 'pad')" in text
    assert "<table" in measures._repr_html_()


def test_the_model_is_left_alone(model) -> None:
    hooks, wanting = n_hooks(model), [p.requires_grad for p in model.parameters()]
    measure(model, factories.transcoder(model, 1), TOKENS, n_positions=1)
    assert n_hooks(model) == hooks
    assert [p.requires_grad for p in model.parameters()] == wanting


def test_one_token_has_neither_variance_nor_loss(hooked2) -> None:
    measures = measure(hooked2, factories.residual(hooked2, 1), TOKENS[:1, 1:2])
    assert (
        math.isnan(measures.fvu) and math.isnan(measures.delta_loss) and math.isnan(measures.r_l0)
    )


def test_what_cannot_be_measured_is_an_error(hooked2) -> None:
    sae = factories.residual(hooked2, 1)
    with pytest.raises(EmptySelectionError, match="only excluded tokens.*1 tokens, exclude.*Try"):
        measure(hooked2, sae, TOKENS[:1, :1])
    with pytest.raises(EmptySelectionError, match="no documents"):
        measure(hooked2, sae, [])
    with pytest.raises(InputError, match="batch_size=0 .*Try: batch_size=16"):
        measure(hooked2, sae, TOKENS, batch_size=0)
    with pytest.raises(ModelError, match="n_positions=-1 is negative.*Try: n_positions=0"):
        measure(hooked2, sae, TOKENS, n_positions=-1)
    with pytest.raises(UnknownNameError, match="Unknown special token 'boss'.*mean 'bos'"):
        measure(hooked2, sae, TOKENS, exclude=("boss",))
    with pytest.raises(ModelError, match="chosen positions only.*Try: HookedSAE"):
        measure(hooked2, HookedSAE(sae, positions=[1]), TOKENS)
    wide = factories.random_sae(33, 8, "blocks.1.hook_resid_post")
    with pytest.raises(WidthMismatchError, match="width 33, the model's .* has 32.*Try"):
        measure(hooked2, wide, TOKENS)
    lost = factories.random_sae(32, 8, "blocks.7.hook_resid_post")
    with pytest.raises(MissingHookError, match="no hook 'blocks.7"):
        measure(hooked2, lost, TOKENS)
