"""Equal to SAELens' own splice where that is right; right where it is wrong.

The second half goes through the known faults of ``HookedSAETransformer`` and ``SAETransformerBridge``
6.54. Each test shows our value, and that SAELens has another one: should they mend a fault, its test
fails and can go to the first half. Not here: a wrong width (test_life_of_a_splice.py), Matryoshka
levels, and edits (test_edits.py), which SAELens does not have.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from gemmascope_plugin.errors import HookNotFiredError, MissingHookError
from gemmascope_plugin.models import flatten_heads, gradients
from gemmascope_plugin.splice import HookedSAE, splice
from tests import factories
from tests.factories import activations, dictionary, n_hooks
from tests.splice.gained_transcoders import gained_transcoder, transcoded
from tests.splice.kinds import TWO_KINDS
from tests.splice.reference import largest, reconstruction
from tests.splice.saelens_peers import (
    name_in_peer,
    output_hook,
    peer,
    peer_without_error,
    renamed,
    with_heads,
)
from tests.tiny_models import random_tokens

TOKENS = random_tokens()
OTHERS = random_tokens(seed=5)
SITE = "blocks.1.hook_resid_post"
MLP_OUT = "blocks.1.hook_mlp_out"
PARTS = ("input", "acts_pre", "acts_post", "recons", "error", "output")
MAKERS = {
    "residual": factories.residual,
    "attention": lambda model, layer, **options: with_heads(
        factories.attention(model, layer, **options)
    ),
    "mlp": factories.mlp,
    "transcoder": factories.transcoder,
}
SITES = pytest.mark.parametrize("site", MAKERS)


@pytest.fixture
def peer_model(kind) -> Any:
    """SAELens' class around the same weights as ``model``."""
    return peer(*kind)


@pytest.fixture
def peer_model2() -> Any:
    """The same for ``hooked2``."""
    return peer("gemma2", "hooked")


def ours(model: Any, saes: Any, *, error: Any = "drop", exclude: Any = ()) -> torch.Tensor:
    with splice(model, saes, error=error, exclude=exclude) as spliced:
        return spliced(TOKENS)


def metric(logits: torch.Tensor) -> torch.Tensor:
    weights = torch.linspace(-1, 1, logits.shape[-1], dtype=logits.dtype)
    return (logits[:, -1] * weights).sum()


# --------------------------------------------------------------------------- where they are right
@torch.no_grad()
@SITES
@pytest.mark.parametrize(("with_error", "error"), [(True, "keep"), (False, "drop")])
def test_logits_are_equal(model, peer_model, site: str, with_error: bool, error: str) -> None:
    sae = MAKERS[site](model, 1)
    expected = peer_model.run_with_saes(TOKENS, saes=[sae], use_error_term=with_error)
    assert largest(ours(model, sae, error=error) - expected) < 1e-5
    assert (largest(expected - model(TOKENS)) > 1e-2) != with_error


@torch.no_grad()
def test_logits_of_several_dictionaries_are_equal(model, peer_model) -> None:
    saes = [make(model, layer) for layer, make in zip((0, 0, 1, 2), MAKERS.values(), strict=True)]
    assert largest(ours(model, saes) - peer_without_error(peer_model, TOKENS, *saes)) < 1e-5


@TWO_KINDS
@torch.no_grad()
@SITES
def test_sub_hooks_hold_the_same_values(model, peer_model, site: str) -> None:
    sae = MAKERS[site](model, 1)
    with peer_model.saes([sae], use_error_term=True):
        peer_names = [name_in_peer(peer_model, sae, part) for part in PARTS]
        _, expected = peer_model.run_with_cache(TOKENS, names_filter=peer_names)
    names = [f"{output_hook(sae)}.hook_sae_{part}" for part in PARTS]
    with splice(model, sae, exclude=()) as spliced:
        _, cache = spliced.run_with_cache(TOKENS, names_filter=names)
    for name, peer_name in zip(names, peer_names, strict=True):
        assert largest(flatten_heads(cache[name]) - flatten_heads(expected[peer_name])) < 1e-5, name
    # the bridge renames sites
    assert peer_names == names or hasattr(peer_model, "get_sae_hook_name")


@torch.no_grad()
def test_excluded_tokens_change_the_logits_alike(hooked2, peer_model2) -> None:
    sae = factories.residual(hooked2, 1)
    expected = peer_model2.run_with_saes(
        TOKENS, saes=[sae], use_error_term=False, exclude_special_tokens=True
    )
    assert largest(ours(hooked2, sae, exclude=("bos", "eos", "pad")) - expected) < 1e-5
    assert largest(ours(hooked2, sae) - expected) > 1e-2


