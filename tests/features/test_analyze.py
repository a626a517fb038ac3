"""Features of a text: equal to a slow count, special tokens left out, text escaped."""

from __future__ import annotations

import math

import pytest
import torch

from gemmascope_plugin.errors import (
    EmptySelectionError,
    FeatureIndexError,
    UnknownNameError,
)
from gemmascope_plugin.features import Features, analyze
from gemmascope_plugin.splice import HookedSAE
from tests import factories
from tests.factories import activations, n_hooks
from tests.splice.reference import features, reconstruction
from tests.tiny_models import BOS_ID, random_tokens

TOKENS = random_tokens(batch_size=1)
TEXT = " ".join(f"w{i}" for i in TOKENS[0, 1:].tolist())


def hooks_of(sae) -> tuple[str, str]:
    hook_in = sae.cfg.metadata.hook_name
    return hook_in, sae.cfg.metadata.hook_name_out or hook_in


@torch.no_grad()
def test_figures_equal_a_slow_count(model) -> None:
    saes = factories.four_dictionaries(model)
    result = analyze(model, saes, TEXT)
    for sae in saes:
        hook_in, hook_out = hooks_of(sae)
        x, y = (activations(model, TOKENS, name)[0, 1:] for name in (hook_in, hook_out))
        acts, error = features(sae, x), y - reconstruction(sae, x)
        fvu = float(error.pow(2).sum() / (y - y.mean(0)).pow(2).sum())
        assert torch.allclose(result.acts[hook_out][1:], acts, atol=1e-5)
        assert result.fits[hook_out].l0 == pytest.approx(float((acts > 0).sum()) / len(acts))
        assert result.fits[hook_out].variance_explained == pytest.approx(1 - fvu, rel=1e-4)


def test_excluded_tokens_have_no_features(hooked2) -> None:
    sae = factories.residual(hooked2, 1)
    (acts,) = analyze(hooked2, sae, TEXT).acts.values()
    assert not acts[0].any()
    (everything,) = analyze(hooked2, sae, TEXT, exclude=()).acts.values()
    x = activations(hooked2, TOKENS, hooks_of(sae)[0])[0]
    assert torch.allclose(everything, features(sae, x), atol=1e-5)


def test_one_row_per_token_site_and_active_feature(hooked2) -> None:
    saes = [factories.residual(hooked2, layer) for layer in (0, 1)]
    result = analyze(hooked2, saes, TEXT, top_k=2)
    frame = result.to_frame()
    assert list(frame.columns) == ["pos", "token", "site", "feature", "activation"]
    assert frame.groupby(["pos", "site"]).size().max() <= 2
    assert (frame["pos"] > 0).all()
    for row in frame.head(5).itertuples():
        assert row.token == f"w{TOKENS[0, row.pos]}"
        assert row.activation == float(result.acts[row.site][row.pos, row.feature])


def test_top_features_are_ranked_once_each(hooked2) -> None:
    saes = [factories.residual(hooked2, layer) for layer in (0, 1)]
    result = analyze(hooked2, saes, TEXT)
    top = result.top(4)
    assert top["activation"].is_monotonic_decreasing
    strongest = max(float(acts.max()) for acts in result.acts.values())
    assert top["activation"][0] == strongest
    site = "blocks.1.hook_resid_post"
    assert set(result.top(4, site=site)["site"]) == {site}
    assert not result.top(50).duplicated(["site", "feature"]).any()


def test_the_summary_has_a_row_per_site(hooked2) -> None:
    result = analyze(hooked2, factories.residual(hooked2, 1), TEXT)
    assert list(result.summary().columns) == ["site", "l0", "variance_explained"]
    assert repr(result).startswith("Features(20 tokens, excluded ('bos', 'eos', 'pad'), blocks.1")


def test_token_ids_will_do(hooked2) -> None:
    sae = factories.residual(hooked2, 1)
    assert analyze(hooked2, sae, TOKENS).fits == analyze(hooked2, sae, TEXT).fits


def test_tokens_and_labels_are_escaped() -> None:
    site, bad = "blocks.0.hook_resid_post", "<script>alert(1)</script>"
    acts = {site: torch.tensor([[1.0, 0.0], [2.0, 3.0]])}
    page = Features((bad, "b"), acts, {}, ("bos",), 5).to_html({(site, 1): bad})
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "excluded tokens: bos" in page


def test_html_is_made_for_notebooks(hooked2) -> None:
    assert "w" in analyze(hooked2, factories.residual(hooked2, 1), TEXT)._repr_html_()


def test_one_token_has_no_variance(hooked2) -> None:
    (fit,) = analyze(hooked2, factories.residual(hooked2, 1), "w5").fits.values()
    assert math.isnan(fit.variance_explained)


def test_the_model_is_left_alone(model) -> None:
    hooks = n_hooks(model)
    analyze(model, factories.four_dictionaries(model), TEXT)
    assert n_hooks(model) == hooks


@pytest.mark.parametrize("text", ["", " ", "<bos>", "<bos> <pad>", torch.tensor([[BOS_ID]])])
def test_a_text_without_words_is_an_error(hooked2, text) -> None:
    with pytest.raises(EmptySelectionError, match="prompt (is empty|has only excluded tokens)"):
        analyze(hooked2, factories.residual(hooked2, 1), text)


def test_two_dictionaries_at_one_site_are_told_apart(hooked2) -> None:
    saes = [factories.transcoder(hooked2, 1), factories.mlp(hooked2, 1)]
    result = analyze(hooked2, saes, TEXT)
    for number, sae in enumerate(saes):
        alone = analyze(hooked2, sae, TEXT)
        site = "blocks.1.hook_mlp_out"
        assert torch.equal(result.acts[f"{site}[{number}]"], alone.acts[site])
        assert result.fits[f"{site}[{number}]"] == alone.fits[site]


def test_unknown_sites_and_features_are_errors(hooked2) -> None:
    result = analyze(hooked2, factories.residual(hooked2, 1), TEXT)
    with pytest.raises(UnknownNameError, match="Did you mean 'blocks.1.hook_resid_post'"):
        result.top(site="blocks.1.hook_resid_pos")
    with pytest.raises(UnknownNameError, match="There is: blocks.1"):
        result.activations("nowhere", 1)
    with pytest.raises(FeatureIndexError, match="Feature 96 does not exist"):
        result.activations("blocks.1.hook_resid_post", 96)


def test_the_options_of_a_wrapped_dictionary_do_not_count(hooked2) -> None:
    sae = factories.residual(hooked2, 1)
    wrapped = HookedSAE(sae, error="drop", exclude=())
    assert analyze(hooked2, wrapped, TEXT).fits == analyze(hooked2, sae, TEXT).fits
