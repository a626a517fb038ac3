"""``verify``: right dictionaries fit, and each diagnosis is made where its fault is provoked."""

from __future__ import annotations

import copy
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import gemmascope_plugin.saes as saes
from gemmascope_plugin.demo import tiny
from gemmascope_plugin.demo.build import dictionary_scores
from gemmascope_plugin.demo.corpus import HELD_OUT_SEED, make_corpus
from gemmascope_plugin.errors import (
    EmptySelectionError,
    MissingHookError,
    ModelError,
    WidthMismatchError,
)
from gemmascope_plugin.loading import load
from gemmascope_plugin.models.load_model import hooked_from_hf
from gemmascope_plugin.models.points import norm_gain
from gemmascope_plugin.splice import HookedSAE, Report, verify
from tests import tiny_models
from tests.factories import activations, n_hooks, random_sae, tiny_tokenizer
from tests.splice.gained_transcoders import folded

SPECS = list(tiny().specs)
SITES = ("res", "att", "mlp", "transcoder")
TOKENS = make_corpus(10, HELD_OUT_SEED).tokens
BACKEND = pytest.mark.parametrize("backend", ["hooked", "bridge"])


@lru_cache
def suite(backend: str = "hooked") -> Any:
    return tiny(backend=backend)


@lru_cache
def steep(backend: str = "hooked") -> Any:
    """The trained model with gains from 0.4 to 2.5, which the MLP's weights undo.

    The gains of the trained model are within 20 % of one. A real Gemma's are not. The model computes
    what it did before, and ``ln2.hook_normalized`` is the same tensor.
    """
    from transformers import AutoModelForCausalLM

    from gemmascope_plugin.demo.tiny_suite import ASSETS, MODEL_FOLDER
    from gemmascope_plugin.models.load_model import bridge_from_hf

    hf = AutoModelForCausalLM.from_pretrained(ASSETS / MODEL_FOLDER, attn_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in hf.model.layers:
            weight = layer.pre_feedforward_layernorm.weight
            factor = torch.exp(torch.rand(len(weight), generator=generator) * 1.8 - 0.9)
            weight.copy_((1 + weight) * factor - 1)
            layer.mlp.gate_proj.weight.div_(factor)
            layer.mlp.up_proj.weight.div_(factor)
    build = {"hooked": hooked_from_hf, "bridge": bridge_from_hf}[backend]
    return build(hf, suite().model.tokenizer, "steep")


def dictionary(site: str, layer: int, **hooks: str) -> Any:
    """A dictionary of the suite, told to belong elsewhere."""
    sae = copy.deepcopy(suite().load(site, layer))
    for name, hook in hooks.items():
        setattr(sae.cfg.metadata, name, hook)
    return sae


def transcoder(model: Any, layer: int, *, expects: int, hook: str) -> Any:
    """The suite's transcoder, its encoder divided by the gain so that it expects it ``expects`` times."""
    code = dictionary("transcoder", layer, hook_name=f"blocks.{layer}.{hook}")
    code.W_enc.data = code.W_enc.data / norm_gain(model, layer)[:, None] ** expects
    return code


def elsewhere(site: str, layer: int) -> dict[str, str]:
    """Hooks of the same site in another layer."""
    if site == "transcoder":
        out = f"blocks.{layer}.hook_mlp_out"
        return {"hook_name": f"blocks.{layer}.ln2.hook_normalized", "hook_name_out": out}
    name = {"res": "hook_resid_post", "att": "attn.hook_z", "mlp": "hook_mlp_out"}[site]
    return {"hook_name": f"blocks.{layer}.{name}"}


def said(report: Report) -> str:
    """The first finding of a report that says one thing is wrong."""
    assert report.verdict == "does not fit" and not report.fits
    assert len(report.causes) == 1
    return report.findings[0]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.kind}-{spec.site}-{spec.layer}")
def test_a_right_dictionary_fits(spec) -> None:
    report = verify(suite().model, load(spec), TOKENS)
    assert report.verdict == "fits" and report.causes == () and report.findings == ()
    assert report.l0 == pytest.approx(spec.l0, rel=0.1)
    assert report.fvu < 0.05
    assert abs(report.delta_loss_kept) < 1e-5
    assert abs(report.delta_loss_share) < 0.05


@pytest.mark.parametrize("site", SITES)
def test_the_bridge_says_the_same(site: str) -> None:
    sae = suite().load(site, 2)
    hooked, bridge = (verify(suite(b).model, sae, TOKENS) for b in ("hooked", "bridge"))
    assert bridge.fits
    assert bridge.l0 == pytest.approx(hooked.l0, rel=1e-3)
    assert bridge.fvu == pytest.approx(hooked.fvu, rel=1e-3)
    assert bridge.losses.spliced == pytest.approx(hooked.losses.spliced, abs=1e-4)