@SITES
def test_gradients_of_features_downstream_are_equal(hooked2, peer_model2, site: str) -> None:
    sae = MAKERS[site](hooked2, 1)
    name = f"{output_hook(sae)}.hook_sae_acts_post"
    with splice(hooked2, sae, exclude=()) as spliced:
        got = gradients(spliced, TOKENS, metric, [name])[name]
    with peer_model2.saes([sae], use_error_term=True):
        expected = gradients(peer_model2, TOKENS, metric, [name])[name]
    assert largest(got - expected) < 1e-5 * largest(expected)


# --------------------------------------------------------------------------- where they are not
@torch.no_grad()
def test_a_gemma_scope_2_transcoder_reads_the_norm_with_its_gain(model, hf, peer_model) -> None:
    """F1: registered at ``hook_mlp_in``, it is fed its own target there; the error term hides it."""
    code = gained_transcoder(hf, 1, skip=False)
    registered = renamed(code, "blocks.1.hook_mlp_in")
    fed_its_target = peer_without_error(peer_model, TOKENS, registered)
    hidden = peer_model.run_with_saes(TOKENS, saes=[registered], use_error_term=True)
    with transcoded(hf, [code], TOKENS):
        expected = hf(TOKENS).logits
    assert largest(ours(model, code, exclude=("bos",)) - expected) < 1e-5
    as_sae = renamed(code, MLP_OUT, MLP_OUT)
    assert largest(fed_its_target - ours(model, as_sae)) < 1e-5
    assert largest(fed_its_target - ours(model, code)) > 1
    assert largest(hidden - model(TOKENS)) < 1e-5
    with pytest.raises(MissingHookError, match="never fires while use_hook_mlp_in is off"):
        ours(model, registered)


@torch.no_grad()
def test_an_affine_skip_is_kept(model, hf, peer_model) -> None:
    """F2: SAELens encodes and decodes, and the skip lives in ``forward`` alone."""
    code = gained_transcoder(hf, 1, skip=True)
    without = copy.deepcopy(code)
    without.W_skip.data.zero_()
    x = activations_with_gain(model, code)
    with splice(model, code, error="drop", exclude=()) as spliced:
        logits, cache = spliced.run_with_cache(TOKENS, names_filter=f"{MLP_OUT}.hook_sae_output")
    assert largest(cache[f"{MLP_OUT}.hook_sae_output"] - code.forward(x)) < 1e-5
    lost = peer_without_error(peer_model, TOKENS, code)
    assert largest(lost - ours(model, without)) < 1e-5
    assert largest(lost - logits) > 0.5


def activations_with_gain(model: Any, code: Any) -> torch.Tensor:
    name = f"{output_hook(code)}.hook_sae_input"
    with splice(model, code, exclude=()) as spliced:
        return spliced.run_with_cache(TOKENS, names_filter=name)[1][name]


@torch.no_grad()
@pytest.mark.parametrize("name", [SITE, "blocks.1.attn.hook_z", MLP_OUT])
def test_names_of_transformerlens_stay_alive_on_the_bridge(name: str) -> None:
    """F3: SAELens' bridge drops the aliases, so hooks on these names never fire and caches lack them."""
    model, peer_model = factories.tiny_model("gemma2", "bridge"), peer("gemma2", "bridge")
    sae = factories.residual(model, 0)
    count = Counter()
    with splice(model, sae, error="drop") as spliced:
        spliced.run_with_hooks(TOKENS, fwd_hooks=[(name, count)])
        _, cache = spliced.run_with_cache(TOKENS, names_filter=name)
    assert count.times == 1
    assert name in cache
    peer_model.run_with_hooks(TOKENS, fwd_hooks=[(name, count)])
    assert count.times == 1
    assert name not in peer_model.run_with_cache(TOKENS)[1]


