"""A splice in every mode of torch, hooks that write in place, streams and dictionaries of every type."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gemmascope_plugin.models import gradients
from gemmascope_plugin.splice import Ablate, Add, Clamp, Scale, splice
from gemmascope_plugin.splice.pass_features import SUB_HOOKS
from tests import factories
from tests.splice.kinds import TWO_KINDS
from tests.splice.reference import features, largest
from tests.tiny_models import random_tokens

TOKENS = random_tokens()
FEW = TOKENS[:1, :6]
SITE = "blocks.1.hook_resid_post"
ACTS = f"{SITE}.hook_sae_acts_post"
PARTS = [name.removeprefix("hook_sae_") for name in SUB_HOOKS]


def metric(logits: torch.Tensor) -> torch.Tensor:
    weights = torch.linspace(-1, 1, logits.shape[-1], dtype=logits.dtype)
    return (logits[:, -1] * weights).sum()


# --------------------------------------------------------------------------- modes of torch
MODES = pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
SETTINGS = {
    "keep": {},
    "keep and edit": {"edits": Clamp(features=[3, 8], value=4.0)},
    "keep and edit all": {"edits": Scale(features=None, factor=0.5)},
    "drop": {"error": "drop"},
    "drop and edit": {"error": "drop", "edits": Add(features=3, amount=4.0)},
    "detach and edit": {"error": "detach", "edits": Ablate(features=list(range(0, 96, 3)))},
}


@MODES
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("site", ["residual", "attention", "transcoder"])
def test_values_are_the_same_in_every_mode(hooked2, mode, name: str, site: str) -> None:
    sae = getattr(factories, site)(hooked2, 1)
    out = f"{sae.cfg.metadata.hook_name_out or sae.cfg.metadata.hook_name}.hook_sae"
    names = [f"{out}_{part}" for part in ("acts_post", "recons", "output")]
    with splice(hooked2, sae, **SETTINGS[name]) as spliced:
        expected = spliced(TOKENS)
        _, wanted = spliced.run_with_cache(TOKENS, names_filter=names)
    with mode(), splice(hooked2, sae, **SETTINGS[name]) as spliced:
        got = spliced(TOKENS)
        _, cache = spliced.run_with_cache(TOKENS, names_filter=names)
    assert largest(got - expected) < 1e-5
    for key in names:
        assert largest(cache[key] - wanted[key]) < 1e-5, key


@pytest.mark.parametrize("name", SETTINGS)
def test_a_pass_of_a_frozen_model_records_nothing(hooked2, name: str) -> None:
    """Without a listener there is nothing to differentiate, and no graph to keep in memory."""
    with splice(hooked2, factories.residual(hooked2, 1), **SETTINGS[name]) as spliced:
        assert not spliced(TOKENS).requires_grad


@TWO_KINDS
@MODES
@pytest.mark.parametrize("name", SETTINGS)
def test_generation_is_the_same_in_every_mode(model, mode, name: str) -> None:
    sae = factories.residual(model, 1)
    options = {"max_new_tokens": 4, "do_sample": False, "stop_at_eos": False}
    with splice(model, sae, **SETTINGS[name]) as spliced:
        expected = spliced.generate(FEW, **options)
        with mode():
            assert torch.equal(spliced.generate(FEW, **options), expected)


HOOKED = {
    "input": lambda x: x.mul_(0.5),
    "acts_pre": lambda x: x[..., 3].fill_(7.0),
    "acts_post": lambda x: x[..., 3].fill_(7.0),
    "recons": lambda x: x[..., 3].add_(1.0),
    "error": lambda x: x.mul_(0.0),
    "output": lambda x: x[..., 3].add_(1.0),
}
HOWS = ("returned", "in place", "in place and returned")


def writing(part: str, how: str) -> Callable[..., Any]:
    """A hook that changes what it is given, in one of three ways with one effect."""

    def hook_fn(x: torch.Tensor, hook: Any) -> torch.Tensor | None:
        x = x.clone() if how == "returned" else x
        HOOKED[part](x)
        return None if how == "in place" else x

    return hook_fn


@pytest.mark.parametrize("how", HOWS[1:])
@pytest.mark.parametrize("error", ["keep", "drop", "detach"])
@pytest.mark.parametrize("part", PARTS)
@MODES
def test_a_hook_in_place_is_the_hook_that_returns(
    hooked2, part: str, error, how: str, mode
) -> None:
    if (error, part) == ("drop", "error"):
        pytest.skip("there is no error")
    name = f"{SITE}.hook_sae_{part}"
    with mode(), splice(hooked2, factories.residual(hooked2, 1), error=error) as spliced:
        plain = spliced(TOKENS)
        expected, got = (
            spliced.run_with_hooks(TOKENS, fwd_hooks=[(name, writing(part, kind))])
            for kind in (HOWS[0], how)
        )
    assert largest(got - expected) < 1e-5
    assert largest(expected - plain) > 1e-3


@TWO_KINDS
@torch.no_grad()
@pytest.mark.parametrize("error", ["keep", "drop", "detach"])
@pytest.mark.parametrize("part", PARTS)
def test_a_hook_in_place_does_not_write_into_the_stream(model, part: str, error) -> None:
    """The model's own activations, which caches share memory with, are those of the bare model."""
    if (error, part) == ("drop", "error"):
        pytest.skip("there is no error")
    sae = factories.transcoder(model, 1)
    names = ["blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"]
    site = sae.cfg.metadata.hook_name_out or sae.cfg.metadata.hook_name
    bare = {name: factories.activations(model, TOKENS, name) for name in names}
    hooks = [(f"{site}.hook_sae_{part}", writing(part, "in place"))]
    with splice(model, sae, error=error) as spliced, spliced.hooks(hooks):
        _, cache = spliced.run_with_cache(TOKENS, names_filter=names)
    for name in names:
        assert torch.equal(cache[name], bare[name]), name