@pytest.mark.parametrize("site", SITES)
def test_the_figures_are_those_of_a_plain_measurement(site: str) -> None:
    sae = suite().load(site, 1)
    scores = dictionary_scores(suite().model, sae, TOKENS)
    report = verify(suite().model, sae, TOKENS)
    assert report.l0 == pytest.approx(scores["l0"], rel=1e-4)
    assert report.fvu == pytest.approx(scores["fvu"], rel=1e-3)
    assert report.n_tokens == int((TOKENS > 2).sum())
    x = activations(suite().model, TOKENS, sae.cfg.metadata.hook_name)[TOKENS == 2]
    assert report.bos_l0 == pytest.approx(float((saes.encode(sae, x) > 0).sum(-1).float().mean()))


@pytest.mark.parametrize("site", SITES)
def test_losses_are_those_of_a_plain_measurement(site: str) -> None:
    """On text without padding; elsewhere the plain one also predicts the padding."""
    sae = suite().load(site, 1)
    length = int((TOKENS > 1).sum(1).min())
    scores = dictionary_scores(suite().model, sae, TOKENS[:, :length])
    loss = verify(suite().model, sae, TOKENS[:, :length]).losses
    assert loss.clean == pytest.approx(scores["loss"], abs=1e-5)
    assert loss.spliced == pytest.approx(scores["loss_spliced"], abs=1e-5)
    assert loss.zeroed == pytest.approx(scores["loss_zeroed"], abs=1e-5)


@pytest.mark.parametrize(
    ("site", "told", "right"),
    [
        ("res", "hook_resid_mid", "hook_resid_post"),
        ("res", "hook_mlp_out", "hook_resid_post"),
        ("att", "hook_attn_out", "attn.hook_z"),
        ("att", "hook_resid_post", "attn.hook_z"),
        ("mlp", "hook_resid_mid", "hook_mlp_out"),
        ("mlp", "hook_attn_out", "hook_mlp_out"),
    ],
)
def test_wrong_site(site: str, told: str, right: str) -> None:
    sae = dictionary(site, 2, hook_name=f"blocks.2.{told}")
    text = said(verify(suite().model, sae, TOKENS))
    assert text.startswith(f"Wrong site: reading blocks.2.{right} gives L0")
    assert f"with blocks.2.{told}." in text


@BACKEND
@pytest.mark.parametrize("told", ["hook_resid_mid", "hook_mlp_in"])
def test_a_transcoder_on_the_stream_before_the_norm(backend: str, told: str) -> None:
    """``hook_mlp_in`` is what SAELens 6.54 names for Gemma Scope 2's; it does not even fire."""
    model = steep(backend)
    code = transcoder(model, 1, expects=1, hook=told)
    text = said(verify(model, code, TOKENS))
    assert text.startswith("Wrong site: reading blocks.1.mlp.hook_in (with gain) gives L0 10.")


def test_a_transcoder_with_a_wrong_output() -> None:
    code = dictionary("transcoder", 1, hook_name_out="blocks.1.hook_resid_post")
    assert "written to blocks.1.hook_mlp_out" in said(verify(suite().model, code, TOKENS))


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize(("true", "told"), [(1, 2), (3, 2), (3, 0)])
def test_wrong_layer(site: str, true: int, told: int) -> None:
    hooks = elsewhere(site, told)
    report = verify(suite().model, dictionary(site, true, **hooks), TOKENS)
    assert report.causes == ("wrong layer",)
    right = elsewhere(site, true)["hook_name"]
    assert said(report).startswith(f"Wrong layer: reading {right} gives L0")


@BACKEND
@pytest.mark.parametrize("layer", [0, 3])
def test_gain_missing(backend: str, layer: int) -> None:
    model = steep(backend)
    code = transcoder(model, layer, expects=1, hook="ln2.hook_normalized")
    text = said(verify(model, code, TOKENS))
    assert text.startswith(f"Gain missing: reading blocks.{layer}.mlp.hook_in (with gain) gives L0")


@BACKEND
@pytest.mark.parametrize("layer", [0, 3])
def test_gain_doubled(backend: str, layer: int) -> None:
    model = steep(backend)
    code = transcoder(model, layer, expects=0, hook="mlp.hook_in")
    text = said(verify(model, code, TOKENS))
    right = f"blocks.{layer}.ln2.hook_normalized (without gain)"
    assert text.startswith(f"Gain doubled: reading {right} gives L0")


