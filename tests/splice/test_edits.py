"""Edits: ``x + sum_i (a'_i - a_i) W_dec[i]`` at the chosen features and positions, nothing else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemmascope_plugin.errors import (
    EmptySelectionError,
    FeatureIndexError,
    InputError,
    ModelError,
    UnknownNameError,
    check_feature,
)
from gemmascope_plugin.splice import Ablate, Add, Clamp, Custom, Scale, splice
from gemmascope_plugin.splice.edit import apply_edits
from gemmascope_plugin.splice.window import Window
from tests import factories
from tests.factories import D_SAE, activations
from tests.splice.reference import features
from tests.support.rounding import TINY
from tests.tiny_models import random_tokens

TOKENS = random_tokens()
FEATURES = [3, 17, 40, 41, 95]
EDITS = {
    "ablate": (Ablate, {}, lambda a: 0 * a),
    "clamp": (Clamp, {"value": 2.5}, lambda a: 0 * a + 2.5),
    "scale": (Scale, {"factor": -3.0}, lambda a: -3 * a),
    "add": (Add, {"amount": 1.5}, lambda a: a + 1.5),
}
POSITIONS = {
    "all": (None, list(range(1, 20))),
    "one": (4, [4]),
    "last": (-1, [19]),
    "several": ([2, -3], [2, 17]),
    "slice": (slice(5, 9), [5, 6, 7, 8]),
    "from the end": (slice(-2, None), [18, 19]),
    "some excluded": ([0, 3], [3]),
    "mask": (torch.arange(20) == 6, [6]),
}


def site_of(sae: Any) -> tuple[str, str]:
    hook_in = sae.cfg.metadata.hook_name
    return hook_in, sae.cfg.metadata.hook_name_out or hook_in


def edited_tensor(model: Any, sae: Any, edits: Any, *, listened: bool) -> torch.Tensor:
    """What flows on at the output site."""
    name = f"{site_of(sae)[1]}.hook_sae"
    wanted = [f"{name}_output", f"{name}_acts_post"] if listened else [f"{name}_output"]
    with torch.no_grad(), splice(model, sae, edits=edits) as spliced:
        _, cache = spliced.run_with_cache(TOKENS, names_filter=wanted)
    return cache[f"{name}_output"]


def expected_tensor(model: Any, sae: Any, change: Any, positions: list[int]) -> torch.Tensor:
    hook_in, hook_out = site_of(sae)
    acts = features(sae, activations(model, TOKENS, hook_in))
    y = activations(model, TOKENS, hook_out).clone()
    for i in FEATURES:
        delta = change(acts[:, positions, i]) - acts[:, positions, i]
        y[:, positions] += delta[..., None] * sae.W_dec[i]
    return y


@pytest.mark.parametrize("listened", [False, True])
@pytest.mark.parametrize("where", POSITIONS)
@pytest.mark.parametrize("name", EDITS)
def test_an_edit_is_what_it_says(hooked2, name: str, where: str, listened: bool) -> None:
    kind, options, change = EDITS[name]
    positions, places = POSITIONS[where]
    sae = factories.residual(hooked2, 1)
    edit = kind(features=FEATURES, positions=positions, **options)
    got = edited_tensor(hooked2, sae, edit, listened=listened)
    expected = expected_tensor(hooked2, sae, change, places)
    assert torch.allclose(got, expected, atol=1e-5)
    bare = activations(hooked2, TOKENS, "blocks.1.hook_resid_post")
    assert torch.allclose(got[:, 0], bare[:, 0], atol=TINY)


@pytest.mark.parametrize("listened", [False, True])
@pytest.mark.parametrize("site", ["attention", "mlp", "transcoder"])
def test_edits_at_other_sites(model, site: str, listened: bool) -> None:
    sae = getattr(factories, site)(model, 1)
    edit = Clamp(features=FEATURES, value=2.0, positions=slice(3, None))
    got = edited_tensor(model, sae, edit, listened=listened)
    expected = expected_tensor(model, sae, lambda a: 0 * a + 2, list(range(3, 20)))
    assert torch.allclose(got, expected, atol=1e-5)


def test_both_classes_give_the_same_edited_logits() -> None:
    logits = []
    saes = factories.four_dictionaries(factories.tiny_model("gemma3", "hooked"))
    edits = [Add(features=i, amount=2.0, sae=sae) for i, sae in enumerate(saes)]
    for backend in ("hooked", "bridge"):
        model = factories.tiny_model("gemma3", backend)
        with torch.no_grad(), splice(model, saes, edits=edits) as spliced:
            logits.append(spliced(TOKENS))
    assert torch.allclose(*logits, atol=1e-5)


def test_edits_apply_in_order(hooked2) -> None:
    sae = factories.residual(hooked2, 1)
    first, second = Clamp(features=3, value=2.0), Scale(features=[3], factor=5.0)
    ten = edited_tensor(hooked2, sae, Clamp(features=3, value=10.0), listened=False)
    two = edited_tensor(hooked2, sae, Clamp(features=3, value=2.0), listened=False)
    for listened in (False, True):
        got = edited_tensor(hooked2, sae, [first, second], listened=listened)
        assert torch.allclose(got, ten, atol=1e-5)
        got = edited_tensor(hooked2, sae, [second, first], listened=listened)
        assert torch.allclose(got, two, atol=1e-5)


def test_an_edit_without_error_is_an_edit_of_the_reconstruction(hooked2) -> None:
    sae = factories.residual(hooked2, 1)
    name = "blocks.1.hook_resid_post"
    acts = features(sae, activations(hooked2, TOKENS, name))
    acts[..., 7] = 4.0
    edit = Clamp(features=7, value=4.0)
    with torch.no_grad(), splice(hooked2, sae, error="drop", edits=edit, exclude=()) as spliced:
        _, cache = spliced.run_with_cache(TOKENS, names_filter=f"{name}.hook_sae_output")
    got = cache[f"{name}.hook_sae_output"]
    assert torch.allclose(got, acts @ sae.W_dec + sae.b_dec, atol=1e-5)


def test_an_edit_names_its_dictionary_by_object_or_hook(hooked2) -> None:
    saes = [factories.residual(hooked2, layer) for layer in (0, 1)]
    results = []
    for named in (saes[1], "blocks.1.hook_resid_post"):
        edit = Add(features=2, amount=3.0, sae=named)
        with torch.no_grad(), splice(hooked2, saes, edits=edit) as spliced:
            results.append(spliced(TOKENS))
    with torch.no_grad(), splice(hooked2, saes[1], edits=Add(features=2, amount=3.0)) as spliced:
        results.append(spliced(TOKENS))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_hooks_may_edit_features_and_pre_activations(hooked2) -> None:
    """A user's hook on features or pre-activations acts as the edit of the same effect."""
    sae = factories.residual(hooked2, 1)
    name = "blocks.1.hook_resid_post"

    def silence(values, hook):
        values = values.clone()
        values[..., FEATURES] = 0
        return values

    with torch.no_grad(), splice(hooked2, sae, edits=Ablate(features=FEATURES)) as spliced:
        expected = spliced(TOKENS)
    with torch.no_grad(), splice(hooked2, sae) as spliced:
        for part in ("acts_pre", "acts_post"):
            hooks = [(f"{name}.hook_sae_{part}", silence)]
            assert torch.allclose(
                spliced.run_with_hooks(TOKENS, fwd_hooks=hooks), expected, atol=1e-5
            )
        assert not torch.allclose(spliced(TOKENS), expected, atol=1e-2)