class Counter:
    """A hook that counts its calls."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, x: torch.Tensor, hook: Any) -> None:
        self.times += 1


@TWO_KINDS
@torch.no_grad()
@pytest.mark.parametrize("name", ["blocks.1.hook_resid_pots", "blocks.7.hook_resid_post"])
def test_a_hook_name_with_a_typo_is_an_error(model, peer_model, name: str) -> None:
    """F4: SAELens logs a line and runs the bare model."""
    sae = renamed(factories.residual(model, 1), name)
    assert torch.equal(peer_without_error(peer_model, TOKENS, sae), model(TOKENS))
    with pytest.raises(MissingHookError, match=f"no hook '{name}'"):
        ours(model, sae)


@torch.no_grad()
def test_the_input_of_an_earlier_pass_is_never_used(hooked2, peer_model2) -> None:
    """F5: a pass that stops between input and output leaves its input to the next one."""
    code = far_transcoder(hooked2)
    stream = activations(hooked2, OTHERS, "blocks.1.hook_resid_pre")
    with peer_model2.saes([code], use_error_term=False):
        peer_model2(TOKENS, stop_at_layer=1)
        stale = peer_model2(stream, start_at_layer=1)
    assert stale.shape == (*TOKENS.shape, hooked2.cfg.d_vocab)
    with (
        pytest.raises(HookNotFiredError, match="did not fire before"),
        splice(hooked2, code, error="drop", exclude=()) as spliced,
    ):
        spliced(TOKENS, stop_at_layer=1)
        hooked2(stream, start_at_layer=1)


@torch.no_grad()
def test_the_input_of_a_pass_that_failed_is_never_used(hooked2) -> None:
    """F5 once more: the pass was left by an exception."""
    code = far_transcoder(hooked2)
    stream = activations(hooked2, OTHERS, "blocks.1.hook_resid_pre")
    with (
        pytest.raises(HookNotFiredError, match="did not fire before"),
        splice(hooked2, code, error="drop", exclude=()) as spliced,
    ):
        with pytest.raises(ZeroDivisionError):
            spliced.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.hook_resid_mid", fail)])
        hooked2(stream, start_at_layer=1)


def far_transcoder(model: Any) -> Any:
    """Reads one block and writes the next one."""
    return dictionary(model, "blocks.0.ln2.hook_normalized", MLP_OUT)


def fail(x: torch.Tensor, hook: Any) -> None:
    raise ZeroDivisionError


@TWO_KINDS
@torch.no_grad()
def test_two_dictionaries_on_one_hook_both_act(model, peer_model) -> None:
    """F6: in SAELens the last one is alone."""
    first, second = (factories.residual(model, 1, seed=seed) for seed in (1, 2))
    last = peer_without_error(peer_model, TOKENS, first, second)
    both = ours(model, [first, second])
    x = activations(model, TOKENS, SITE)
    twice = reconstruction(second, reconstruction(first, x))
    with torch.no_grad(), model.hooks(fwd_hooks=[(SITE, lambda x, hook: twice)]):
        assert largest(both - model(TOKENS)) < 1e-5
    assert largest(last - ours(model, second)) < 1e-5
    assert largest(last - both) > 1e-2


@torch.no_grad()
def test_a_nested_splice_gives_the_outer_one_back(hooked2, peer_model2) -> None:
    """F7: after ``saes=[A, B]`` on the hook of P, SAELens keeps A and has lost P."""
    outer, a, b = (factories.residual(hooked2, 1, seed=seed) for seed in (1, 2, 3))
    with splice(hooked2, outer, error="drop", exclude=()) as spliced:
        before = spliced(TOKENS)
        ours(hooked2, [a, b])
        assert torch.equal(spliced(TOKENS), before)
    peer_model2.add_sae(outer, use_error_term=False)
    assert largest(peer_model2(TOKENS) - before) < 1e-5
    peer_without_error(peer_model2, TOKENS, a, b)
    assert largest(peer_model2(TOKENS) - before) > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("nested", [False, True])
def test_a_transcoder_and_an_sae_share_an_output(hooked2, peer_model2, nested: bool) -> None:
    """F8: SAELens drops one of the two."""
    code, sae = factories.transcoder(hooked2, 1), factories.mlp(hooked2, 1)
    x = activations(hooked2, TOKENS, "blocks.1.ln2.hook_normalized")
    made = reconstruction(sae, reconstruction(code, x))
    with hooked2.hooks(fwd_hooks=[(MLP_OUT, lambda y, hook: made)]):
        expected = hooked2(TOKENS)
    if nested:
        with splice(hooked2, code, error="drop", exclude=()):
            both = ours(hooked2, sae)
        with peer_model2.saes([code], use_error_term=False):
            in_peer = peer_without_error(peer_model2, TOKENS, sae)
    else:
        both = ours(hooked2, [code, sae])
        in_peer = peer_without_error(peer_model2, TOKENS, code, sae)
    assert largest(both - expected) < 1e-5
    assert largest(in_peer - expected) > 1e-2


@torch.no_grad()
def test_two_transcoders_share_an_input(hooked2, peer_model2) -> None:
    """F9: the first one stays in SAELens' model for ever."""
    codes = [factories.transcoder(hooked2, 1), far_transcoder_of(hooked2)]
    bare, both = hooked2(TOKENS), ours(hooked2, codes)
    x = activations(hooked2, TOKENS, "blocks.1.ln2.hook_normalized")
    written = [(output_hook(code), reconstruction(code, x)) for code in codes]
    hooks = [(name, lambda y, hook, new=new: new) for name, new in written]
    with hooked2.hooks(fwd_hooks=hooks):
        assert largest(both - hooked2(TOKENS)) < 1e-5
    assert torch.equal(hooked2(TOKENS), bare)
    peer_without_error(peer_model2, TOKENS, *codes)
    assert largest(peer_model2(TOKENS) - bare) > 1e-2


