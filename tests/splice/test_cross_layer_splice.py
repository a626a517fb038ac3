"""Crosscoders and cross-layer transcoders spliced at all their layers in one call.

The oracle is a slow computation on the transformers model (``cross_layer_reference.py``).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gemmascope_plugin.splice import Ablate, Add, Clamp, Project, Replace, Scale, splice
from tests import factories
from tests.factories import tiny_hf
from tests.splice.cross_layer_cases import (
    CHOSEN,
    ERRORS,
    KINDS,
    OUTS,
    TOKENS,
    made,
    outputs,
)
from tests.splice.cross_layer_reference import D, clt, crosscoder, replaced
from tests.splice.kinds import TWO_KINDS
from tests.splice.reference import largest
from tests.tiny_models import random_tokens


@pytest.fixture
def code2() -> Any:
    """A new cross-layer transcoder of ``hooked2``."""
    return clt(tiny_hf("gemma2"))


# --------------------------------------------------------------------------- values
@torch.no_grad()
@KINDS
def test_without_error_it_is_the_computation_on_transformers(model, hf, kind_of: str) -> None:
    code = made(kind_of, model, hf)
    with splice(model, code, error="drop") as spliced:
        logits, cache = spliced.run_with_cache(TOKENS, names_filter=outputs(code))
        assert largest(spliced(TOKENS) - logits) < 1e-6
    bare = hf(TOKENS).logits
    with replaced(hf, code, TOKENS) as expected:
        assert largest(logits - hf(TOKENS).logits) < 1e-5
    assert largest(logits - bare) > 1e-2
    for name, value in zip(outputs(code), expected.outputs, strict=True):
        assert largest(cache[name] - value) < 1e-5
    assert min(float(acts[:, 1:].gt(0).float().mean()) for acts in expected.before) > 0.01


@torch.no_grad()
@KINDS
def test_with_the_error_kept_the_logits_are_the_models_own(model, hf, kind_of: str) -> None:
    code, bare = made(kind_of, model, hf), model(TOKENS)
    listened = [f"{name}.hook_sae_{p}" for name in code.cfg.hooks_out for p in ("recons", "output")]
    with splice(model, code) as spliced:
        assert torch.equal(spliced(TOKENS), bare)
        assert torch.equal(spliced.run_with_cache(TOKENS, names_filter=listened)[0], bare)
    with splice(model, code, error="detach") as spliced:
        logits, _ = spliced.run_with_cache(TOKENS, names_filter=listened)
        assert largest(logits - bare) < 1e-5


@torch.no_grad()
def test_a_dictionary_of_one_layer_is_a_transcoder(hooked2) -> None:
    """The same as SAELens' class for the same weights."""
    single = crosscoder(hooked2, (1,))
    weights, plain = single.weights(0), factories.random_sae(D, 48, "blocks.1.hook_resid_post")
    for name in ("W_enc", "b_enc", "threshold", "b_dec"):
        getattr(plain, name).data = getattr(weights, name)
    plain.W_dec.data = weights.W_dec[:, 0].contiguous()
    logits = []
    for sae in (single, plain):
        with splice(hooked2, sae, error="drop", edits=Add(features=3, amount=2.0)) as spliced:
            logits.append(spliced(TOKENS))
    assert largest(logits[0] - logits[1]) < 1e-6


@TWO_KINDS
@torch.no_grad()
def test_sub_hooks_carry_the_name_of_the_layer_that_is_read(model, hf) -> None:
    code = clt(hf, affine=True)
    parts = ("input", "acts_pre", "acts_post", "recons", "error", "output")
    names = [f"{name}.hook_sae_{part}" for name in OUTS for part in parts]
    with splice(model, code, exclude=()) as spliced:
        logits, cache = spliced.run_with_cache(TOKENS, names_filter=[*names, *OUTS])
    assert largest(logits - model(TOKENS)) < 1e-5
    with replaced(hf, code, TOKENS, error="keep", keep=torch.ones_like(TOKENS).bool()) as expected:
        hf(TOKENS)
    acts = [cache[f"{name}.hook_sae_acts_post"] for name in OUTS]
    for j, name in enumerate(OUTS):
        x = cache[f"{name}.hook_sae_input"]
        recons = code.decode_layer(j, acts, x)
        assert largest(acts[j] - expected.before[j]) < 1e-5
        assert largest(cache[f"{name}.hook_sae_recons"] - recons) < 1e-5
        assert largest(cache[f"{name}.hook_sae_error"] - (cache[name] - recons)) < 1e-5
        assert largest(cache[f"{name}.hook_sae_output"] - cache[name]) < 1e-6