def test_gain_expected_twice() -> None:
    code = transcoder(steep(), 1, expects=2, hook="mlp.hook_in")
    text = said(verify(steep(), code, TOKENS))
    assert text.startswith("Gain missing: reading blocks.1.mlp.hook_in (with gain twice) gives L0")


@pytest.mark.parametrize("layer", range(4))
@pytest.mark.parametrize(
    ("expects", "hook", "cause"),
    [(1, "ln2.hook_normalized", "gain missing"), (0, "mlp.hook_in", "gain doubled")],
)
def test_even_gains_within_a_fifth_of_one_are_told_apart(layer, expects, hook, cause) -> None:
    """With the gains that training left, a wrong reading would pass any limit: 0.02 against 0.01."""
    model = suite().model
    report = verify(model, transcoder(model, layer, expects=expects, hook=hook), TOKENS)
    assert report.causes == (cause,)


@BACKEND
def test_a_transcoder_that_expects_the_gain_fits_where_it_is(backend: str) -> None:
    model = steep(backend)
    report = verify(model, transcoder(model, 1, expects=1, hook="mlp.hook_in"), TOKENS)
    plain = verify(model, suite().load("transcoder", 1), TOKENS)
    assert report.fits and plain.fits
    assert report.fvu == pytest.approx(plain.fvu, rel=1e-3)
    assert report.losses.spliced == pytest.approx(plain.losses.spliced, abs=1e-4)


@BACKEND
def test_folded_norms(backend: str) -> None:
    code = transcoder(steep(backend), 1, expects=1, hook="mlp.hook_in")
    model = folded(steep(backend))
    report = verify(model, code, TOKENS)
    assert report.causes == ("folded norms",)
    assert "gemmascope_plugin.load_model()" in said(report)
    assert torch.isnan(torch.tensor(report.delta_loss)) and report.losses.clean > 0
    without_gain = suite().load("transcoder", 1)
    assert verify(model, without_gain, TOKENS).fits


@pytest.mark.parametrize("site", SITES)
def test_bos_included(site: str) -> None:
    sae = suite().load(site, 2)
    text = said(verify(suite().model, sae, TOKENS, exclude=()))
    assert text.startswith("BOS included: ")
    assert "without special tokens gives L0" in text and "exclude=('bos', 'eos', 'pad')" in text


def test_bos_left_out() -> None:
    """One feature that tells special tokens from words: of use only where both are counted."""
    model, name = suite().model, "blocks.2.hook_resid_post"
    x, special = activations(model, TOKENS, name), TOKENS <= 2
    word = x[~special].mean(0)
    away = x[special].mean(0) - word
    sae = random_sae(128, 1, name)
    sae.W_enc.data, sae.W_dec.data = away[:, None] / away.dot(away), away[None]
    sae.b_enc.data, sae.b_dec.data = -(word @ sae.W_enc), word
    sae.threshold.data = torch.tensor([0.5])
    text = said(verify(model, sae, TOKENS))
    assert text.startswith(f"BOS left out: reading {name} with every token gives L0")


def random_model() -> Any:
    """The shape of the trained model, with random weights."""
    config = suite().model.cfg
    shape = {
        "vocab_size": config.d_vocab,
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "head_dim": 32,
        "intermediate_size": 384,
    }
    return hooked_from_hf(tiny_models.gemma2(**shape), tiny_tokenizer(), "random")


@pytest.mark.parametrize("site", SITES)
def test_wrong_model(site: str) -> None:
    text = said(verify(random_model(), suite().load(site, 2), TOKENS))
    assert text.startswith("Wrong model: ")
    assert "the dictionary is for gemma-2-tiny, this one is random" in text


def test_damaged_parameters_fit_nowhere() -> None:
    sae = dictionary("mlp", 2)
    sae.W_enc.data = sae.W_enc.data.flip(0)
    assert "damaged parameters" in said(verify(suite().model, sae, TOKENS))