def far_transcoder_of(model: Any) -> Any:
    """Reads what the transcoder of layer 1 reads and writes another site."""
    return dictionary(model, "blocks.1.ln2.hook_normalized", "blocks.2.hook_mlp_out", seed=6)


@torch.no_grad()
@pytest.mark.parametrize("name", [SITE, MLP_OUT, "blocks.1.ln2.hook_normalized"])
def test_permanent_hooks_of_users_fire_on_and_stay(hooked2, peer_model2, name: str) -> None:
    """F10: SAELens replaces the point, or clears it, and the hooks are gone, also afterwards."""
    saes = [factories.residual(hooked2, 1), factories.transcoder(hooked2, 1)]
    counts = []
    for model, run in ((hooked2, ours), (peer_model2, None)):
        count, before = Counter(), n_hooks(model)
        model.hook_dict[name].add_hook(count, is_permanent=True)
        if run is None:
            peer_without_error(model, TOKENS, *saes)
        else:
            run(model, saes)
        model(TOKENS)
        counts.append(count.times)
        model.reset_hooks(including_permanent=True)
        assert model is peer_model2 or n_hooks(model) == before
    assert counts[0] == 2
    assert counts[1] < 2


@TWO_KINDS
@torch.no_grad()
def test_the_name_of_a_spliced_point_keeps_its_meaning(model, peer_model) -> None:
    """F11: in SAELens it is not a hook point any more, and the cache lacks the original activation."""
    sae, count = factories.residual(model, 1), Counter()
    with splice(model, sae, error="drop") as spliced:
        spliced.run_with_hooks(TOKENS, fwd_hooks=[(SITE, count)])
        model.run_with_hooks(TOKENS, fwd_hooks=[(SITE, count)])
        _, cache = spliced.run_with_cache(TOKENS, names_filter=SITE)
    assert count.times == 2
    assert torch.equal(cache[SITE], activations(model, TOKENS, SITE))
    with peer_model.saes([sae], use_error_term=False):
        assert SITE not in peer_model.run_with_cache(TOKENS)[1]


@torch.no_grad()
def test_a_hook_on_a_spliced_point_is_a_type_error_there(hooked2, peer_model2) -> None:
    """F11: the negative control of the test above."""
    with peer_model2.saes([factories.residual(hooked2, 1)]), pytest.raises(TypeError):
        peer_model2.run_with_hooks(TOKENS, fwd_hooks=[(SITE, Counter())])


@torch.no_grad()
def test_excluded_tokens_have_no_features(hooked2, peer_model2) -> None:
    """F12: SAELens leaves the stream alone there and shows features all the same."""
    sae, name = factories.residual(hooked2, 1), f"{SITE}.hook_sae_acts_post"
    with splice(hooked2, sae) as spliced:
        _, cache = spliced.run_with_cache(TOKENS, names_filter=name)
    _, shown = peer_model2.run_with_cache_with_saes(TOKENS, saes=[sae], exclude_special_tokens=True)
    assert not cache[name][:, 0].any()
    assert shown[name][:, 0].any()
    assert largest(cache[name][:, 1:] - shown[name][:, 1:]) < 1e-5


