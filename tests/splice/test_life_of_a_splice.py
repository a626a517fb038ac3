"""The model is as it was afterwards; other people's hooks keep working; everything wrong is an error."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from gemmascope_plugin.errors import (
    EmptySelectionError,
    HookNotFiredError,
    InputError,
    MissingHookError,
    ModelError,
    UnknownNameError,
    WidthMismatchError,
)
from gemmascope_plugin.splice import Ablate, Add, HookedSAE, splice
from gemmascope_plugin.splice.hooked_site import HookedSite
from tests import factories
from tests.factories import n_hooks, random_sae, unchecked
from tests.splice.reference import features
from tests.support.rounding import TINY
from tests.tiny_models import BOS_ID, PAD_ID, random_tokens

TOKENS = random_tokens()
SITE = "blocks.1.hook_resid_post"


@pytest.fixture(autouse=True)
def untouched(request: pytest.FixtureRequest):
    """Every test here leaves its model without a hook and with the same logits."""
    name = next((n for n in ("model", "hooked2") if n in request.fixturenames), None)
    if name is None:
        yield
        return
    model = request.getfixturevalue(name)
    factories.activations(model, TOKENS, SITE)  # the bridge adds hooks of its own in a first run
    with torch.no_grad():
        hooks, logits = n_hooks(model), model(TOKENS)
        yield
        assert n_hooks(model) == hooks
        assert torch.equal(model(TOKENS), logits)


# --------------------------------------------------------------------------- nothing is left behind
def test_hooks_are_there_inside_and_gone_outside(model) -> None:
    before = n_hooks(model)
    with splice(model, factories.four_dictionaries(model), edits=()):
        # four output points, one transcoder input (each counted as hook, in TransformerLens' own
        # list, and as the hook that moves it last), one hook each before the model, its
        # embedding and its first block, and one after the model
        assert n_hooks(model) == before + 3 * 5 + 4
    assert n_hooks(model) == before


def test_an_exception_inside_the_block_leaves_nothing(model) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        splice(model, factories.five_dictionaries(model)) as spliced,
    ):
        spliced(TOKENS)
        raise ZeroDivisionError


def test_an_exception_inside_a_forward_pass_leaves_nothing(model) -> None:
    def fail(x, hook):
        raise ZeroDivisionError

    with (
        pytest.raises(ZeroDivisionError),
        splice(model, factories.five_dictionaries(model)) as spliced,
    ):
        spliced.run_with_hooks(TOKENS, fwd_hooks=[(f"{SITE}", fail)])


def test_an_error_at_the_door_leaves_nothing(model) -> None:
    good, bad = factories.residual(model, 0), random_sae(7, 9, SITE)
    with pytest.raises(WidthMismatchError), splice(model, [good, bad]):
        pass


def test_many_splices_in_a_row_leave_nothing(hooked2) -> None:
    saes = factories.four_dictionaries(hooked2)
    before = n_hooks(hooked2)
    for _ in range(200):
        with splice(hooked2, saes, edits=Add(features=1, amount=9.0, sae=saes[0])):
            pass
    assert n_hooks(hooked2) == before


def test_hooks_of_a_spliced_model_go_with_their_block(model) -> None:
    with splice(model, factories.residual(model, 1)) as spliced:
        before = n_hooks(model)
        point = spliced.saes[0].points["hook_sae_acts_post"]
        with spliced.hooks([(SITE, passing), (f"{SITE}.hook_sae_acts_post", passing)]):
            assert n_hooks(model) > before
            assert len(point._forward_hooks) == 1
        assert n_hooks(model) == before
        assert not point._forward_hooks
        assert not point.fwd_hooks


def passing(x: torch.Tensor, hook: Any) -> None:
    """A hook that only looks."""


# --------------------------------------------------------------------------- living with other hooks
def test_a_users_hook_at_the_same_point_keeps_firing(model) -> None:
    seen: list[torch.Tensor] = []
    hooks = [(SITE, lambda x, hook: seen.append(x))]
    sae = factories.residual(model, 1)
    with torch.no_grad(), model.hooks(fwd_hooks=hooks), splice(model, sae, error="drop") as spliced:
        spliced(TOKENS)  # attached before the splice
        spliced.run_with_hooks(TOKENS, fwd_hooks=hooks)  # and after
    stream = factories.activations(model, TOKENS, SITE)
    assert len(seen) == 3
    assert all(torch.equal(stream, other) for other in seen)


@torch.no_grad()
@pytest.mark.parametrize("early", [True, False])
def test_the_dictionary_works_on_what_a_users_hook_returns(model, early: bool) -> None:
    """Whether it was attached before or inside the block, through whatever method."""
    hooks = [(SITE, lambda x, hook: 0.5 * x)]
    sae = factories.residual(model, 1)
    half = 0.5 * factories.activations(model, TOKENS, SITE)
    names = [f"{SITE}.hook_sae_input", f"{SITE}.hook_sae_output"]
    with ExitStack() as stack:
        if early:
            stack.enter_context(model.hooks(fwd_hooks=hooks))
        spliced = stack.enter_context(splice(model, sae, error="drop", exclude=()))
        if not early:
            stack.enter_context(model.hooks(fwd_hooks=hooks))
        _, cache = spliced.run_with_cache(TOKENS, names_filter=names)
    expected = features(sae, half) @ sae.W_dec + sae.b_dec
    assert torch.equal(cache[names[0]], half)
    assert torch.allclose(cache[names[1]], expected, atol=1e-5)


def test_a_hook_that_was_removed_inside_the_block_is_an_error(model) -> None:
    sae = factories.residual(model, 1)
    before = n_hooks(model)
    with (
        pytest.raises(HookNotFiredError, match="removed inside the splice block.*reset_hooks"),
        splice(model, sae) as spliced,
    ):
        model.reset_hooks(including_permanent=True)
        spliced(TOKENS)
    assert n_hooks(model) == before


def test_reset_hooks_inside_the_block_leaves_the_dictionaries(model) -> None:
    edit = Add(features=5, amount=4.0)
    with splice(model, factories.residual(model, 1), edits=edit) as spliced:
        before = spliced(TOKENS)
        model.reset_hooks()
        assert torch.equal(spliced(TOKENS), before)
        model.run_with_hooks(TOKENS, fwd_hooks=[(SITE, passing)])
        assert torch.equal(spliced(TOKENS), before)


def test_the_models_own_methods_run_the_dictionaries(model) -> None:
    with splice(model, factories.residual(model, 1), edits=Add(features=5, amount=4.0)) as spliced:
        expected = spliced(TOKENS)
        assert torch.equal(model(TOKENS), expected)
        assert torch.equal(model.run_with_cache(TOKENS, names_filter=[SITE])[0], expected)
        assert torch.equal(model.run_with_hooks(TOKENS, fwd_hooks=[(SITE, passing)]), expected)
    assert not torch.allclose(model(TOKENS), expected, atol=1e-2)


def test_splices_nest(model) -> None:
    first, second = factories.residual(model, 0), factories.transcoder(model, 1)
    edits = (Add(features=1, amount=3.0), Add(features=2, amount=3.0))
    with splice(model, first, edits=edits[0]) as outer:
        alone = outer(TOKENS)
        with splice(model, second, edits=edits[1]) as inner:
            both = inner(TOKENS)
        assert torch.equal(outer(TOKENS), alone)
    named = [Add(features=1, amount=3.0, sae=first), Add(features=2, amount=3.0, sae=second)]
    with splice(model, [first, second], edits=named) as together:
        assert torch.allclose(together(TOKENS), both, atol=TINY)


def test_a_mapping_of_dictionaries_will_do(hooked2) -> None:
    saes = {layer: factories.residual(hooked2, layer) for layer in (0, 1)}
    with splice(hooked2, saes) as spliced:
        assert repr(spliced) == (
            "SplicedModel(3 layers, dictionaries at blocks.0.hook_resid_post, "
            "blocks.1.hook_resid_post)"
        )


def test_a_wrapped_dictionary_keeps_its_own_options(hooked2) -> None:
    wrapped = HookedSAE(factories.transcoder(hooked2, 1), error="drop", exclude=())
    assert repr(wrapped) == (
        "HookedSAE(blocks.1.ln2.hook_normalized -> blocks.1.hook_mlp_out, d_in=32, d_sae=96, "
        "error='drop', exclude=())"
    )
    with splice(hooked2, wrapped, error="keep") as spliced:
        assert spliced.saes[0].error == "drop"


# --------------------------------------------------------------------------- the cache
def test_cache_names_are_those_of_saelens(model) -> None:
    parts = ("input", "acts_pre", "acts_post", "recons", "error", "output")
    with splice(model, factories.residual(model, 1)) as spliced:
        _, cache = spliced.run_with_cache(TOKENS)
    assert {f"{SITE}.hook_sae_{part}" for part in parts} <= set(cache)
    assert {"hook_embed", SITE, "blocks.2.attn.hook_pattern"} <= set(cache)


def test_names_filter_may_be_a_name_names_or_a_predicate(model) -> None:
    name = f"{SITE}.hook_sae_acts_post"
    with splice(model, factories.residual(model, 1)) as spliced:
        for names_filter in (name, [name], lambda other: other == name):
            _, cache = spliced.run_with_cache(TOKENS, names_filter=names_filter)
            assert list(cache) == [name]
            assert cache[name].shape == (*TOKENS.shape, factories.D_SAE)


def test_an_unknown_cache_name_is_an_error(model) -> None:
    with splice(model, factories.residual(model, 1)) as spliced:
        with pytest.raises(MissingHookError, match=f"Did you mean '{SITE}.hook_sae_acts_post'"):
            spliced.run_with_cache(TOKENS, names_filter=[f"{SITE}.hook_sae_acts_pots"])
        with pytest.raises(MissingHookError, match=f"Did you mean '{SITE}'"):
            spliced.run_with_cache(TOKENS, names_filter="blocks.1.hook_resid_pots")
        spliced(TOKENS)


def test_a_cache_name_that_is_never_reached_is_an_error(hooked2) -> None:
    with (
        splice(hooked2, factories.residual(hooked2, 0)) as spliced,
        pytest.raises(HookNotFiredError, match="never reached blocks.2.hook_resid_post"),
    ):
        spliced.run_with_cache(TOKENS, names_filter=["blocks.2.hook_resid_post"], stop_at_layer=1)


# --------------------------------------------------------------------------- errors
def test_a_layer_beyond_the_model_is_an_error(model) -> None:
    sae = random_sae(32, 8, "blocks.9.hook_resid_post")
    with (
        pytest.raises(MissingHookError, match="no hook 'blocks.9.hook_resid_post'.*3 layers"),
        splice(model, sae),
    ):
        pass


def test_a_switched_off_hook_is_an_error(model) -> None:
    code = random_sae(32, 8, "blocks.1.hook_mlp_in", "blocks.1.hook_mlp_out", d_out=32)
    with (
        pytest.raises(MissingHookError, match="never fires while use_hook_mlp_in is off"),
        splice(model, code),
    ):
        pass


@pytest.mark.parametrize(
    "sae",
    [
        random_sae(48, 8, SITE),
        random_sae(32, 8, "blocks.1.attn.hook_z"),
        random_sae(32, 8, "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out", d_out=48),
    ],
)
def test_a_dictionary_of_another_width_is_an_error(model, sae) -> None:
    with (
        pytest.raises(WidthMismatchError, match="has width (32|48).*has (48|32).*tiny"),
        splice(model, sae),
    ):
        pass


def test_a_width_that_only_the_forward_pass_shows_is_an_error(hooked2) -> None:
    with (
        splice(hooked2, random_sae(9, 8, "blocks.1.mlp.hook_post"), error="drop") as spliced,
        pytest.raises(WidthMismatchError, match="has width 9.*mlp.hook_post has 64"),
    ):
        spliced(TOKENS)


def test_an_unknown_error_mode_is_an_error(hooked2) -> None:
    with pytest.raises(UnknownNameError, match="'kep'.*keep, drop, detach.*Did you mean 'keep'"):
        unchecked(HookedSite.__init__)(
            HookedSAE.__new__(HookedSAE), SITE, SITE, error="kep", exclude=(), positions=None
        )


def test_a_dictionary_without_a_hook_name_is_an_error(hooked2) -> None:
    with (
        pytest.raises(MissingHookError, match="does not say which hook it belongs to"),
        splice(hooked2, random_sae(32, 8, None)),
    ):
        pass


def test_a_transcoder_without_an_output_hook_is_an_error(hooked2) -> None:
    code = copy.deepcopy(factories.transcoder(hooked2, 1))
    code.cfg.metadata.hook_name_out = None
    with (
        pytest.raises(MissingHookError, match="does not say which hook it writes to"),
        splice(hooked2, code),
    ):
        pass


def test_another_architecture_is_an_error(hooked2) -> None:
    from sae_lens import StandardSAE, StandardSAEConfig

    sae = StandardSAE(StandardSAEConfig(d_in=32, d_sae=8))
    with (
        pytest.raises(ModelError, match="is a 'standard'.*jumprelu and jumprelu_transcoder"),
        splice(hooked2, sae),
    ):
        pass


def test_input_normalisation_is_an_error(hooked2) -> None:
    sae = random_sae(32, 8, SITE)
    sae.cfg.apply_b_dec_to_input = True
    with pytest.raises(ModelError, match="subtracts b_dec"), splice(hooked2, sae):
        pass


@pytest.mark.parametrize("saes", [[], {}, ()])
def test_no_dictionary_is_an_error(hooked2, saes) -> None:
    with pytest.raises(UnknownNameError, match="No dictionary was given"), splice(hooked2, saes):
        pass


@pytest.mark.parametrize("saes", ["blocks.1.hook_resid_post", 3, [None]])
def test_something_else_than_a_dictionary_is_an_error(hooked2, saes) -> None:
    with pytest.raises(InputError, match="is not a loaded dictionary"), splice(hooked2, saes):
        pass


def test_an_unknown_special_token_is_an_error(hooked2) -> None:
    with (
        pytest.raises(UnknownNameError, match="Did you mean 'bos'"),
        splice(hooked2, factories.residual(hooked2, 1), exclude=("bso",)),
    ):
        pass


@pytest.mark.parametrize("ids", [[[BOS_ID, PAD_ID]], [[BOS_ID]], [[BOS_ID, 5], [BOS_ID, PAD_ID]]])
def test_a_prompt_of_excluded_tokens_is_an_error(model, ids: list[list[int]]) -> None:
    with (
        splice(model, factories.residual(model, 1)) as spliced,
        pytest.raises(EmptySelectionError, match="only excluded tokens.*or exclude=()"),
    ):
        spliced(torch.tensor(ids))
    with splice(model, factories.residual(model, 1), exclude=()) as spliced:
        spliced(torch.tensor(ids))


@pytest.mark.parametrize("prompt", ["", " "])
def test_an_empty_prompt_is_an_error(hooked2, prompt: str) -> None:
    with splice(hooked2, factories.residual(hooked2, 1)) as spliced:
        for call in (spliced, spliced.run_with_cache, spliced.run_with_hooks, spliced.generate):
            with pytest.raises(EmptySelectionError, match="The prompt is empty"):
                call(prompt)


def test_a_pass_that_stops_before_the_dictionary_is_an_error(model) -> None:
    with (
        pytest.raises(HookNotFiredError, match="never reached blocks.2.hook_resid_post.*stop_at"),
        splice(model, factories.residual(model, 2)) as spliced,
    ):
        spliced(TOKENS, stop_at_layer=1)


def test_a_pass_that_skips_the_embedding_is_an_error(hooked2) -> None:
    residual = factories.activations(hooked2, TOKENS, "blocks.1.hook_resid_pre")
    with splice(hooked2, factories.residual(hooked2, 1), edits=Ablate(features=1)) as spliced:
        spliced(TOKENS)
        for stale in (residual, residual[:1]):
            with pytest.raises(HookNotFiredError, match="tokens at .* not known.*exclude=()"):
                hooked2(stale, start_at_layer=1)


def test_a_pass_that_skips_the_embedding_works_without_exclusions(hooked2) -> None:
    residual = factories.activations(hooked2, TOKENS, "blocks.1.hook_resid_pre")
    edit = Add(features=1, amount=2.0)
    with splice(hooked2, factories.residual(hooked2, 1), exclude=(), edits=edit) as spliced:
        assert torch.allclose(hooked2(residual, start_at_layer=1), spliced(TOKENS), atol=TINY)


def test_passes_that_start_above_the_dictionary_are_an_error(hooked2) -> None:
    residual = factories.activations(hooked2, TOKENS, "blocks.2.hook_resid_pre")
    with (
        pytest.raises(HookNotFiredError, match="never reached blocks.0.hook_resid_post"),
        splice(hooked2, factories.residual(hooked2, 0), exclude=()),
    ):
        hooked2(residual, start_at_layer=2)


def test_never_running_the_model_is_fine(hooked2) -> None:
    with splice(hooked2, factories.residual(hooked2, 1)):
        pass