@pytest.mark.parametrize("transpose", [False, True])
def test_an_affine_skip_counts(transpose: bool) -> None:
    """A skip fitted to what the features leave out helps; its transpose does harm."""
    from sae_lens import SAE

    model, plain = suite().model, suite().load("transcoder", 1)
    metadata, keep = plain.cfg.metadata, TOKENS > 2
    x = activations(model, TOKENS, metadata.hook_name)[keep]
    y = activations(model, TOKENS, metadata.hook_name_out)[keep]
    matrix = torch.linalg.lstsq(x, y - saes.decode(plain, saes.encode(plain, x))).solution
    name = "jumprelu_skip_transcoder"
    config = SAE.get_sae_config_class_for_architecture(name).from_dict(plain.cfg.to_dict())
    code: Any = SAE.get_sae_class_for_architecture(name)(config)
    code.load_state_dict({**plain.state_dict(), "W_skip": matrix if transpose else matrix.T})
    fvu, before = (verify(model, sae, TOKENS).fvu for sae in (code, plain))
    assert (fvu > before) if transpose else (fvu < 0.9 * before)


def test_text_may_be_prompts_of_any_lengths() -> None:
    model, sae = suite().model, suite().load("res", 1)
    words = [
        model.tokenizer.decode(row[row > 2][:n]) for row, n in zip(TOKENS, (7, 11, 9), strict=False)
    ]
    report = verify(model, sae, words)
    assert report.n_tokens == 27
    assert report.fits and report.findings[0].startswith("Few tokens: 27 were measured")
    single = verify(model, sae, words[0])
    assert single.n_tokens == 7
    ids = TOKENS[:1, :8]
    assert verify(model, sae, ids).l0 == single.l0 == verify(model, sae, ids[0]).l0


def test_one_word_is_enough_to_run() -> None:
    report = verify(suite().model, suite().load("res", 1), TOKENS[:1, :2])
    assert report.n_tokens == 1 and torch.isnan(torch.tensor(report.fvu))
    assert "fvu: nan" in repr(report) and "Few tokens: 1 " in report.findings[0]


def test_without_a_tokenizer_token_ids_are_enough() -> None:
    model = copy.deepcopy(suite().model)
    model.tokenizer = None
    report = verify(model, suite().load("res", 1), TOKENS, exclude=(0, 1, 2))
    assert report.fits and report.bos_l0 is None
    with pytest.raises(ModelError, match="needs a tokenizer"):
        verify(model, suite().load("res", 1), TOKENS)


def test_a_hooked_dictionary_is_as_good() -> None:
    sae = suite().load("res", 1)
    assert verify(suite().model, HookedSAE(sae, error="drop"), TOKENS[:4]).fits


def test_an_undeclared_l0_is_said() -> None:
    sae = random_sae(128, 64, "blocks.1.hook_resid_post")
    report = verify(suite().model, sae, TOKENS)
    assert report.declared_l0 is None
    assert any("declares no L0" in finding for finding in report.findings)
    assert report.causes == ("wrong model",)


def test_a_report_shows_itself() -> None:
    report = verify(suite().model, suite().load("transcoder", 1), TOKENS)
    text = repr(report)
    assert "verdict: fits" in text and "excluded: bos, eos, pad" in text
    assert "blocks.1.ln2.hook_normalized -> blocks.1.hook_mlp_out" in text
    assert "(declared 10.59)" in text
    page = report._repr_html_()
    assert "-&gt; blocks.1.hook_mlp_out" in page and "<script" not in page
    row = report.to_frame().iloc[0]
    assert row["verdict"] == "fits" and row["l0"] == report.l0
    assert row["delta_loss"] == pytest.approx(report.losses.spliced - report.losses.clean)
    tried = report.tried_frame()
    assert set(tried["would_mean"]) == {"gain missing", "wrong site", "wrong layer"}


def test_the_model_is_left_as_it_was() -> None:
    model = suite().model
    before = n_hooks(model)
    verify(model, suite().load("res", 1), TOKENS[:2])
    assert n_hooks(model) == before


def test_what_cannot_be_verified_is_refused() -> None:
    model, sae = suite().model, suite().load("res", 1)
    with pytest.raises(EmptySelectionError, match="only excluded tokens"):
        verify(model, sae, torch.tensor([[2, 5, 6], [2, 1, 0]]))
    with pytest.raises(EmptySelectionError, match="no prompt"):
        verify(model, sae, [])
    with pytest.raises(MissingHookError, match="no hook 'blocks.9.hook_resid_post'"):
        verify(model, dictionary("res", 1, hook_name="blocks.9.hook_resid_post"), TOKENS)
    with pytest.raises(WidthMismatchError, match=r"width 128.*hook_post has 384"):
        verify(model, dictionary("res", 1, hook_name="blocks.1.mlp.hook_post"), TOKENS)
    tree: Any = torch.nn.Module()
    tree.cfg = SimpleNamespace(architecture=lambda: "tree_sae")
    with pytest.raises(ModelError, match="splicing for jumprelu"):
        verify(model, tree, TOKENS)