@torch.no_grad()
def test_a_residual_is_not_taken_for_tokens(hooked2, peer_model2) -> None:
    """F12: SAELens compares the floats of a residual with token ids, and so excludes nothing."""
    sae, name = factories.residual(hooked2, 1), "blocks.1.hook_resid_pre"
    stream = activations(hooked2, TOKENS, name)
    with peer_model2.saes([sae], use_error_term=False, exclude_special_tokens=True):
        by_tokens, by_stream = peer_model2(TOKENS), peer_model2(stream, start_at_layer=1)
    assert largest(by_stream - ours(hooked2, sae)) < 1e-5
    assert largest(by_stream - by_tokens) > 1e-2
    with (
        pytest.raises(HookNotFiredError, match="tokens at .* are not known"),
        splice(hooked2, sae, error="drop"),
    ):
        hooked2(stream, start_at_layer=1)
    with splice(hooked2, sae, error="drop"):
        told = hooked2(stream, start_at_layer=1, tokens=TOKENS)
    assert largest(told - by_tokens) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("error", ["keep", "drop"])
@pytest.mark.parametrize("site", ["residual", "transcoder"])
def test_a_bfloat16_stream_stays_bfloat16(site: str, error: Any) -> None:
    """F14: SAELens lets the stream become float32 downstream of a float32 dictionary."""
    model = copy.deepcopy(factories.tiny_model("gemma2", "hooked")).to(
        torch.bfloat16, print_details=False
    )
    peer_model = peer("gemma2", "hooked").to(torch.bfloat16, print_details=False)
    sae = MAKERS[site](factories.tiny_model("gemma2", "hooked"), 1)
    with splice(model, sae, error=error) as spliced:
        logits, cache = spliced.run_with_cache(TOKENS)
    stream = {name: x for name, x in cache.items() if name.endswith(("_post", "_out", "_pre"))}
    kinds = {x.dtype for name, x in stream.items() if ".hook_sae_" not in name}
    assert kinds == {torch.bfloat16} == {logits.dtype}
    try:
        _, shown = peer_model.run_with_cache_with_saes(
            TOKENS, saes=[sae], use_error_term=error == "keep"
        )
    except RuntimeError as refused:  # the next matrix product
        assert "dtype" in str(refused)
    else:
        assert shown["blocks.2.hook_resid_pre"].dtype == torch.float32


def test_the_gradient_upstream_is_that_of_the_real_model(hooked2, peer_model2) -> None:
    """F15: SAELens' error is a constant, so gradients upstream pass the dictionary's Jacobian alone."""
    sae, name = factories.residual(hooked2, 1), "blocks.0.hook_resid_post"
    bare = gradients(hooked2, TOKENS, metric, [name])[name]
    with splice(hooked2, sae, exclude=()) as spliced:
        got = gradients(spliced, TOKENS, metric, [name, f"{SITE}.hook_sae_acts_post"])[name]
    with splice(hooked2, sae, exclude=(), error="detach") as spliced:
        detached = gradients(spliced, TOKENS, metric, [name])[name]
    with peer_model2.saes([sae], use_error_term=True):
        wrong = gradients(peer_model2, TOKENS, metric, [name])[name]
    assert largest(got - bare) < 1e-5 * largest(bare)
    assert largest(detached - wrong) < 1e-5 * largest(wrong)
    assert torch.cosine_similarity(wrong.flatten(), bare.flatten(), dim=0) < 0.9


def test_backward_hooks_see_the_gradient_of_features(hooked2) -> None:
    """Hooks of a single run, on the model and on the dictionary alike, get what ``gradients`` gives."""
    sae, names = (
        factories.residual(hooked2, 1),
        ["blocks.0.hook_resid_post", f"{SITE}.hook_sae_error"],
    )
    seen: dict[str, torch.Tensor] = {}

    def keep(gradient: torch.Tensor, hook: Any) -> None:
        seen[hook.name] = gradient.clone()

    def with_gradient(x: torch.Tensor, hook: Any) -> torch.Tensor:
        return x.requires_grad_()

    with splice(hooked2, sae, exclude=()) as spliced:
        expected = gradients(spliced, TOKENS, metric, names)
        hooks = [(name, keep) for name in names]
        start = [("hook_embed", with_gradient)]
        metric(spliced.run_with_hooks(TOKENS, fwd_hooks=start, bwd_hooks=hooks)).sum().backward()
    assert seen.keys() == expected.keys()
    assert all(largest(seen[name] - expected[name]) < 1e-6 for name in names)