ACTS = torch.rand(2, 4, 6)
ALL = Window(torch.ones(2, 4, dtype=torch.bool))
factors = st.floats(-4, 4)
subsets = st.lists(st.integers(0, 5), min_size=1, max_size=6, unique=True)
masks = st.lists(st.booleans(), min_size=8, max_size=8).filter(any)
places = st.one_of(
    st.none(),
    st.integers(-4, 3),
    st.lists(st.integers(-4, 3), min_size=1, max_size=4),
    st.sampled_from(
        [slice(None, 2), slice(-2, None), slice(1, 9, 2), slice(0, -1), slice(3, None)]
    ),
    masks.map(lambda listed: torch.tensor(listed).reshape(2, 4)),
)


def applied(*edits: Any, acts: torch.Tensor = ACTS) -> torch.Tensor:
    return apply_edits(edits, acts, range(6), ALL)


@given(factors, factors, subsets, places)
@settings(max_examples=60, deadline=None)
def test_scaling_twice_is_scaling_by_the_product(a: float, b: float, chosen, at) -> None:
    twice = [Scale(features=chosen, positions=at, factor=f) for f in (a, b)]
    once = Scale(features=chosen, positions=at, factor=a * b)
    assert torch.allclose(applied(*twice), applied(once), atol=1e-5)


