"""Crosscoders and CLTs in a model: gradients, which tokens, errors, and weights that stay on disk."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from gemmascope_plugin.errors import (
    EmptySelectionError,
    FeatureIndexError,
    HookNotFiredError,
    MissingHookError,
    ModelError,
    UnknownNameError,
    WidthMismatchError,
)
from gemmascope_plugin.models import gradients
from gemmascope_plugin.saes import CrossCoderSAE, CrossCoderSAEConfig, CrossLayerTranscoder
from gemmascope_plugin.splice import Ablate, Add, HookedCrossLayer, Scale, splice
from tests.factories import activations, n_hooks, residual, tiny_hf
from tests.splice.cross_layer_cases import ERRORS, ONE, OUTS, TOKENS, metric, outputs
from tests.splice.cross_layer_reference import D, clt, crosscoder, replaced
from tests.splice.gained_transcoders import folded
from tests.splice.kinds import TWO_KINDS
from tests.splice.reference import largest
from tests.tiny_models import EOS_ID, FIRST_WORD_ID, PAD_ID, random_tokens


@pytest.fixture
def code2() -> Any:
    """A new cross-layer transcoder of ``hooked2``."""
    return clt(tiny_hf("gemma2"))


# --------------------------------------------------------------------------- gradients
EPS = 1e-4


def slope(model: Any, additions: dict[str, torch.Tensor], pos: int) -> float:
    """Central difference of the metric when tensors are added at several hooks at once."""

    def moved(amount: float) -> float:
        def add(direction):
            def hook_fn(x, hook):
                x = x.clone()
                x[:, pos] += amount * direction
                return x

            return hook_fn

        hooks = [(name, add(direction)) for name, direction in additions.items()]
        with torch.no_grad(), model.hooks(fwd_hooks=hooks):
            return float(metric(model(ONE)))

    return (moved(EPS) - moved(-EPS)) / (2 * EPS)


def test_a_feature_gets_the_gradient_of_everything_it_writes(model, hf) -> None:
    """``sum_{j >= i} g_j W_dec_i[:, j]^T`` with the bare model's gradients ``g``."""
    code = clt(hf, affine=True)
    g = gradients(model, TOKENS, metric, [*OUTS, "hook_embed"])
    names = [f"{name}.hook_sae_acts_post" for name in OUTS]
    with splice(model, code, exclude=()) as spliced:
        got = gradients(spliced, TOKENS, metric, [*names, *OUTS, "hook_embed"])
    for i, name in enumerate(names):
        decoder = code.weights(i).W_dec
        expected = sum((g[OUTS[j]] @ decoder[:, j].T for j in range(i + 1, 3)), torch.zeros(()))
        expected = expected + g[OUTS[i]] @ decoder[:, i].T
        assert largest(got[name] - expected) < 1e-5 * largest(expected)
    for name in (*OUTS, "hook_embed"):
        assert largest(got[name] - g[name]) < 1e-5 * largest(g[name])


def double_clt() -> Any:
    return clt(tiny_hf("gemma2"), dtype=torch.float64)