@torch.no_grad()
@TWO_KINDS
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("site", ["residual", "attention", "mlp", "transcoder"])
def test_silencing_a_feature_by_hand_is_the_edit(model, how: str, site: str) -> None:
    sae = getattr(factories, site)(model, 1)
    name = f"{sae.cfg.metadata.hook_name_out or sae.cfg.metadata.hook_name}.hook_sae_acts_post"

    def silence(acts: torch.Tensor, hook: Any) -> torch.Tensor | None:
        acts = acts.clone() if how == "returned" else acts
        acts[..., [3, 17, 40, 41, 95]] = 0
        return None if how == "in place" else acts

    with splice(model, sae, edits=Ablate(features=[3, 17, 40, 41, 95])) as spliced:
        expected = spliced(TOKENS)
    with splice(model, sae) as spliced:
        got = spliced.run_with_hooks(TOKENS, fwd_hooks=[(name, silence)])
        assert torch.equal(spliced(TOKENS), model(TOKENS))
    assert largest(got - expected) < 1e-5
    assert largest(expected - model(TOKENS)) > 1e-4


# --------------------------------------------------------------------------- types
NARROW = [torch.float16, torch.bfloat16]
DTYPES = [*NARROW, torch.float32, torch.float64]


def in_type(model: Any, dtype: torch.dtype) -> Any:
    return copy.deepcopy(model).to(dtype, print_details=False)


@pytest.fixture(scope="module")
def narrow(hooked2) -> Any:
    """The model in bfloat16."""
    return in_type(hooked2, torch.bfloat16)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("site", ["residual", "attention", "transcoder"])
