"""What flows on: the real model with the error kept, the dictionary alone with the error dropped."""

from __future__ import annotations

import copy
from contextlib import ExitStack

import pytest
import torch

from gemmascope_plugin.errors import HookNotFiredError
from gemmascope_plugin.splice import HookedSAE, splice
from tests import factories
from tests.factories import activations, dictionary
from tests.splice.gained_transcoders import folded
from tests.splice.reference import features, largest, reconstructed, reconstruction
from tests.tiny_models import BOS_ID, EOS_ID, FIRST_WORD_ID, PAD_ID, random_tokens

TOKENS = random_tokens()
MAKERS = {
    "res": factories.residual,
    "att": factories.attention,
    "mlp": factories.mlp,
    "transcoder": factories.transcoder,
}
SETS = {
    "one": lambda model: [factories.residual(model, 1)],
    "two": lambda model: [factories.residual(model, 0), factories.transcoder(model, 1)],
    "five": factories.five_dictionaries,
    "crowded": factories.crowded,
}


def is_sub_hook(name: str) -> bool:
    return ".hook_sae_" in name


@torch.no_grad()
@pytest.mark.parametrize("name", SETS)
def test_with_the_error_kept_the_logits_are_the_models_own(model, name: str) -> None:
    bare = model(TOKENS)
    with splice(model, SETS[name](model)) as spliced:
        assert torch.equal(spliced(TOKENS), bare)
        logits, cache = spliced.run_with_cache(TOKENS, names_filter=is_sub_hook)
    assert largest(logits - bare) < 1e-5
    assert len(cache) == 6 * len(spliced.saes)


@torch.no_grad()
@pytest.mark.parametrize("site", MAKERS)
def test_with_the_error_dropped_it_is_the_computation_on_transformers(model, hf, site: str) -> None:
    sae = MAKERS[site](model, 1)
    with splice(model, sae, error="drop") as spliced:
        logits = spliced(TOKENS)
    with reconstructed(hf, [sae], TOKENS):
        expected = hf(TOKENS).logits
    assert largest(logits - expected) < 1e-5
    assert largest(expected - hf(TOKENS).logits) > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("site", MAKERS)
def test_folding_changes_nothing(model, hf, site: str) -> None:
    """Made for the unfolded model, spliced into the folded one, against transformers."""
    sae = MAKERS[site](model, 1)
    with splice(folded(model), sae, error="drop") as spliced:
        logits = spliced(TOKENS)
    with reconstructed(hf, [sae], TOKENS):
        assert largest(logits - hf(TOKENS).logits) < 1e-5


@torch.no_grad()
def test_a_dictionary_of_the_embedding_reads_it_scaled(model, hf) -> None:
    sae = factories.dictionary(model, "hook_embed")
    keep = (TOKENS >= FIRST_WORD_ID)[..., None]

    def replaced(module, args, kwargs):
        x = args[0] if args else kwargs.pop("hidden_states")
        return (torch.where(keep, reconstruction(sae, x), x), *args[1:]), kwargs

    handle = hf.model.layers[0].register_forward_pre_hook(replaced, with_kwargs=True)
    expected = hf(TOKENS).logits
    handle.remove()
    with splice(model, sae, error="drop") as spliced:
        assert largest(spliced(TOKENS) - expected) < 1e-5
    assert largest(expected - hf(TOKENS).logits) > 1e-2


@torch.no_grad()
def test_several_dictionaries_without_error_feed_on_each_other(model, hf) -> None:
    saes = factories.four_dictionaries(model)
    with splice(model, saes, error="drop") as spliced:
        logits = spliced(TOKENS)
    with reconstructed(hf, saes, TOKENS):
        assert largest(logits - hf(TOKENS).logits) < 1e-5


@torch.no_grad()
def test_two_dictionaries_at_one_site_run_in_the_given_order(hooked2) -> None:
    name = "blocks.1.hook_resid_post"
    first, second = dictionary(hooked2, name, seed=1), dictionary(hooked2, name, seed=2)
    x = activations(hooked2, TOKENS, name)
    once = reconstruction(first, x)
    twice = reconstruction(second, once)
    names = [name, f"{name}[0].hook_sae_output", f"{name}[1].hook_sae_output"]
    for nested in (False, True):
        with ExitStack() as stack:
            if nested:
                stack.enter_context(splice(hooked2, first, error="drop", exclude=()))
                names = [name, f"{name}.hook_sae_input", f"{name}.hook_sae_output"]
            inner = second if nested else [first, second]
            spliced = stack.enter_context(splice(hooked2, inner, error="drop", exclude=()))
            _, cache = spliced.run_with_cache(TOKENS, names_filter=names)
        expected = zip(names, (x, once, twice), strict=True)
        assert all(largest(cache[key] - value) < 1e-5 for key, value in expected)


@torch.no_grad()
@pytest.mark.parametrize("site", MAKERS)
def test_the_cache_holds_features_reconstruction_and_error(model, site: str) -> None:
    sae = MAKERS[site](model, 1)
    hook_in = sae.cfg.metadata.hook_name
    hook_out = sae.cfg.metadata.hook_name_out or hook_in
    x, y = activations(model, TOKENS, hook_in), activations(model, TOKENS, hook_out)
    with splice(model, sae, exclude=()) as spliced:
        _, cache = spliced.run_with_cache(TOKENS, names_filter=is_sub_hook)
    part = {key: cache[f"{hook_out}.hook_sae_{key}"] for key in ("input", "acts_pre", "acts_post")}
    assert largest(part["input"] - x) < 1e-6
    assert largest(part["acts_pre"] - (x @ sae.W_enc + sae.b_enc)) < 1e-5
    assert largest(part["acts_post"] - features(sae, x)) < 1e-5
    assert largest(cache[f"{hook_out}.hook_sae_recons"] - reconstruction(sae, x)) < 1e-5
    assert largest(cache[f"{hook_out}.hook_sae_error"] - (y - reconstruction(sae, x))) < 1e-5
    assert largest(cache[f"{hook_out}.hook_sae_output"] - y) < 1e-5


