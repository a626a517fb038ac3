"""What is not finite is named, wherever it comes in: no public function gives numbers that rest on it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import gemmascope_plugin as gs
from gemmascope_plugin.errors import GemmaScopeError, ModelError
from gemmascope_plugin.models.protocol import check_finite, check_weights, is_finite
from gemmascope_plugin.splice import HookedSAE, splice
from tests import factories
from tests.support.calls import CALLS, Scene, bundled
from tests.tiny_models import random_tokens

NAN = float("nan")
RAW = ("splice", "supernodes", "trace")
"""Calls that hand on what the model gives, or (here) start from the graph of a sound model."""


@pytest.fixture(scope="module")
def sound() -> Scene:
    scene = bundled("hooked")
    for name in ("graph", "circuit", "edge_circuit", "feature_circuit"):
        getattr(scene, name)
    CALLS["verify_top"](scene)
    return scene


def with_results(scene: Scene, of: Scene) -> Scene:
    for name in ("graph", "circuit", "edge_circuit", "feature_circuit", "atp"):
        scene.results[name] = of.results[name]
    return scene


@pytest.fixture(scope="module")
def ill(sound: Scene) -> Scene:
    scene = Scene(copy.deepcopy(sound.model), sound.saes)
    scene.model.blocks[1].mlp.W_out.data[3, 5] = NAN
    return with_results(scene, sound)


def test_the_first_entry_is_named() -> None:
    x = torch.zeros(2, 3)
    assert (
        check_finite(x, "It") is x and is_finite(torch.zeros(0)) and is_finite(torch.ones(2).int())
    )
    x[1, 2] = -torch.inf
    with pytest.raises(ModelError, match=r"It is not finite: 1 of 6 .* first at \[1, 2\] \(-inf\)"):
        check_finite(x, "It")
    with pytest.raises(ModelError, match="The sum is not finite: it is nan"):
        check_finite(NAN, "The sum")


def test_weights_are_checked_again_when_they_change() -> None:
    x = torch.zeros(4, 2)
    check_weights([("W", x)], "The dictionary")
    x[3, 1] = NAN
    with pytest.raises(ModelError, match=r"The dictionary has a weight .* W\[3, 1\] is nan"):
        check_weights([("W", x)], "The dictionary")


@pytest.mark.parametrize("name", [name for name in CALLS if name not in RAW])
def test_a_model_with_a_nan_is_refused(name: str, ill: Scene) -> None:
    with pytest.raises(GemmaScopeError, match=r"finite|NaN"):
        CALLS[name](ill)


def test_the_cause_is_named(ill: Scene) -> None:
    match = r"blocks\.1\.mlp\.W_out\[3, 5\] = nan"
    with pytest.raises(ModelError, match=match):
        gs.activation_patching(ill.model, ill.task, "z")
    with pytest.raises(ModelError, match=r"What blocks\.1\.hook_mlp_out has.*" + match):
        gs.trace(ill.model, ill.prompt, ill.transcoders)


def test_one_nan_in_the_unembedding(sound: Scene) -> None:
    model = copy.deepcopy(sound.model)
    model.unembed.W_U.data = model.unembed.W_U.data.clone()
    model.unembed.W_U.data[4, 100] = NAN
    for call in (
        lambda: gs.verify(model, sound.saes["res"], sound.prompt),
        lambda: gs.trace(model, sound.prompt, sound.transcoders),
        lambda: gs.logit_lens(model, sound.prompt),
    ):
        with pytest.raises(ModelError, match=r"unembed.*nan"):
            call()


def test_a_dictionary_with_a_nan_is_refused(sound: Scene) -> None:
    sae = copy.deepcopy(sound.saes["tc1"])
    sae.W_dec.data[7, 2] = NAN
    others = [tc for name, tc in sound.saes.items() if name.startswith("tc") and name != "tc1"]
    for call in (
        lambda: gs.trace(sound.model, sound.prompt, [*others, sae]),
        lambda: gs.verify(sound.model, sae, sound.prompt),
        lambda: HookedSAE(sae),
    ):
        with pytest.raises(ModelError, match=r"blocks\.1\.hook_mlp_out.*W_dec\[7, 2\] is nan"):
            call()


def test_a_dictionary_that_overflows_says_so(hooked2: Any) -> None:
    sae = copy.deepcopy(factories.residual(hooked2, 1))
    sae.W_dec.data *= 60000 / float(sae.W_dec.detach().abs().max())
    sae.W_enc.data *= 100
    sae = sae.to(torch.float16)
    with (
        torch.no_grad(),
        splice(hooked2, HookedSAE(sae, error="drop")) as run,
        pytest.raises(
            ModelError, match=r"dictionary at blocks\.1\.hook_resid_post writes .*finite"
        ),
    ):
        run(random_tokens())