def test_a_narrow_stream_stays_what_it_is(hooked2, narrow, dtype, site: str) -> None:
    """No downstream type changes, and with the error kept no value does."""
    sae = copy.deepcopy(getattr(factories, site)(hooked2, 1)).to(dtype)
    bare, plain = narrow.run_with_cache(TOKENS, names_filter=["blocks.2.hook_resid_pre"])
    out = f"{sae.cfg.metadata.hook_name_out or sae.cfg.metadata.hook_name}.hook_sae"
    names = ["blocks.2.hook_resid_pre", f"{out}_recons", f"{out}_output"]
    for error in ("keep", "drop", "detach"):
        with splice(narrow, sae, error=error) as spliced:
            logits, cache = spliced.run_with_cache(TOKENS, names_filter=names)
        assert {logits.dtype, cache[names[0]].dtype, cache[names[2]].dtype} == {torch.bfloat16}
        if error == "keep":
            assert torch.equal(logits, bare)
            assert torch.equal(cache[names[0]], plain[names[0]])


@torch.no_grad()
def test_thresholds_are_compared_in_float32(hooked2, narrow) -> None:
    """A float32 dictionary on a bfloat16 stream has the features of the stream in float32."""
    sae = factories.residual(hooked2, 1)
    x = narrow.run_with_cache(TOKENS, names_filter=[SITE])[1][SITE]
    with splice(narrow, sae, exclude=()) as spliced:
        _, cache = spliced.run_with_cache(TOKENS, names_filter=[ACTS])
    expected = features(sae, x.float())
    assert cache[ACTS].dtype == torch.float32
    assert torch.equal(cache[ACTS] > 0, expected > 0)
    assert largest(cache[ACTS] - expected) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("dtype", NARROW)
def test_a_threshold_that_no_narrow_number_is_is_kept(dtype) -> None:
    """``pre`` just above and just below a float32 threshold that rounds to ``pre`` itself."""
    import gemmascope_plugin.saes as saes

    pre = torch.tensor([[1.0, 1.0]], dtype=dtype)
    assert torch.tensor(1.0001).to(dtype) == 1
    got = saes.jump(pre, torch.tensor([1.0001, 0.9999]))
    assert got.tolist() == [[0.0, 1.0]]


@torch.no_grad()
@pytest.mark.parametrize("dtype", NARROW)
def test_an_edit_on_a_narrow_stream_rounds_once(hooked2, narrow, dtype) -> None:
    """``y + amount * W_dec`` in float32, then the stream's type."""
    sae = copy.deepcopy(factories.residual(hooked2, 1))
    name = f"{SITE}.hook_sae_output"
    x = narrow.run_with_cache(TOKENS, names_filter=[SITE])[1][SITE]
    with splice(narrow, sae, edits=Add(features=3, amount=1.5), exclude=()) as spliced:
        _, cache = spliced.run_with_cache(TOKENS, names_filter=[name])
    assert torch.equal(cache[name], (x.float() + 1.5 * sae.W_dec[3]).bfloat16())
    code = sae.to(dtype)
    with splice(narrow, code, edits=Add(features=3, amount=1.5), exclude=()) as spliced:
        _, cache = spliced.run_with_cache(TOKENS, names_filter=[name])
    assert largest(cache[name].float() - (x.float() + 1.5 * code.W_dec[3].float())) < 0.05


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_have_the_type_of_their_tensor(hooked2, narrow, dtype) -> None:
    sae = copy.deepcopy(factories.residual(hooked2, 1)).to(dtype)
    names = ["blocks.0.hook_resid_post", SITE]
    bare = gradients(narrow, TOKENS, metric, names)
    with splice(narrow, sae) as spliced:
        got = gradients(spliced, TOKENS, metric, [*names, ACTS])
    assert got[ACTS].dtype == dtype
    for name in names:
        assert got[name].dtype == torch.bfloat16
        assert torch.equal(got[name], bare[name])
    expected = bare[SITE].to(dtype) @ sae.W_dec.T
    assert largest(got[ACTS] - expected) <= 1e-6 + 1e-2 * largest(expected)
