"""The training spec: what it takes, what it refuses and how it says so."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest

from gemmascope_plugin.errors import GemmaScopeError, UnknownNameError
from gemmascope_plugin.training import ARCHITECTURES, PRESETS, TrainSpec, preset_spec
from gemmascope_plugin.training.architectures import SELECTIVE, architecture
from gemmascope_plugin.training.learner import lr_share
from gemmascope_plugin.training.presets import whole_spec
from tests.training.cases import spec


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_preset_makes_every_architecture_and_json_keeps_it(preset: str, name: str) -> None:
    values = {"layer": 3, "architecture": name, "d_sae": 128}
    if name == "tree" or name.startswith("matryoshka"):
        values["levels"] = [32, 128]
    made = preset_spec(preset, values)
    assert TrainSpec.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    assert architecture(made) is ARCHITECTURES[name]


def test_presets_are_the_published_recipes() -> None:
    first = preset_spec("gemma-scope", {"layer": 0})
    assert (first.lr, first.beta1, first.beta2, first.batch_size) == (7e-5, 0.0, 0.999, 4096)
    assert (first.bandwidth, first.init_threshold, first.sparsity) == (0.001, 0.001, "step")
    assert (first.lr_warm_up, first.sparsity_warm_up, first.scale) == (1000, 10_000, "unit")
    assert (first.architecture, dict(first.options)) == ("gemma_scope_jumprelu", {})
    second = preset_spec("gemma-scope-2", {"layer": 0, "architecture": "jumprelu_transcoder"})
    assert (second.sparsity, second.sparsity_warm_up, second.gain) == ("quadratic", 50_000, "with")
    assert second.hooks("transcoder") == ("blocks.0.mlp.hook_in", "blocks.0.hook_mlp_out")
    assert not second.options
    for levels in ({}, {"levels": [8, 64], "d_sae": 64}):
        third = preset_spec("gemma-scope-2", {"layer": 0, "sparsity_coefficient": 0.5, **levels})
        assert third.options == {"frequency_coefficient": 0.5}
        assert third.architecture == (
            "matryoshka_prefix_jumprelu" if levels else "gemma_scope_jumprelu"
        )
    options = {"max_frequency": 0.2}
    assert preset_spec("gemma-scope-2", {"layer": 0, "options": options}).options == {
        **{"frequency_coefficient": 1e-3, "max_frequency": 0.2},
    }


def test_scales_are_those_the_architectures_are_meant_for() -> None:
    levels = {"levels": [8, 64], "d_sae": 64, "layer": 0}
    for name, scale in (("tree", "layer_norm"), ("softsae", "sqrt_d"), ("batchtopk", "sqrt_d")):
        values = {"architecture": name, **(levels if name == "tree" else {"layer": 0})}
        assert preset_spec("quick", values).scale == scale
        assert preset_spec("quick", {**values, "scale": "none"}).scale == "none"


def test_what_is_given_goes_before_the_preset() -> None:
    assert preset_spec("quick", {"layer": 0, "steps": 100, "lr": 1e-3}).lr_end == 1e-3 / 50
    assert preset_spec("quick", {"layer": 0, "steps": 100}).lr_warm_up == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_l0": 25}, "target_l0=25 is out of range.*24 features"),
        ({"target_l0": 0}, "target_l0=0 is out of range"),
        ({"d_sae": 0}, "d_sae=0 is out of range. There is: numbers from 1"),
        ({"batch_size": 1}, "batch_size=1 is out of range"),
        ({"bucket": 8}, r"bucket=8 is out of range.*numbers from 32 \(the batch\)"),
        ({"lr_warm_up": 24}, "lr_warm_up=24 is out of range.*24 steps"),
        ({"lr": 0.0}, "lr=0.0 is out of range"),
        ({"d_sae": 24.5}, "d_sae=24.5 is of type float, not int"),
        ({"d_sae": True}, "d_sae=True is of type bool, not int"),
        ({"lr": "fast"}, "lr='fast' is of type str, not float"),
        ({"sparsity": "quadratc"}, "Unknown sparsity 'quadratc'.*Did you mean 'quadratic'"),
        ({"hook_in": "blocks.1.hook_resid_post", "layer": 1}, "names two sites"),
        ({"layer": None}, "names no site"),
        ({"hook_out": "blocks.1.hook_mlp_out"}, "hook_out without hook_in"),
        ({"levels": [8, 24]}, "levels=.* means nothing to the architecture 'jumprelu'"),
        ({"levels": [24, 8]}, "levels=.* is out of range"),
        ({"architecture": "topk", "bandwidth": 0.5}, "bandwidth=0.5 means nothing to .*'topk'"),
        ({"architecture": "jumprelo"}, "Unknown architecture.*Did you mean 'jumprelu'"),
        ({"architecture": "topk", "scale": "layer_norm"}, "cannot be trained on layer-normed"),
        (
            {"architecture": "softsae", "dead_features": "ghost"},
            "A 'softsae' has no pre-activations that ghost gradients could flow through",
        ),
    ],
)
def test_values_that_cannot_be(changes: dict, message: str) -> None:
    with pytest.raises(GemmaScopeError, match=message):
        whole_spec(spec(**changes), None)


def test_unknown_keys_are_errors_with_the_nearest_key() -> None:
    for make in (TrainSpec.from_dict, lambda values: preset_spec("quick", values)):
        with pytest.raises(UnknownNameError, match="no key 'd_sea'.*Did you mean 'd_sae'"):
            make({"d_sea": 12, "layer": 0})
    with pytest.raises(GemmaScopeError, match="lacks d_sae"):
        TrainSpec.from_dict({"layer": 0})
    with pytest.raises(UnknownNameError, match="Unknown preset 'quik'.*'quick'"):
        preset_spec("quik", {"layer": 0})
    with pytest.raises(GemmaScopeError, match="preset='quick' beside a whole TrainSpec"):
        whole_spec(spec(), "quick")


def test_an_sae_reads_what_it_reconstructs_and_a_transcoder_does_not() -> None:
    hooks = {"hook_in": "blocks.1.hook_resid_mid", "hook_out": "blocks.1.hook_mlp_out"}
    with pytest.raises(GemmaScopeError, match="A 'jumprelu' cannot read .* and reconstruct"):
        whole_spec(spec(**hooks), None)
    with pytest.raises(GemmaScopeError, match="cannot read"):
        whole_spec(spec(architecture="jumprelu_transcoder", hook_in=hooks["hook_in"]), None)
    assert whole_spec(spec(architecture="jumprelu_transcoder", **hooks), None).name == (
        "blocks_1_hook_resid_mid"
    )


def test_selective_fields_exist_and_are_used() -> None:
    assert set(SELECTIVE) <= {field.name for field in fields(TrainSpec)}
    assert set(SELECTIVE) == set().union(*(entry.uses for entry in ARCHITECTURES.values()))


def test_the_learning_rate_warms_up_and_ends_where_it_should() -> None:
    recipe = spec(steps=101, lr=1e-2, lr_end=1e-4, lr_warm_up=20)
    rates = [lr_share(recipe, step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[20] == 1.0
    assert rates[100] == pytest.approx(0.01)
    assert rates[60] == pytest.approx((1 + 0.01) / 2)
    assert rates[:21] == sorted(rates[:21]) and rates[20:] == sorted(rates[20:], reverse=True)
    assert lr_share(spec(lr_end=None), 23) == 1.0
