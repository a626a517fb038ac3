"""The batched sweep equals one patch per forward pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gemmascope_plugin.causes import FeatureId, activation_patching, attribution_patching
from gemmascope_plugin.causes.exact.activation_patching import sweep
from gemmascope_plugin.causes.experiment import experiment
from gemmascope_plugin.causes.grid import Choice
from gemmascope_plugin.causes.memory import Limit
from gemmascope_plugin.errors import EmptySelectionError, FeatureIndexError, UnknownNameError
from gemmascope_plugin.models import flatten_heads, module_replay
from gemmascope_plugin.models.arithmetic import Arithmetic
from gemmascope_plugin.splice import HookedSAE, splice
from tests import factories
from tests.causes.tasks import CLEAN, CORRUPT, TASK, metric_under, score, values_at, with_features
from tests.factories import n_hooks, tiny_model, unchecked
from tests.splice.reference import features
from tests.support.rounding import TINY
from tests.tiny_models import FIRST_WORD_ID

# the bridge's word on an edited norm scale, of the slow references
pytestmark = pytest.mark.filterwarnings("ignore:A forward hook edited hook_scale")

EVERY = slice(None)
STREAM, HEAD, SCALE = (EVERY, "pos"), (..., "head", EVERY), (EVERY, "pos")
CASES = {
    "resid_pre": ("blocks.{}.hook_resid_pre", STREAM),
    "resid_post": ("blocks.{}.hook_resid_post", STREAM),
    "attn_out": ("blocks.{}.hook_attn_out", STREAM),
    "mlp_out": ("blocks.{}.hook_mlp_out", STREAM),
    "z": ("blocks.{}.attn.hook_z", HEAD),
    "q": ("blocks.{}.attn.hook_q", HEAD),
    "k": ("blocks.{}.attn.hook_k", HEAD),
    "v": ("blocks.{}.attn.hook_v", HEAD),
    "pattern": ("blocks.{}.attn.hook_pattern", (EVERY, "head")),
    "neuron": ("blocks.{}.mlp.hook_post", (..., "neuron")),
    "ln1_scale": ("blocks.{}.ln1.hook_scale", SCALE),
    "ln1_post_scale": ("blocks.{}.ln1_post.hook_scale", SCALE),
    "ln2_scale": ("blocks.{}.ln2.hook_scale", SCALE),
    "ln2_post_scale": ("blocks.{}.ln2_post.hook_scale", SCALE),
}
"""Component to hook and place; ``resid_mid`` is written differently on the two classes."""
SIZES = {"pos": 8, "head": 4, "neuron": 64}
CHOICE = {"pos": "positions", "head": "heads", "neuron": "neurons"}
RUNS = {"denoising": (CORRUPT, CLEAN), "noising": (CLEAN, CORRUPT)}


def put(other: torch.Tensor, place: tuple):
    """A hook function that inserts some entries of another run."""

    def patch(x):
        x = x.clone()
        x[place] = other[place]
        return x

    return patch


def slow(model, component: str, direction: str, layers, columns=None) -> tuple[str, torch.Tensor]:
    """One forward pass per cell on the bare model; the axis beside the layers, and the effects."""
    (base, other), (hook, place) = RUNS[direction], CASES[component]
    (axis,) = (part for part in place if isinstance(part, str))
    columns = range(SIZES[axis]) if columns is None else columns
    before = metric_under(model, base, {})
    effects = torch.zeros(len(layers), len(columns))
    for row, layer in enumerate(layers):
        name = hook.format(layer)
        acts = values_at(model, other, name)
        for i, column in enumerate(columns):
            where = tuple(column if part == axis else part for part in place)
            effects[row, i] = metric_under(model, base, {name: put(acts, where)}) - before
    return axis, effects


@pytest.mark.parametrize("direction", RUNS)
@pytest.mark.parametrize("component", ["resid_pre", "z", "k"])
def test_the_sweep_equals_one_patch_per_pass(hooked2, component: str, direction: str) -> None:
    """Every cell."""
    columns = [0, 1] if component == "k" else None  # two key-value heads
    axis, expected = slow(hooked2, component, direction, range(3), columns)
    got = activation_patching(hooked2, TASK, component, direction=direction)
    assert got.axes == ("layer", axis)
    assert torch.allclose(got.values, expected, atol=1e-5)
    assert expected.abs().max() > 1e-2
    assert torch.allclose(got.values_by_prompt.mean(-1), got.values, atol=TINY)


@pytest.mark.parametrize("component", CASES)
def test_every_component_on_every_model(model, component: str) -> None:
    columns = [7] if "pos" in CASES[component][1] else [1]
    axis, expected = slow(model, component, "denoising", [0, 2], columns)
    chosen = {CHOICE[axis]: columns}
    got = activation_patching(model, TASK, component, layers=[0, 2], **chosen)
    assert got.labels == {"layer": (0, 2), axis: tuple(columns)}
    assert torch.allclose(got.values, expected, atol=1e-5)
    assert expected.abs().max() > 1e-5


@pytest.mark.parametrize("direction", RUNS)
def test_the_middle_of_the_stream_is_that_of_the_other_run(kind, direction: str) -> None:
    """``HookedTransformer`` can write there directly; the bridge has the same weights."""
    base, other = RUNS[direction]
    bare = tiny_model(kind[0], "hooked")
    got = activation_patching(
        tiny_model(*kind), TASK, "resid_mid", direction=direction, layers=[0, 2], positions=[3, 7]
    )
    before = metric_under(bare, base, {})
    for row, layer in enumerate((0, 2)):
        name = f"blocks.{layer}.hook_resid_mid"
        acts = values_at(bare, other, name)
        for column, pos in enumerate((3, 7)):
            expected = metric_under(bare, base, {name: put(acts, (EVERY, pos))}) - before
            assert float(got.values[row, column]) == pytest.approx(expected, abs=1e-5)


def test_the_last_norm(model) -> None:
    scale = values_at(model, CLEAN, "ln_final.hook_scale")
    patch = put(scale, (EVERY, 7))
    expected = metric_under(model, CORRUPT, {"ln_final.hook_scale": patch})
    got = activation_patching(model, TASK, "ln_final_scale")
    assert got.axes == ("pos",)
    assert got.values[:7].abs().max() < 1e-6
    assert float(got.values[7]) == pytest.approx(expected - score(model(CORRUPT)), abs=1e-5)


def test_three_axes_and_a_covered_one(model) -> None:
    """Every cell of a grid over layers, heads and positions; then heads with some positions at once."""
    grid = activation_patching(model, TASK, "z", axes=("head", "layer", "pos"), positions=[3, 7])
    some = activation_patching(model, TASK, "z", axes=("layer",), heads=[1, 2], positions=[3, 7])
    name = "blocks.1.attn.hook_z"
    acts, before = values_at(model, CLEAN, name), metric_under(model, CORRUPT, {})
    single = metric_under(model, CORRUPT, {name: put(acts, (EVERY, 7, 2))}) - before

    def block(x):
        x = x.clone()
        x[:, [3, 7], 1:3] = acts[:, [3, 7], 1:3]
        return x

    several = metric_under(model, CORRUPT, {name: block}) - before
    assert grid.values.shape == (4, 3, 2)
    assert float(grid.values[2, 1, 1]) == pytest.approx(single, abs=1e-5)
    assert float(some.values[1]) == pytest.approx(several, abs=1e-5)


def test_layers_that_are_no_axis_are_patched_together(model) -> None:
    got = activation_patching(model, TASK, "attn_out", axes=("pos",), layers=[0, 2]).at(pos=[3, 7])
    names = [f"blocks.{layer}.hook_attn_out" for layer in (0, 2)]
    acts = {name: values_at(model, CLEAN, name) for name in names}
    before = metric_under(model, CORRUPT, {})
    for i, pos in enumerate((3, 7)):
        hooks = {name: put(acts[name], (EVERY, pos)) for name in names}
        expected = metric_under(model, CORRUPT, hooks) - before
        assert float(got.values[i]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("component", ["resid_pre", "pattern", "ln_final_scale"])
def test_a_late_start_changes_no_number(model, component: str, monkeypatch) -> None:
    def swept() -> torch.Tensor:
        limit, positions = Limit(6), [3, 7]
        choice = Choice(positions=positions)
        with experiment(model, TASK, component, choice, direction="denoising", limit=limit) as run:
            return sweep(run)

    late = swept()
    monkeypatch.setattr(Arithmetic, "of", lambda *args: None)
    restarted = swept()
    monkeypatch.setattr(module_replay, "can_restart", lambda model: False)
    whole = swept()
    assert torch.allclose(restarted, whole, atol=TINY)
    assert torch.allclose(late, whole, atol=1e-5)


def test_a_late_start_leaves_earlier_blocks_out(model, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(Arithmetic, "of", lambda *args: None)
    handles = [
        b.register_forward_hook(lambda *_, i=i: seen.append(i)) for i, b in enumerate(model.blocks)
    ]
    try:
        with experiment(model, TASK, "mlp_out", Choice(layers=[2]), direction="denoising") as run:
            seen.clear()
            sweep(run)
    finally:
        for handle in handles:
            handle.remove()
    assert set(seen) == {2}


def test_hooks_of_others_take_part(hooked2) -> None:
    """With somebody's hooks in the model every pass is whole."""
    seen = []

    def double(x, hook):
        seen.append(len(x))
        return 2 * x

    with hooked2.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", double)]):
        got = activation_patching(hooked2, TASK, "z", layers=[2])
        n = len(seen)
        _, expected = slow(hooked2, "z", "denoising", [2])
    assert torch.allclose(got.values, expected, atol=1e-5)
    assert n == 3  # both runs, and one pass of all patches