@given(subsets, places, st.sampled_from(["zero", "mean"]))
@settings(max_examples=60, deadline=None)
def test_ablation_is_idempotent_and_touches_only_what_it_names(chosen, at, to) -> None:
    edit = Ablate(features=chosen, positions=at, to=to)
    once = applied(edit)
    if to == "zero" or at is None:  # the mean of a part changes when that part does
        assert torch.allclose(once, applied(edit, edit), atol=TINY)
    here = ALL.select(at)
    others = [i for i in range(6) if i not in chosen]
    assert torch.equal(once[..., others], ACTS[..., others])
    assert torch.equal(once[~here], ACTS[~here])
    expected = ACTS.mean((0, 1))[chosen] if to == "mean" else torch.zeros(len(chosen))
    assert torch.allclose(once[here][:, chosen], expected.expand(int(here.sum()), -1))


@given(subsets, subsets, places, places, factors)
@settings(max_examples=60, deadline=None)
def test_edits_of_different_features_may_come_in_any_order(
    clamped, others, at_clamped, at_others, a
) -> None:
    others = [i for i in others if i not in clamped] or [i for i in range(6) if i not in clamped]
    if not others:
        return
    first = Clamp(features=clamped, positions=at_clamped, value=a)
    second = Add(features=others, positions=at_others, amount=1.0)
    assert torch.equal(applied(first, second), applied(second, first))


@given(places, st.integers(0, 1))
@settings(max_examples=60, deadline=None)
def test_rows_and_positions_select_together(at, row: int) -> None:
    try:
        got = applied(Add(features=2, amount=1.0, positions=at, rows=row)) - ACTS
    except EmptySelectionError:
        assert isinstance(at, torch.Tensor)
        assert not at[row].any()
        return
    assert not got[1 - row].any()
    assert torch.equal(got[row, :, 2] != 0, ALL.select(at)[row])


def forged(edit: Any, **fields: Any) -> Any:
    """The edit with fields as a user may type them, past the type checks of the test run."""
    for name, value in fields.items():
        object.__setattr__(edit, name, value)
    return edit


def test_no_edits_are_the_identity() -> None:
    assert applied() is ACTS


def test_amounts_may_differ_by_feature_position_and_row() -> None:
    by_feature = applied(Clamp(features=[1, 4], value=[2.0, 3.0]))
    assert (by_feature[..., 1] == 2).all()
    assert (by_feature[..., 4] == 3).all()
    by_token = torch.arange(8.0).reshape(2, 4, 1)
    assert torch.equal(applied(Clamp(features=1, value=by_token))[..., 1], by_token[..., 0])
    scaled = applied(Scale(features=1, factor=torch.tensor([1.0, 0.0])[:, None, None]))
    assert torch.equal(scaled[0], ACTS[0])
    assert not scaled[1, :, 1].any()