@torch.no_grad()
def test_detach_has_the_value_of_keep(model) -> None:
    bare = model(TOKENS)
    with splice(model, factories.four_dictionaries(model), error="detach") as spliced:
        assert largest(spliced(TOKENS) - bare) < 1e-5


@torch.no_grad()
def test_special_tokens_are_left_alone(model) -> None:
    tokens = TOKENS.clone()
    tokens[0, -2:], tokens[1, 5] = PAD_ID, EOS_ID
    special = (tokens == BOS_ID) | (tokens == PAD_ID) | (tokens == EOS_ID)
    name = "blocks.1.hook_resid_post"
    bare = activations(model, tokens, name)
    with splice(model, factories.residual(model, 1), error="drop") as spliced:
        _, cache = spliced.run_with_cache(tokens)
    assert not cache[f"{name}.hook_sae_acts_post"][special].any()
    x, out = cache[name], cache[f"{name}.hook_sae_output"]
    assert largest((x - bare)[tokens != PAD_ID]) < 1e-5  # padding is masked
    assert torch.equal(out[special], x[special])
    changed = (out != x).any(-1)
    assert changed[~special].all()


@torch.no_grad()
def test_without_exclusions_every_token_is_reconstructed(hooked2) -> None:
    sae = factories.residual(hooked2, 1)
    name = "blocks.1.hook_resid_post"
    x = activations(hooked2, TOKENS, name)
    with splice(hooked2, sae, error="drop", exclude=()) as spliced:
        _, cache = spliced.run_with_cache(TOKENS)
    assert largest(cache[f"{name}.hook_sae_output"] - reconstruction(sae, x)) < 1e-5


@torch.no_grad()
def test_one_excluded_name_may_stand_alone(hooked2) -> None:
    sae = HookedSAE(factories.residual(hooked2, 1), exclude="bos")
    with splice(hooked2, sae) as spliced:
        _, cache = spliced.run_with_cache(TOKENS)
    assert not cache["blocks.1.hook_resid_post.hook_sae_acts_post"][:, 0].any()


@torch.no_grad()
def test_features_equal_those_of_saelens(hooked2) -> None:
    for sae in factories.four_dictionaries(hooked2):
        x = activations(hooked2, TOKENS, sae.cfg.metadata.hook_name)
        name = sae.cfg.metadata.hook_name_out or sae.cfg.metadata.hook_name
        with splice(hooked2, sae, exclude=()) as spliced:
            _, cache = spliced.run_with_cache(TOKENS)
        acts = sae.encode(x)
        assert 0 < (acts > 0).float().mean() < 0.2
        assert largest(cache[f"{name}.hook_sae_acts_post"] - acts) < 1e-6
        assert largest(cache[f"{name}.hook_sae_recons"] - sae.decode(acts)) < 1e-6


@torch.no_grad()
def test_a_feature_active_exactly_at_its_threshold_is_off() -> None:
    import gemmascope_plugin.saes as saes

    pre = torch.tensor([[0.5, 0.5000001, -1.0, 0.2]])
    threshold = torch.tensor([0.5, 0.5, -2.0, 0.0])
    assert saes.jump(pre, threshold).tolist() == [
        [0.0, pytest.approx(0.5000001), 0.0, pytest.approx(0.2)]
    ]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_dictionary_of_another_type_does_not_round_the_stream(hooked2, dtype) -> None:
    sae = factories.copy.deepcopy(factories.residual(hooked2, 1)).to(dtype)
    bare = hooked2(TOKENS)
    with splice(hooked2, sae) as spliced:
        logits, _ = spliced.run_with_cache(TOKENS)
    assert logits.dtype == torch.float32
    assert largest(logits - bare) < 1e-5


@torch.no_grad()
def test_the_stream_keeps_its_type(double) -> None:
    sae = factories.copy.deepcopy(factories.residual(double, 1)).float()
    bare = double(TOKENS)
    with splice(double, sae) as spliced:
        logits, _ = spliced.run_with_cache(TOKENS)
    assert logits.dtype == torch.float64
    assert largest(logits - bare) < 1e-9


@torch.no_grad()
def test_saelens_wrapper_agrees_for_one_residual_sae(hooked2) -> None:
    from sae_lens import HookedSAETransformer

    wrapped = HookedSAETransformer(hooked2.cfg, tokenizer=hooked2.tokenizer, move_to_device=False)
    wrapped.load_state_dict(hooked2.state_dict(), strict=False)
    sae = factories.residual(hooked2, 1)
    for use_error_term, error in ((True, "keep"), (False, "drop")):
        expected = wrapped.run_with_saes(TOKENS, saes=[sae], use_error_term=use_error_term)
        with splice(hooked2, sae, error=error, exclude=()) as spliced:
            assert largest(spliced(TOKENS) - expected) < 1e-5


@torch.no_grad()
def test_a_stale_input_is_never_used(hooked2) -> None:
    """A pass that stops between input and output of a transcoder leaves nothing for the next one."""
    code = factories.transcoder(hooked2, 1)
    with (
        pytest.raises(HookNotFiredError, match="did not fire before"),
        splice(hooked2, swapped(code)) as spliced,
    ):
        spliced(TOKENS)


def swapped(code):
    """The transcoder with input and output hooks exchanged."""
    code = copy.deepcopy(code)
    metadata = code.cfg.metadata
    metadata.hook_name, metadata.hook_name_out = metadata.hook_name_out, metadata.hook_name
    return code