@pytest.mark.parametrize("direction", RUNS)
def test_the_whole_error_of_a_dictionary(model, direction: str) -> None:
    sae, (base, other) = factories.residual(model, 1), RUNS[direction]
    site = "blocks.1.hook_resid_post"
    got = activation_patching(model, TASK, "error", direction=direction, saes=sae)
    error = values_at(model, other, site) - decoded(sae, values_at(model, other, site))
    keep = (base >= FIRST_WORD_ID)[..., None]

    def patch(x):
        return torch.where(keep, decoded(sae, x) + error, x)

    expected = metric_under(model, base, {site: patch}) - metric_under(model, base, {})
    assert got.axes == ("site",)
    assert got.labels == {"site": (site,)}
    assert float(got.values) == pytest.approx(expected, abs=1e-5)


def decoded(sae, x: torch.Tensor) -> torch.Tensor:
    return features(sae, x) @ sae.W_dec + sae.b_dec


def test_features_by_position_share_a_site_with_their_sum(hooked2) -> None:
    sae = factories.residual(hooked2, 1)
    whole = activation_patching(hooked2, TASK, "feature", saes=sae)
    feature = whole.labels["feature"][0]
    got = activation_patching(
        hooked2, TASK, "feature", saes=sae, features=[feature], axes=("pos", "feature")
    )
    name = sae.cfg.metadata.hook_name
    wanted = features(sae, values_at(hooked2, CLEAN, name))
    for pos in (3, 7):
        patch = with_features(sae, [feature.feature], wanted, CORRUPT)
        at = torch.arange(8)[:, None] == pos
        hooks = {name: lambda x, p=patch, at=at: torch.where(at, p(x), x)}
        expected = metric_under(hooked2, CORRUPT, hooks) - metric_under(hooked2, CORRUPT, {})
        assert float(got.values[pos, 0]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("direction", RUNS)
@pytest.mark.parametrize("site", ["residual", "attention"])
def test_feature_patches_equal_edits_of_the_bare_model(model, site: str, direction: str) -> None:
    sae = getattr(factories, site)(model, 1)
    name = sae.cfg.metadata.hook_name
    base, other = RUNS[direction]
    wanted = features(sae, flatten_heads(values_at(model, other, name)))
    got = activation_patching(model, TASK, "feature", direction=direction, saes=sae)
    before = metric_under(model, base, {})
    assert len(got.labels["feature"]) > 5
    for feature, value in list(zip(got.labels["feature"], got.values, strict=True))[::4]:
        patch = with_features(sae, [feature.feature], wanted, base)
        expected = metric_under(model, base, {name: patch}) - before
        assert float(value) == pytest.approx(expected, abs=1e-5)


def test_features_that_do_not_differ_are_left_out(hooked2) -> None:
    sae = factories.residual(hooked2, 1)
    name = sae.cfg.metadata.hook_name
    clean, corrupt = (features(sae, values_at(hooked2, t, name))[:, 1:] for t in (CLEAN, CORRUPT))
    expected = (clean - corrupt).abs().amax((0, 1)).gt(1e-6).nonzero().flatten().tolist()
    got = activation_patching(hooked2, TASK, "feature", saes=sae).labels["feature"]
    assert [f.feature for f in got] == expected


def test_all_features_and_the_error_together_are_the_clean_run(model) -> None:
    """One layer's residual stream is all that the layers above see."""
    sae = factories.residual(model, 0)
    parts = [f"{sae.cfg.metadata.hook_name}.hook_sae_{part}" for part in ("acts_post", "error")]
    with torch.no_grad(), splice(model, sae) as spliced:
        clean, cache = spliced.run_with_cache(CLEAN, names_filter=parts)
        hooks = [(name, lambda x, hook, name=name: cache[name]) for name in parts]
        patched = spliced.run_with_hooks(CORRUPT, fwd_hooks=hooks)
        features_alone = spliced.run_with_hooks(CORRUPT, fwd_hooks=hooks[:1])
    assert torch.allclose(patched, clean, atol=1e-5)
    assert not torch.allclose(features_alone, clean, atol=1e-2)


@pytest.mark.parametrize("max_rows", [1, 2, 7, 10_000])
def test_the_size_of_a_batch_does_not_matter(hooked2, max_rows: int) -> None:
    whole = activation_patching(hooked2, TASK, "z")
    parts = activation_patching(hooked2, TASK, "z", max_rows=max_rows)
    assert torch.allclose(whole.values, parts.values, atol=TINY)


@pytest.mark.parametrize("direction", RUNS)
def test_the_whole_input_carries_the_whole_effect(model, direction: str) -> None:
    effects = activation_patching(model, TASK, "resid_pre", direction=direction, per_position=False)
    whole = effects.gap if direction == "denoising" else -effects.gap
    assert effects.axes == ("layer",)
    assert effects.values.tolist() == pytest.approx([whole] * 3, abs=1e-5)


def test_metadata_says_what_was_measured(hooked2) -> None:
    effects = activation_patching(hooked2, TASK, "z", direction="noising")
    with torch.no_grad():
        assert effects.metadata["metric_clean"] == pytest.approx(score(hooked2(CLEAN)), abs=1e-5)
        assert effects.metadata["metric_corrupt"] == pytest.approx(
            score(hooked2(CORRUPT)), abs=1e-5
        )
    expected = {
        "component": "z",
        "direction": "noising",
        "method": "exact patching",
        "task": "random",
    }
    assert expected.items() <= effects.metadata.items()
    assert effects.metadata["n_prompts"] == 2
    assert effects.metadata["exclude"] == ()
    spliced = activation_patching(hooked2, TASK, "feature", saes=factories.residual(hooked2, 1))
    assert spliced.metadata["exclude"] == ("bos", "eos", "pad")


def test_a_wrapped_dictionary_is_spliced_with_its_error_kept(hooked2) -> None:
    sae = factories.residual(hooked2, 1)
    plain = activation_patching(hooked2, TASK, "feature", saes=sae)
    wrapped = activation_patching(hooked2, TASK, "feature", saes=HookedSAE(sae, error="drop"))
    assert torch.equal(plain.values, wrapped.values)


def test_the_model_is_left_alone(model) -> None:
    hooks = n_hooks(model)
    saes = [factories.residual(model, 0), factories.transcoder(model, 1)]
    activation_patching(model, TASK, "feature", saes=saes)
    assert n_hooks(model) == hooks
    with pytest.raises(FeatureIndexError):
        activation_patching(model, TASK, "feature", saes=saes[0], features=[feature(96)])
    assert n_hooks(model) == hooks


def feature(index: int, site: str = "blocks.0.hook_resid_post") -> FeatureId:
    return FeatureId(site, index)


@pytest.mark.parametrize("index", [-1, 96])
def test_a_feature_outside_the_dictionary_is_an_error(hooked2, index: int) -> None:
    sae = factories.residual(hooked2, 0)
    with pytest.raises(FeatureIndexError, match=f"Feature {index} does not exist.*0 to 95"):
        activation_patching(hooked2, TASK, "feature", saes=sae, features=[feature(index)])


def test_a_feature_of_another_site_is_an_error(hooked2) -> None:
    sae, elsewhere = factories.residual(hooked2, 0), feature(1, "blocks.1.hook_resid_post")
    with pytest.raises(UnknownNameError, match="'blocks.1.hook_resid_post'.*blocks.0"):
        activation_patching(hooked2, TASK, "feature", saes=sae, features=[elsewhere])


def test_an_empty_list_of_features_is_an_error(hooked2) -> None:
    sae = factories.residual(hooked2, 0)
    with pytest.raises(EmptySelectionError, match="No feature is named"):
        activation_patching(hooked2, TASK, "feature", saes=sae, features=[])


@pytest.mark.parametrize("patching", [activation_patching, attribution_patching])
@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_features_of_one_dictionary_are_known_by_their_index(hooked2, patching, kind) -> None:
    sae, site = factories.residual(hooked2, 0), "blocks.0.hook_resid_post"
    effects = patching(hooked2, TASK, "feature", saes=sae, features=kind([5, 3]))
    named = patching(hooked2, TASK, "feature", saes=sae, features=[(site, 5), FeatureId(site, 3)])
    assert effects.labels == named.labels and (effects.values == named.values).all()
    single = patching(hooked2, TASK, "feature", saes=sae, features=3)
    assert single.labels["feature"] == (FeatureId(site, 3),)


@pytest.mark.parametrize("features", [[3, 5], "3", [b"3"], [(1, 2, 3)], [None]])
def test_features_that_nobody_can_tell_apart_are_an_error(hooked2, features) -> None:
    saes = [factories.residual(hooked2, 0), factories.residual(hooked2, 1)]
    with pytest.raises(FeatureIndexError, match="which dictionary.*blocks.0.*Try: features=.Feat"):
        unchecked(activation_patching)(hooked2, TASK, "feature", saes=saes, features=features)


def test_two_dictionaries_at_one_site_are_told_apart(hooked2) -> None:
    saes = [factories.transcoder(hooked2, 1), factories.mlp(hooked2, 1)]
    together = activation_patching(hooked2, TASK, "feature", saes=saes)
    site = "blocks.1.hook_mlp_out"
    assert {feature.site for feature in together.labels["feature"]} == {f"{site}[0]", f"{site}[1]"}
    for number, sae in enumerate(saes):
        alone = activation_patching(hooked2, TASK, "feature", saes=sae)
        mine = [
            i for i, f in enumerate(together.labels["feature"]) if f.site.endswith(f"[{number}]")
        ]
        assert [together.labels["feature"][i].feature for i in mine] == [
            feature.feature for feature in alone.labels["feature"]
        ]
        assert torch.allclose(together.values[mine], alone.values, atol=1e-5)


def test_features_need_dictionaries(hooked2) -> None:
    for component in ("feature", "error"):
        with pytest.raises(UnknownNameError, match=f'"{component}" needs dictionaries'):
            activation_patching(hooked2, TASK, component)


def test_unknown_names_are_errors(hooked2) -> None:
    with pytest.raises(UnknownNameError, match="'mlp'.*Did you mean 'mlp_out'"):
        activation_patching(hooked2, TASK, "mlp")
    with pytest.raises(UnknownNameError, match="'denoise'.*Did you mean 'denoising'"):
        next(unchecked(experiment)(hooked2, TASK, "z", direction="denoise"))
    with pytest.raises(UnknownNameError, match="'resampled'.*Did you mean 'resample'"):
        next(
            unchecked(experiment)(hooked2, TASK, "z", direction="noising", replacement="resampled")
        )


def test_both_classes_agree() -> None:
    hooked, bridge = (
        activation_patching(tiny_model("gemma3", backend), TASK, "z").values
        for backend in ("hooked", "bridge")
    )
    assert torch.allclose(hooked, bridge, atol=1e-5)