def test_feature_gradients_equal_finite_differences_of_the_bare_model(double) -> None:
    code = double_clt()
    names = [f"{name}.hook_sae_acts_post" for name in OUTS]
    with splice(double, code) as spliced:
        got = gradients(spliced, ONE, metric, names)
    for i, name in enumerate(names):
        for pos, feature in ((5, 3), (19, 17)):
            written = {OUTS[j]: code.weights(i).W_dec[feature, j].double() for j in range(i, 3)}
            expected = slope(double, written, pos)
            assert float(got[name][0, pos, feature]) == pytest.approx(expected, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("listened", [False, True])
@pytest.mark.parametrize(("error", "layer"), [("keep", 0), ("keep", 1), ("drop", 0)])
def test_the_gradient_upstream_of_an_edit_is_that_of_the_edited_model(
    double, error: Any, layer: int, listened: bool
) -> None:
    code = double_clt()
    edit = Scale(features=list(range(0, 48, 2)), factor=3.0, layer=layer)
    direction = torch.linspace(-1, 1, D, dtype=torch.float64)
    names = ["hook_embed", *[f"{name}.hook_sae_acts_post" for name in OUTS if listened]]
    with splice(double, code, error=error, edits=edit) as spliced:
        got = gradients(spliced, ONE, metric, names)["hook_embed"][0] @ direction
        expected = [slope(double, {"hook_embed": direction}, pos) for pos in (4, 17)]
    bare = slope(double, {"hook_embed": direction}, 17)
    assert got[[4, 17]].tolist() == pytest.approx(expected, rel=1e-3)
    assert abs(bare - expected[1]) > 1e-2 * abs(expected[1])


# --------------------------------------------------------------------------- which tokens
@TWO_KINDS
@torch.no_grad()
def test_special_tokens_are_left_alone_at_every_layer(model, hf) -> None:
    code, tokens = clt(hf, affine=True), TOKENS.clone()
    tokens[0, -2:], tokens[1, 5] = PAD_ID, EOS_ID
    with splice(model, code, error="drop") as spliced:
        logits, cache = spliced.run_with_cache(tokens, names_filter=[*OUTS, *outputs(code)])
    text = tokens != PAD_ID  # nothing is asked about padding, which is masked
    with replaced(hf, code, tokens):
        assert largest((logits - hf(tokens).logits)[text]) < 1e-5
    special = tokens < FIRST_WORD_ID
    for name in OUTS:
        assert torch.equal(cache[f"{name}.hook_sae_output"][special], cache[name][special])


@TWO_KINDS
@torch.no_grad()
@ERRORS
@pytest.mark.parametrize(
    ("positions", "chosen"), [(4, [4]), (slice(-3, None), [17, 18, 19]), ([2, -1], [2, 19])]
)
def test_positions_of_the_dictionary_hold_at_every_layer(
    model, hf, positions, chosen, error
) -> None:
    code, keep = clt(hf), torch.zeros_like(TOKENS, dtype=torch.bool)
    keep[:, chosen] = True
    edit = Add(features=3, amount=2.0, layer=0)
    direction = torch.nn.functional.one_hot(torch.tensor(3), 48)
    with splice(model, code, error=error, positions=positions, edits=edit) as spliced:
        got = spliced(TOKENS)
    changes = {0: lambda a: a + 2 * direction}
    with replaced(hf, code, TOKENS, error=error, keep=keep, changes=changes):
        assert largest(got - hf(TOKENS).logits) < 1e-5


@TWO_KINDS
@torch.no_grad()
@ERRORS
def test_generation_with_a_cache_equals_generation_without(model, hf, error: Any) -> None:
    code, prompt = clt(hf), ONE[:, :6]
    edit = Add(features=3, amount=4.0, layer=0, positions=slice(2, None))
    options = {"max_new_tokens": 5, "do_sample": False, "stop_at_eos": False}
    with splice(model, code, error=error, edits=edit) as spliced:
        cached, plain = (
            spliced.generate(prompt, use_past_kv_cache=use, **options) for use in (True, False)
        )
        by_hand = prompt
        for _ in range(5):
            by_hand = torch.cat([by_hand, spliced(by_hand)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(cached, by_hand)
    assert torch.equal(plain, by_hand)


# --------------------------------------------------------------------------- errors
def test_a_model_with_folded_norms_is_refused(model, hf) -> None:
    other = folded(model)
    before = n_hooks(other)
    with (
        pytest.raises(MissingHookError, match=r"were folded.*load_model\(name\), which folds noth"),
        splice(other, clt(hf)),
    ):
        pass
    assert n_hooks(other) == before


@TWO_KINDS
@torch.no_grad()
def test_a_crosscoder_needs_no_gains(model, hf) -> None:
    """Residual streams are the same in a folded model."""
    code = crosscoder(model)
    with splice(folded(model), code, error="drop") as spliced:
        got = spliced(TOKENS)
    with replaced(hf, code, TOKENS):
        assert largest(got - hf(TOKENS).logits) < 1e-4


@torch.no_grad()
def test_a_pass_that_skips_a_layer_is_an_error(hooked2, code2) -> None:
    stream = activations(hooked2, TOKENS, "blocks.1.hook_resid_pre")
    with (
        pytest.raises(HookNotFiredError, match="without blocks.0.hook_mlp_out, whose features"),
        splice(hooked2, code2, error="drop", exclude=()),
    ):
        hooked2(stream, start_at_layer=1)


@torch.no_grad()
@pytest.mark.parametrize("left_by", ["stopping", "an exception"])
def test_features_of_an_earlier_pass_are_never_used(hooked2, code2, left_by: str) -> None:
    """The first half of one pass and the second half of another make no pass."""
    stream = activations(hooked2, random_tokens(seed=5), "blocks.1.hook_resid_pre")

    def fail(x, hook):
        raise ZeroDivisionError

    with (
        pytest.raises(HookNotFiredError, match="without blocks.0.hook_mlp_out, whose features"),
        splice(hooked2, code2, error="drop", exclude=()) as spliced,
    ):
        if left_by == "stopping":
            spliced(TOKENS, stop_at_layer=1)
        else:
            with pytest.raises(ZeroDivisionError):
                spliced.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.hook_resid_pre", fail)])
        hooked2(stream, start_at_layer=1)


@torch.no_grad()
def test_a_pass_after_one_that_stopped_early_is_whole(hooked2, code2) -> None:
    with splice(hooked2, code2, error="drop") as spliced:
        expected = spliced(TOKENS)
        spliced(TOKENS, stop_at_layer=2)
        assert torch.equal(spliced(TOKENS), expected)


@TWO_KINDS
@torch.no_grad()
def test_a_pass_that_stops_before_the_last_layer_is_an_error(model, hf) -> None:
    with (
        pytest.raises(
            HookNotFiredError, match="never reached blocks.1.hook_mlp_out, blocks.2.hook"
        ),
        splice(model, clt(hf)) as spliced,
    ):
        spliced(TOKENS, stop_at_layer=1)


@pytest.mark.parametrize("named", [False, True])
def test_an_edit_must_say_its_layer(hooked2, code2, named: bool) -> None:
    edit = Ablate(features=1, sae=code2 if named else None)
    with pytest.raises(UnknownNameError) as raised, splice(hooked2, code2, edits=edit):
        pass
    said = str(raised.value)
    assert (
        "layers 0, 1, 2" if named else "'blocks.0.hook_mlp_out', 'blocks.1.hook_mlp_out'"
    ) in said
    assert "layer=" in said.split("Try:")[1]


@pytest.mark.parametrize("layer", [3, -1, 1])
def test_a_layer_that_the_dictionary_lacks_is_an_error(hooked2, layer: int) -> None:
    code = crosscoder(hooked2, (0, 2))
    edit = Ablate(features=1, sae=code, layer=layer)
    with (
        pytest.raises(UnknownNameError, match=f"layer={layer}.* fits 0 layers.*layers 0, 2"),
        splice(hooked2, code, edits=edit),
    ):
        pass


def test_a_feature_outside_the_layer_is_an_error(hooked2, code2) -> None:
    with (
        pytest.raises(FeatureIndexError, match="Feature 48 .*blocks.1.hook_mlp_out.*0 to 47"),
        splice(hooked2, code2, edits=Ablate(features=48, layer=1)),
    ):
        pass


def test_a_dictionary_of_another_width_is_an_error(hooked2) -> None:
    code = crosscoder(hooked2)
    object.__setattr__(code.cfg, "hooks_in", ("blocks.0.attn.hook_z", "blocks.2.attn.hook_z"))
    with (
        pytest.raises(WidthMismatchError, match="has width 32, .*hook_z has 48"),
        splice(hooked2, code),
    ):
        pass


def test_a_prompt_of_special_tokens_is_an_error(hooked2, code2) -> None:
    with (
        splice(hooked2, code2) as spliced,
        pytest.raises(EmptySelectionError, match="only excluded tokens"),
    ):
        spliced(torch.full((1, 4), EOS_ID))


# --------------------------------------------------------------------------- weights on disk
@TWO_KINDS
@torch.no_grad()
def test_nothing_is_opened_while_nothing_needs_computing(model, hf) -> None:
    code = clt(hf)
    with splice(model, code) as spliced:
        spliced(TOKENS)
        spliced.run_with_cache(TOKENS, names_filter=OUTS)
        spliced.generate(ONE[:, :4], max_new_tokens=2)
    assert code.opened == ()


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_an_edit_opens_no_layer_but_its_own(hooked2, code2, layer: int) -> None:
    """Other layers write nothing new, and what this one writes at them is in its own decoder."""
    with splice(hooked2, code2, edits=Ablate(features=1, layer=layer)) as spliced:
        spliced(TOKENS)
    assert code2.opened == (layer,)


@torch.no_grad()
def test_a_narrow_decoder_on_disk_does_not_narrow_the_sums(hooked2) -> None:
    """Decoders stay as they are in the file; what they write is as exact as ``decode`` has it."""
    wide = clt(tiny_hf("gemma2"))
    weights = [replace(wide.weights(i), W_dec=wide.weights(i).W_dec.bfloat16()) for i in range(3)]
    code = CrossLayerTranscoder(wide.cfg, weights.__getitem__)
    names = [f"{name}.hook_sae_{part}" for name in OUTS for part in ("acts_post", "recons")]
    with splice(hooked2, code, error="drop", exclude=()) as spliced:
        _, cache = spliced.run_with_cache(TOKENS, names_filter=names)
    acts = [cache[name] for name in names[::2]]
    for name, expected in zip(names[1::2], code.decode(acts), strict=True):
        assert largest(cache[name] - expected) < 1e-5


def test_refused_edits_open_nothing(hooked2, code2) -> None:
    with (
        pytest.raises(UnknownNameError),
        splice(hooked2, code2, edits=[Ablate(features=1, layer=0), Ablate(features=1, layer=9)]),
    ):
        pass
    assert code2.opened == ()


def test_a_wrapped_dictionary_keeps_its_options(hooked2, code2) -> None:
    wrapped = HookedCrossLayer(code2, error="drop", exclude=(), positions=4)
    with splice(hooked2, wrapped, error="keep") as spliced:
        assert {(site.error, site.exclude, site.positions) for site in spliced.saes[0].sites} == {
            ("drop", (), 4)
        }
    twin = wrapped.with_error("keep")
    assert {(site.error, site.exclude, site.positions) for site in twin.sites} == {("keep", (), 4)}
    assert repr(wrapped) == (
        "HookedCrossLayer(clt of layers [0, 1, 2], d_in=32, d_sae=144, error='drop', exclude=())"
    )


@torch.no_grad()
def test_the_classes_that_saelens_loads_are_wrapped_as_they_are(hooked2) -> None:
    """Also an edit may name the object that was given."""
    sites = [f"blocks.{layer}.hook_resid_post" for layer in (0, 2)]
    cfg = CrossCoderSAEConfig(
        d_in=2 * D, d_out=2 * D, d_sae=16, layers=(0, 2), hooks_in=sites, hooks_out=sites
    )
    sae = CrossCoderSAE(cfg)
    edit = Add(features=3, amount=2.0, layer=2, sae=sae)
    opened = sae.dictionary()
    with splice(hooked2, opened, edits=replace(edit, sae=opened)) as spliced:
        expected = spliced(TOKENS)
    for saes in (
        sae,
        HookedCrossLayer(sae),
        HookedCrossLayer(sae, error="drop").with_error("keep"),
    ):
        with splice(hooked2, saes, edits=edit) as spliced:
            assert torch.equal(spliced(TOKENS), expected)
    assert not torch.equal(hooked2(TOKENS), expected)


def test_a_dictionary_of_one_site_is_not_wrapped_as_one_of_many(hooked2) -> None:
    with pytest.raises(ModelError, match=r"A jumprelu has one site, .*HookedSAE\(sae\)"):
        HookedCrossLayer(residual(hooked2, 1))
