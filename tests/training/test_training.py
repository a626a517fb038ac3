"""Training in its thinnest form: what comes out is a dictionary in raw units."""

from __future__ import annotations

import pytest
import torch

from gemmascope_plugin import saes
from gemmascope_plugin.catalog import SaeSpec
from gemmascope_plugin.errors import BadFileError, EmptySelectionError
from gemmascope_plugin.loading import load
from gemmascope_plugin.loading.npz import write_npz
from gemmascope_plugin.training import Recipe, train_dictionary
from gemmascope_plugin.training.in_memory import _in_raw_units, _scale, _trainer

RECIPE = Recipe(d_sae=32, steps=300, batch_size=128, target_l0=3.0, lr=5e-3)


def sparse_activations(n: int = 4096, d: int = 12, scale: float = 7.0) -> torch.Tensor:
    """Sums of two out of 16 fixed directions: a dictionary can explain them."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(16, d, generator=generator)
    chosen = torch.rand(n, 16, generator=generator).topk(2).indices
    return scale * directions[chosen].sum(1)


@pytest.fixture(scope="module")
def trained():
    x = sparse_activations()
    return x, train_dictionary(x, None, RECIPE)


def as_sae(params, tmp_path, kind="sae", site="res"):
    write_npz(tmp_path / "params.npz", params)
    return load(SaeSpec.from_folder(tmp_path, model="toy", site=site, layer=0, kind=kind))


def test_trained_sae_explains_raw_activations(trained, tmp_path):
    x, params = trained
    sae = as_sae(params, tmp_path)
    acts = saes.encode(sae, x)
    error = (x - saes.decode(sae, acts)).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
    assert error < 0.35
    assert acts.gt(0).sum(-1).float().mean() < 12


def test_decoder_rows_have_unit_norm(trained):
    _, params = trained
    torch.testing.assert_close(params["W_dec"].norm(dim=1), torch.ones(32))


def test_training_is_reproducible_and_leaves_the_global_random_state_alone(trained):
    x, params = trained
    state = torch.get_rng_state()
    again = train_dictionary(x, None, RECIPE)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(params[key], again[key]) for key in params)


def test_folding_the_scales_changes_nothing_but_the_units():
    x = sparse_activations(512)
    target = sparse_activations(512, scale=0.3).flip(0)
    scale_in, scale_out = _scale(x), _scale(target)
    data = torch.cat([x * scale_in, target * scale_out], -1)
    sae = _trainer(data, 12, True, RECIPE).sae
    sae.fold_W_dec_norm()
    with torch.no_grad():
        sae.b_enc.normal_()
        sae.b_dec.normal_()
        scaled_acts = sae.encode(x * scale_in)
        scaled_out = sae.decode(scaled_acts)
    params = _in_raw_units(sae, scale_in, scale_out)
    pre = x @ params["W_enc"] + params["b_enc"]
    acts = torch.where(pre > params["threshold"], pre.relu(), 0)
    torch.testing.assert_close(acts, scaled_acts / scale_out, rtol=1e-4, atol=1e-5)
    out = acts @ params["W_dec"] + params["b_dec"]
    torch.testing.assert_close(out, scaled_out / scale_out, rtol=1e-4, atol=1e-5)


def test_transcoder_learns_another_tensor(tmp_path):
    x = sparse_activations()
    target = x.roll(3, dims=-1).relu()
    params = train_dictionary(x, target, RECIPE)
    sae = as_sae(params, tmp_path, "transcoder", "mlp")
    out = saes.decode(sae, saes.encode(sae, x))
    error = (target - out).pow(2).sum() / (target - target.mean(0)).pow(2).sum()
    own_input = (x - out).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
    assert error < 0.5 < own_input


def test_too_few_tokens_and_broken_activations_are_refused():
    x = sparse_activations(64)
    with pytest.raises(EmptySelectionError, match="64 tokens are fewer than one batch of 128"):
        train_dictionary(x, None, RECIPE)
    broken = sparse_activations(512)
    broken[3, 3] = float("nan")
    with pytest.raises(BadFileError, match="activations hold values that are not finite"):
        train_dictionary(broken, None, RECIPE)