@TWO_KINDS
@torch.no_grad()
def test_other_dictionaries_go_beside_it(model, hf) -> None:
    code, sae = clt(hf), factories.residual(model, 1)
    edit = Add(features=2, amount=3.0, sae=sae)
    with splice(model, [code, sae], error="drop", edits=edit, exclude=()) as spliced:
        got = spliced(TOKENS)
    with (
        splice(model, code, error="drop", exclude=()),
        splice(model, sae, error="drop", exclude=(), edits=edit) as inner,
    ):
        nested = inner(TOKENS)
    assert largest(got - nested) < 1e-5


# --------------------------------------------------------------------------- edits
CHANGES = {
    "clamp": (lambda **o: Clamp(value=2.0, **o), lambda a: 0 * a + 2.0),
    "scale": (lambda **o: Scale(factor=-3.0, **o), lambda a: -3.0 * a),
    "ablate": (lambda **o: Ablate(**o), lambda a: 0 * a),
    "add": (lambda **o: Add(amount=1.5, **o), lambda a: a + 1.5),
}


def on_chosen(change: Any) -> Any:
    def changed(acts: torch.Tensor) -> torch.Tensor:
        acts = acts.clone()
        acts[..., CHOSEN] = change(acts[..., CHOSEN])
        return acts

    return changed


@TWO_KINDS
@torch.no_grad()
@ERRORS
@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("position", [0, 1])
def test_an_edit_reaches_all_later_layers(model, hf, name: str, error: Any, position: int) -> None:
    """``y_j + sum_i (a'_i - a_i) W_dec_i[:, j]``, with the live features of every layer."""
    code = clt(hf, affine=True)
    make, change = CHANGES[name]
    edit = make(features=CHOSEN, layer=position)
    with splice(model, code, error=error, edits=edit) as spliced:
        short = spliced(TOKENS)
        logits, cache = spliced.run_with_cache(TOKENS, names_filter=[*OUTS, *outputs(code)])
        full, _ = spliced.run_with_cache(
            TOKENS, names_filter=[f"{name}.hook_sae_acts_post" for name in OUTS]
        )
    changes = {position: on_chosen(change)}
    with replaced(hf, code, TOKENS, error=error, changes=changes) as expected:
        by_hand = hf(TOKENS).logits
    for got in (short, logits, full):
        assert largest(got - by_hand) < 1e-5
    for j in range(3):
        assert largest(cache[outputs(code)[j]] - expected.outputs[j]) < 1e-5
        moved = largest(cache[outputs(code)[j]] - cache[OUTS[j]])
        assert error == "drop" or (moved > 1e-2) == (j >= position)


@TWO_KINDS
@torch.no_grad()
@ERRORS
def test_edits_of_several_layers_add_up(model, hf, error: Any) -> None:
    code = clt(hf)
    edits = [
        Clamp(features=CHOSEN, value=2.0, layer=0),
        Scale(features=CHOSEN, factor=3.0, layer=1),
    ]
    changes = {0: on_chosen(lambda a: 0 * a + 2), 1: on_chosen(lambda a: 3 * a)}
    with splice(model, code, error=error, edits=edits) as spliced:
        got = spliced(TOKENS)
    with replaced(hf, code, TOKENS, error=error, changes=changes):
        assert largest(got - hf(TOKENS).logits) < 1e-5