def test_the_error_has_a_gradient(hooked2, peer_model2) -> None:
    """F16: SAELens makes the error without a graph, so backward hooks on it never fire."""
    sae, name = factories.residual(hooked2, 1), f"{SITE}.hook_sae_error"
    g = gradients(hooked2, TOKENS, metric, [SITE])[SITE]
    with splice(hooked2, sae, exclude=()) as spliced:
        assert largest(gradients(spliced, TOKENS, metric, [name])[name] - g) < 1e-6
    with (
        peer_model2.saes([sae], use_error_term=True),
        pytest.raises(HookNotFiredError, match="No gradient reached"),
    ):
        gradients(peer_model2, TOKENS, metric, [name])


def test_dictionaries_get_no_gradient_buffers(hooked2, peer_model2) -> None:
    """F17: SAELens' dictionaries are trainable, and a backward pass allocates all their gradients."""
    sae_here, peer_sae = (copy.deepcopy(factories.residual(hooked2, 1)) for _ in range(2))
    for sae in (sae_here, peer_sae):
        sae.requires_grad_(True).train()
    with splice(hooked2, sae_here) as spliced:
        gradients(spliced, TOKENS, metric, [f"{SITE}.hook_sae_acts_post"])
    with peer_model2.saes([peer_sae], use_error_term=True):
        gradients(peer_model2, TOKENS, metric, [f"{SITE}.hook_sae_acts_post"])
    assert all(p.grad is None for p in sae_here.parameters())
    assert not sae_here.training
    assert peer_sae.W_dec.grad is not None


@torch.no_grad()
def test_heads_are_flattened_for_a_dictionary_that_does_not(hooked2, peer_model2) -> None:
    """F21: attention SAEs of Gemma Scope 2 do not reshape, and SAELens gives them 4-D tensors."""
    sae = factories.attention(hooked2, 1)
    assert largest(ours(hooked2, sae) - ours(hooked2, with_heads(sae))) == 0
    with pytest.raises(RuntimeError, match="must match the size"):
        peer_without_error(peer_model2, TOKENS, sae)


@torch.no_grad()
def test_heads_keep_their_shape_after_a_splice_on_the_bridge() -> None:
    """F22: SAELens puts a new hook point there, without the conversion to heads, for good."""
    model, peer_model = factories.tiny_model("gemma2", "bridge"), peer("gemma2", "bridge")
    sae, name = factories.attention(model, 1), "blocks.1.attn.hook_z"
    bare = model.run_with_cache(TOKENS, names_filter=[name])[1][name]
    assert bare.shape == (*TOKENS.shape, 4, 12)
    ours(model, sae)
    assert torch.equal(model.run_with_cache(TOKENS, names_filter=[name])[1][name], bare)
    peer_without_error(peer_model, TOKENS, sae)
    after = peer_model.run_with_cache(TOKENS)[1]["blocks.1.attn.o.hook_in"]
    assert after.shape == (*TOKENS.shape, 48)


@torch.no_grad()
def test_the_norms_output_is_read_on_both_classes(model, hf, peer_model) -> None:
    """F24: ``ln2.hook_out`` is on the bridge alone; on the other class SAELens runs the bare model."""
    code = gained_transcoder(hf, 1, skip=False)
    named = renamed(code, "blocks.1.ln2.hook_out")
    assert largest(ours(model, named) - ours(model, code)) < 1e-6
    with transcoded(hf, [code], TOKENS):
        assert largest(ours(model, named, exclude="bos") - hf(TOKENS).logits) < 1e-5
    shown = peer_without_error(peer_model, TOKENS, named)
    skipped = torch.equal(shown, model(TOKENS))
    assert skipped == ("blocks.1.ln2.hook_out" not in peer_model.hook_dict)


@torch.no_grad()
def test_hooks_and_the_choice_of_error_go_together(hooked2, peer_model2) -> None:
    """F13: ``run_with_hooks_with_saes`` has no ``use_error_term``."""
    sae, count = factories.residual(hooked2, 1), Counter()
    with splice(hooked2, HookedSAE(sae, error="drop", exclude=())) as spliced:
        got = spliced.run_with_hooks(TOKENS, fwd_hooks=[(f"{SITE}.hook_sae_acts_post", count)])
    assert largest(got - peer_without_error(peer_model2, TOKENS, sae)) < 1e-5
    assert count.times == 1
    with pytest.raises(TypeError, match="use_error_term"):
        peer_model2.run_with_hooks_with_saes(TOKENS, saes=[sae], use_error_term=False)