def test_every_feature_at_once() -> None:
    assert not applied(Ablate(features=None)).any()
    assert torch.equal(applied(Scale(features=None, factor=2.0)), 2 * ACTS)


def test_the_mean_is_that_of_kept_tokens() -> None:
    keep = torch.tensor([[False, True, True, True], [True, True, False, False]])
    got = apply_edits([Ablate(features=3, to="mean")], ACTS, range(6), Window(keep))
    assert torch.allclose(got[keep][:, 3], ACTS[keep][:, 3].mean().expand(5))
    assert torch.equal(got[~keep], ACTS[~keep])
    ablated = applied(Ablate(features=[3, 5], to=[0.25, 0.5]))
    assert (ablated[..., 3] == 0.25).all()
    assert (ablated[..., 5] == 0.5).all()


def test_a_function_of_ones_own() -> None:
    got = applied(Custom(features=[0, 2], fn=lambda a: a.flip(-1)))
    assert torch.equal(got[..., [0, 2]], ACTS[..., [2, 0]])
    for wrong, said in ((lambda a: a[0], r"returned \[4, 1\]"), (lambda a: None, "NoneType")):
        with pytest.raises(ModelError, match=f"{said}.*activations of shape"):
            applied(Custom(features=1, fn=wrong))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Clamp(features=0, value="a"), "Clamp\\(value='a'\\) is not a number"),
        (lambda: Add(features=0, amount=True), "Add\\(amount=True\\) is not a number"),
        (lambda: Ablate(features=0, to=None), "Ablate\\(to=None\\) is not a number"),
        (lambda: Scale(features=0, factor=float("nan")), "Scale\\(factor=nan\\) is not finite"),
        (lambda: Add(features=0, amount=[1.0, float("inf")]), "is not finite"),
        (lambda: Custom(features=0, fn=3), "Custom\\(fn=3\\) is not a function"),
    ],
)
@pytest.mark.untyped
def test_what_is_not_an_amount_or_a_function_is_refused_at_once(make, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_a_function_that_makes_nan_is_named() -> None:
    with pytest.raises(
        ModelError, match="The function of Custom returned numbers that are not finite"
    ):
        applied(Custom(features=3, fn=lambda acts: acts * float("nan")))


def test_amounts_that_do_not_fit_are_an_error() -> None:
    with pytest.raises(EmptySelectionError, match=r"Clamp has amounts of shape \[3\].*one number"):
        applied(Clamp(features=[1, 4], value=[1.0, 2.0, 3.0]))


def test_an_edit_that_only_touches_excluded_tokens_is_an_error(hooked2) -> None:
    with (
        splice(hooked2, factories.residual(hooked2, 1), edits=Ablate(features=1, positions=0)) as s,
        pytest.raises(EmptySelectionError, match=r"Ablate\(positions=0\) touches excluded tokens"),
    ):
        s(TOKENS)


@pytest.mark.parametrize(
    ("positions", "said"),
    [
        (slice(25, 30), "selects no token"),
        ([], "selects no token"),
        (torch.zeros(20, dtype=torch.bool), "selects no token"),
        (
            torch.ones(7, dtype=torch.bool),
            r"mask of positions has shape \[1, 7\].*batch of 2 with 20",
        ),
        (torch.ones(20), "float32 is not a mask of positions"),
    ],
)
def test_positions_that_select_nothing_are_an_error(hooked2, positions, said: str) -> None:
    edit = forged(Ablate(features=1), positions=positions)
    with (
        splice(hooked2, factories.residual(hooked2, 1), edits=edit) as spliced,
        pytest.raises(EmptySelectionError, match=said),
    ):
        spliced(TOKENS)


@pytest.mark.parametrize("rows", [2, [-3], slice(5, 9)])
def test_rows_that_do_not_exist_are_an_error(hooked2, rows) -> None:
    with (
        splice(hooked2, factories.residual(hooked2, 1), edits=Ablate(features=1, rows=rows)) as s,
        pytest.raises(EmptySelectionError, match="rows.*(0 to 1|2 rows)"),
    ):
        s(TOKENS)


def test_an_unknown_ablation_is_an_error(hooked2) -> None:
    edit = forged(Ablate(features=1), to="meen")
    with (
        pytest.raises(UnknownNameError, match="'meen'.*zero, mean.*Did you mean 'mean'"),
        splice(hooked2, factories.residual(hooked2, 1), edits=edit),
    ):
        pass


@pytest.mark.parametrize("index", [-1, D_SAE, 10**9])
def test_a_feature_outside_the_dictionary_is_an_error(hooked2, index: int) -> None:
    edit = Ablate(features=[0, index])
    with (
        pytest.raises(FeatureIndexError) as raised,
        splice(hooked2, factories.residual(hooked2, 1), edits=edit),
    ):
        pass
    text = str(raised.value)
    assert f"Feature {index} does not exist" in text
    assert "blocks.1.hook_resid_post" in text
    assert f"features 0 to {D_SAE - 1}" in text


def test_an_edit_of_no_feature_is_an_error(hooked2) -> None:
    with (
        pytest.raises(EmptySelectionError, match="Ablate names no feature"),
        splice(hooked2, factories.residual(hooked2, 1), edits=Ablate(features=[])),
    ):
        pass


@pytest.mark.parametrize("positions", [20, -21, [0, 99]])
def test_a_position_outside_the_prompt_is_an_error(hooked2, positions) -> None:
    edit = Ablate(features=1, positions=positions)
    with (
        splice(hooked2, factories.residual(hooked2, 1), edits=edit) as spliced,
        pytest.raises(EmptySelectionError, match="outside the prompt.*positions 0 to 19"),
    ):
        spliced(TOKENS)


@pytest.mark.parametrize("named", [None, "blocks.2.hook_resid_post", object()])
def test_an_edit_must_fit_one_of_several_dictionaries(hooked2, named) -> None:
    saes = [factories.residual(hooked2, layer) for layer in (0, 1)]
    fits = 2 if named is None else 0
    with (
        pytest.raises(UnknownNameError, match=f"fits {fits} of the spliced dictionaries") as raised,
        splice(hooked2, saes, edits=Ablate(features=1, sae=named)),
    ):
        pass
    assert "'blocks.0.hook_resid_post', 'blocks.1.hook_resid_post'" in str(raised.value)


@pytest.mark.parametrize("feature", ["x", 1.5, None, -1, 96])
def test_a_feature_that_is_no_index_is_refused(feature: object) -> None:
    with pytest.raises(FeatureIndexError, match="does not exist.*There is: features 0 to 95"):
        check_feature(feature, 96, "blocks.1.hook_resid_post")


def test_a_spec_is_not_yet_a_dictionary(hooked2) -> None:
    with (
        pytest.raises(InputError, match=r"A dict is not a loaded dictionary.*load\(spec\)"),
        splice(hooked2, [{}]),
    ):
        pass


@torch.no_grad()
def test_an_edit_reads_nothing_but_its_own_columns_and_rows(hooked2) -> None:
    """All other parameters are poisoned: whoever read them would pass on NaN."""
    sae = copy.deepcopy(factories.residual(hooked2, 1))
    others = [i for i in range(D_SAE) if i not in FEATURES]
    edit = Scale(features=FEATURES, factor=3.0)
    with splice(hooked2, sae, edits=edit) as spliced:
        expected = spliced(TOKENS)
        sae.W_enc[:, others] = sae.W_dec[others] = torch.nan
        sae.b_enc[others] = sae.threshold[others] = torch.nan
        sae.b_dec[:] = torch.nan
        assert torch.equal(spliced(TOKENS), expected)