@TWO_KINDS
@torch.no_grad()
@ERRORS
def test_the_crosscoders_layers_go_by_their_own_numbers(model, hf, error: Any) -> None:
    """Layers 0 and 2: the second one is ``layer=2``, and nothing happens at layer 1."""
    code = crosscoder(model, (0, 2))
    with splice(model, code, error=error, edits=Add(features=3, amount=2.0, layer=2)) as spliced:
        got = spliced(TOKENS)
    direction = torch.nn.functional.one_hot(torch.tensor(3), 48)
    with replaced(hf, code, TOKENS, error=error, changes={1: lambda a: a + 2 * direction}):
        assert largest(got - hf(TOKENS).logits) < 1e-5


@TWO_KINDS
@torch.no_grad()
@ERRORS
@pytest.mark.parametrize("how", ["returned", "in place"])
def test_a_hook_on_features_of_a_layer_is_the_edit_of_the_same_effect(
    model, hf, error, how
) -> None:
    code = clt(hf)

    def silence(acts: torch.Tensor, hook: Any) -> torch.Tensor | None:
        acts = acts.clone() if how == "returned" else acts
        acts[..., CHOSEN] = 0
        return acts if how == "returned" else None

    with splice(model, code, error=error, edits=Ablate(features=CHOSEN, layer=0)) as spliced:
        expected = spliced(TOKENS)
    with splice(model, code, error=error) as spliced:
        hooks = [(f"{OUTS[0]}.hook_sae_acts_post", silence)]
        got = spliced.run_with_hooks(TOKENS, fwd_hooks=hooks)
        plain = spliced(TOKENS)
    assert largest(got - expected) < 1e-5
    assert largest(plain - expected) > 1e-3


@TWO_KINDS
@torch.no_grad()
@ERRORS
def test_a_hook_on_what_is_read_changes_the_features_of_that_layer(model, hf, error: Any) -> None:
    code = clt(hf, affine=True)

    def double(x: torch.Tensor, hook: Any) -> torch.Tensor:
        return 2 * x

    name = f"{OUTS[1]}.hook_sae_input"
    with splice(model, code, error=error, exclude=()) as spliced:
        names = [f"{OUTS[1]}.hook_sae_{part}" for part in ("acts_post", "output")] + [OUTS[1]]
        with spliced.hooks([(name, double)]):
            _, cache = spliced.run_with_cache(TOKENS, names_filter=names)
        _, plain = spliced.run_with_cache(TOKENS, names_filter=[*names, name])
    weights, x = code.weights(1), plain[name]
    acts, real = code.encode_layer(1, 2 * x), plain[names[0]]
    assert largest(cache[names[0]] - acts) < 1e-5
    change = (acts - real) @ weights.W_dec[:, 1] + x @ weights.A
    assert largest(cache[names[1]] - plain[names[1]] - change) < 1e-4


@torch.no_grad()
def test_features_of_another_run_go_into_their_layer(hooked2, code2) -> None:
    name = f"{OUTS[1]}.hook_sae_acts_post"
    others = random_tokens(seed=3)
    with splice(hooked2, code2) as spliced:
        _, cache = spliced.run_with_cache(others, names_filter=name)
    with splice(hooked2, code2, edits=Replace(features=CHOSEN, source=cache, layer=1)) as spliced:
        _, shown = spliced.run_with_cache(TOKENS, names_filter=name)
    assert torch.equal(shown[name][:, 1:, CHOSEN], cache[name][:, 1:, CHOSEN])


@torch.no_grad()
def test_a_projection_removes_the_direction_at_its_own_layer(hooked2, code2) -> None:
    name = f"{OUTS[1]}.hook_sae_output"
    with splice(hooked2, code2, edits=Project(features=3, factor=0.0, layer=1)) as spliced:
        _, cache = spliced.run_with_cache(TOKENS, names_filter=[name, OUTS[1]])
    direction = code2.weights(1).W_dec[3, 1]
    assert largest(cache[name][:, 1:] @ direction) < 1e-5
    assert largest(cache[OUTS[1]][:, 1:] @ direction) > 1e-2
