"""Steering: what is added, what the report measures against slow references, options, sweeps, errors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from gemmascope_plugin.demo import tiny
from gemmascope_plugin.errors import (
    EmptySelectionError,
    FeatureIndexError,
    GemmaScopeError,
    UnknownNameError,
)
from gemmascope_plugin.models import to_tokens
from gemmascope_plugin.models.readout import OfLogits
from gemmascope_plugin.saes.cross_layer import CrossCoder, CrossLayerConfig
from gemmascope_plugin.splice import (
    Add,
    HookedSAE,
    Steering,
    SteeringError,
    SteeringSweep,
    splice,
    steer,
)
from gemmascope_plugin.splice.sampling import Sampling
from gemmascope_plugin.splice.steering_report import Method
from gemmascope_plugin.splice.steering_run import compare_next
from tests import factories
from tests.factories import n_hooks, tiny_model, unchecked
from tests.support.rounding import TINY

PROMPT = "w5 w6 w7"
KEYS = "today the keys near the cabinet"
FEATURE = 3
STRENGTH = 8.0
LAYER = 1
Bundled = tuple[Any, Any, int]
"""Model, dictionary, feature."""


@pytest.fixture(scope="module")
def singular() -> Bundled:
    """The bundled model, its dictionary of layer 2 and the feature of singular verbs."""
    suite = tiny()
    sae = suite.load("res", 2)
    return suite.model, sae, suite.feature(sae, "next_is_singular_verb")


def same(steering: Steering, other: Steering) -> bool:
    """Equal in everything that is measured, up to rounding."""
    plain = ("before", "after", "strength", "method", "site", "exclude", "tokens", "ids_after")
    is_equal = all(getattr(steering, name) == getattr(other, name) for name in plain)
    return is_equal and torch.allclose(steering.kl, other.kl, atol=TINY)


def pushed_logits(
    model: Any, tokens: torch.Tensor, direction: torch.Tensor, keep: torch.Tensor
) -> torch.Tensor:
    """Logits with the direction added by a plain hook of the model's own."""

    def add(y: torch.Tensor, hook: Any) -> torch.Tensor:
        return y + keep[None, :, None] * direction

    name = f"blocks.{LAYER}.hook_resid_post"
    with torch.no_grad():
        return model.run_with_hooks(tokens, fwd_hooks=[(name, add)])


# --------------------------------------------------------------------------- the report
@torch.no_grad()
def test_divergence_is_that_of_a_slow_reference(model) -> None:
    sae = factories.residual(model, LAYER)
    result = steer(model, sae, FEATURE, STRENGTH, PROMPT, max_new_tokens=5)
    text = torch.tensor([[*to_tokens(model, PROMPT)[0].tolist(), *result.ids_before]])
    keep = torch.arange(text.shape[1]) > 0  # BOS is excluded
    direction = STRENGTH * sae.W_dec[FEATURE]
    steered = pushed_logits(model, text, direction, keep)[0].double().numpy()
    bare = model(text)[0].double().numpy()

    assert result.kl.shape == (text.shape[1],)
    assert result.is_kept.tolist() == result.steered.tolist() == keep.tolist()
    frame = result.to_frame()
    for i, row in enumerate(frame.itertuples()):
        p, q = (np.exp(x[i] - x[i].max()) for x in (bare, steered))
        p, q = p / p.sum(), q / q.sum()
        by_hand = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        assert row.kl == pytest.approx(by_hand, abs=2e-5)
        assert row.p_before == pytest.approx(p.max(), abs=1e-5)
        assert row.p_after == pytest.approx(q[p.argmax()], abs=1e-5)
        assert row.p_top_after == pytest.approx(q.max(), abs=1e-5)
        assert row.top_before == model.tokenizer.decode([int(p.argmax())])
        assert row.top_after == model.tokenizer.decode([int(q.argmax())])
    assert frame["kl"].max() > 0.01
    assert result.kl[0] == 0
    assert result.mean_kl == pytest.approx(frame["kl"][1:].mean())
    assert result.max_kl == frame["kl"].max() == frame["kl"][result.max_kl_pos]


@torch.no_grad()
def test_relative_push_is_the_mean_ratio_of_lengths(model) -> None:
    sae = factories.residual(model, LAYER)
    result = steer(model, sae, FEATURE, -STRENGTH, PROMPT, max_new_tokens=2)
    text = torch.tensor([[*to_tokens(model, PROMPT)[0].tolist(), *result.ids_before]])
    y = factories.activations(model, text, f"blocks.{LAYER}.hook_resid_post")[0, 1:]
    ratio = STRENGTH * sae.W_dec[FEATURE].norm() / y.norm(dim=-1)
    assert result.relative_push == pytest.approx(float(ratio.mean()), rel=1e-5)
    direction = sae.W_dec[FEATURE] / sae.W_dec[FEATURE].norm()
    project = steer(model, sae, FEATURE, 3.0, PROMPT, method="orthogonal", max_new_tokens=2)
    ratio = 2 * (y @ direction).abs() / y.norm(dim=-1)
    assert project.relative_push == pytest.approx(float(ratio.mean()), rel=1e-5)


def test_compared_are_the_distributions_in_float32(hooked2) -> None:
    generator = torch.Generator().manual_seed(0)
    before, after = torch.randn(2, 21, 256, generator=generator).to(torch.bfloat16)
    result = compare_next(hooked2, OfLogits.of(before), OfLogits.of(after))
    p, q = before.float().log_softmax(-1), after.float().log_softmax(-1)
    whole = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    assert result.kl.dtype == torch.float32
    assert torch.allclose(result.kl, whole, atol=TINY)
    assert float(compare_next(hooked2, OfLogits.of(before), OfLogits.of(before)).kl.max()) == 0


def test_first_difference_and_the_tokens_that_changed(singular: Bundled) -> None:
    result = steer(*singular, 16.0, KEYS, max_new_tokens=3)
    assert result.prompt + result.before == f"{KEYS} are quiet ."
    assert result.prompt + result.after == f"{KEYS} is clean ."
    assert (result.first_difference, result.tokens[7]) == (7, "are")
    assert result.tokens_changed == 2
    nothing = steer(*singular, 0.0, KEYS, max_new_tokens=3)
    assert nothing.first_difference is None
    assert (nothing.tokens_changed, nothing.max_kl, nothing.relative_push) == (0, 0.0, 0.0)


def test_special_tokens_at_the_end_are_no_text(hooked2, monkeypatch) -> None:
    class Ends:
        """A model that ends every text after two words."""

        def __call__(self, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
            new = torch.tensor([[9, 10, hooked2.tokenizer.eos_token_id]])
            return torch.cat([tokens, new], dim=1)

    monkeypatch.setattr(hooked2, "generate", Ends())
    result = steer(hooked2, factories.residual(hooked2, LAYER), FEATURE, STRENGTH, PROMPT)
    assert result.ids_before == result.ids_after == (9, 10)
    assert "eos" not in result.before
    assert len(result.tokens) == 6


def test_a_text_that_ends_at_once_is_said_to(hooked2, monkeypatch) -> None:
    end = torch.tensor([[hooked2.tokenizer.eos_token_id]])
    monkeypatch.setattr(hooked2, "generate", lambda t, **_: torch.cat([t, end], 1))
    sae = factories.residual(hooked2, LAYER)
    result = steer(hooked2, sae, FEATURE, STRENGTH, PROMPT, positions=slice(4, None))
    assert (result.before, len(result.tokens), result.max_kl) == ("", 4, 0.0)
    assert math.isnan(result.relative_push)  # only generated tokens were to be steered
    assert "before: (the text ends)" in repr(result)
    assert "(the text ends)" in result._repr_html_()


def test_steering_is_described(hooked2) -> None:
    before = n_hooks(hooked2)
    result = steer(hooked2, factories.residual(hooked2, 1), 3, 8.0, "w5 w6", max_new_tokens=3)
    lines = repr(result).splitlines()
    assert lines[0] == (
        "Steering(blocks.1.hook_resid_post feature 3, add, strength 8, excluded bos, eos, pad)"
    )
    assert [line[:10] for line in lines[1:]] == [
        *("  prompt: ", "  before: ", "  after:  ", "  KL:     ")
    ]
    assert "position" in lines[-1] and "push" in lines[-1]
    assert len(result.after.split()) == 3
    assert n_hooks(hooked2) == before


def test_report_as_figure_and_page(singular: Bundled) -> None:
    result = steer(*singular, 16.0, f"{KEYS} <unk>", max_new_tokens=3)
    figure = result.plot()
    assert list(figure.data[0].y) == result.kl.tolist()
    assert figure.layout.xaxis.ticktext[:2] == ("&lt;bos&gt;", "today")
    page = result._repr_html_()
    assert "<unk>" not in page and "&lt;unk&gt;" in page
    assert result.after in page and "strength 16" in page


# --------------------------------------------------------------------------- what is added
def test_strength_zero_changes_nothing(model) -> None:
    result = steer(model, factories.residual(model, LAYER), 3, 0.0, PROMPT, max_new_tokens=5)
    assert result.after == result.before


def test_both_classes_steer_alike() -> None:
    sae = factories.residual(tiny_model("gemma2", "hooked"), LAYER)
    cases: tuple[tuple[Method, float], ...] = (("add", 8.0), ("orthogonal", 20.0))
    for method, strength in cases:
        hooked, bridge = (
            steer(model, sae, 3, strength, PROMPT, method=method, max_new_tokens=6)
            for model in (tiny_model("gemma2", "hooked"), tiny_model("gemma2", "bridge"))
        )
        assert same(hooked, bridge)
        assert hooked.max_kl > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("positions", [None, slice(2, -1), slice(3, None), -1, [1, 5]])
def test_continuation_is_the_one_without_a_cache(model, positions) -> None:
    sae = factories.residual(model, LAYER)
    result = steer(model, sae, FEATURE, STRENGTH, PROMPT, max_new_tokens=4, positions=positions)
    prompt = to_tokens(model, PROMPT)
    chosen = {
        "None": range(1, 8),
        "slice(2, -1, None)": [2],
        "slice(3, None, None)": range(3, 8),
        "-1": [3],
        "[1, 5]": [1, 5],
    }[str(positions)]
    by_hand = prompt
    for _ in range(4):
        keep = torch.tensor([i in chosen for i in range(by_hand.shape[1])])
        logits = pushed_logits(model, by_hand, STRENGTH * sae.W_dec[FEATURE], keep)
        by_hand = torch.cat([by_hand, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert result.ids_after == tuple(by_hand[0, prompt.shape[1] :].tolist())
    # teacher-forced, positions mean what they mean in the generation
    assert result.steered.tolist() == [i in chosen for i in range(len(result.tokens))]
    text = torch.tensor([[*prompt[0].tolist(), *result.ids_before]])
    steered = pushed_logits(model, text, STRENGTH * sae.W_dec[FEATURE], result.steered)
    assert torch.allclose(
        result.kl, compare_next(model, OfLogits(model(text)[0]), OfLogits(steered[0])).kl, atol=TINY
    )


@torch.no_grad()
@pytest.mark.parametrize("factor", [0.0, -2.0, 5.0])
def test_orthogonal_is_a_projection(model, factor: float) -> None:
    sae = factories.residual(model, LAYER)
    result = steer(model, sae, FEATURE, factor, PROMPT, method="orthogonal", max_new_tokens=4)
    text = torch.tensor([[*to_tokens(model, PROMPT)[0].tolist(), *result.ids_before]])
    d = sae.W_dec[FEATURE].double().numpy()
    projection = np.outer(d, d) / (d @ d)
    complement = np.eye(len(d)) - projection

    def project(y: torch.Tensor, hook: Any) -> torch.Tensor:
        new = torch.from_numpy(y.double().numpy() @ (complement + factor * projection)).to(y)
        return torch.cat([y[:, :1], new[:, 1:]], dim=1)

    logits = model.run_with_hooks(text, fwd_hooks=[(f"blocks.{LAYER}.hook_resid_post", project)])
    expected = compare_next(model, OfLogits(model(text)[0]), OfLogits(logits[0]))
    assert torch.allclose(result.kl, expected.kl, atol=1e-5)
    assert expected.kl.max() > 1e-5


def test_orthogonal_with_factor_one_changes_nothing(model) -> None:
    sae = factories.residual(model, LAYER)
    result = steer(model, sae, FEATURE, 1.0, PROMPT, method="orthogonal", max_new_tokens=4)
    assert (result.tokens_changed, result.max_kl, result.relative_push) == (0, 0.0, 0.0)


@pytest.mark.parametrize("make", [factories.transcoder, factories.attention])
def test_transcoders_and_attention_steer_at_their_output(model, make) -> None:
    sae = make(model, LAYER)
    result = steer(model, sae, FEATURE, 30.0, PROMPT, max_new_tokens=3)
    assert result.site == (sae.cfg.metadata.hook_name_out or sae.cfg.metadata.hook_name)
    assert result.max_kl > 0
    (run,) = steer(model, {"the only one": sae}, FEATURE, [30.0], PROMPT, max_new_tokens=3)
    assert same(result, run)


def test_options_of_a_hooked_sae_are_its_own(hooked2) -> None:
    sae = factories.residual(hooked2, LAYER)
    hooked = HookedSAE(sae, exclude=(), positions=slice(-2, None))
    result = steer(hooked2, hooked, FEATURE, STRENGTH, PROMPT, max_new_tokens=3)
    assert result.exclude == ()
    assert result.steered.tolist() == [False, False, True, True, True, True, True]
    narrowed = steer(hooked2, hooked, FEATURE, STRENGTH, PROMPT, positions=[0, 2], max_new_tokens=3)
    assert narrowed.steered.nonzero().flatten().tolist() == [2]
    everywhere = steer(hooked2, sae, FEATURE, STRENGTH, PROMPT, exclude=(), max_new_tokens=3)
    assert everywhere.steered.all() and everywhere.kl[0] > 0


@torch.no_grad()
def test_without_the_error_both_sides_see_the_reconstruction(hooked2) -> None:
    sae = factories.residual(hooked2, LAYER)
    dropped = HookedSAE(sae, error="drop")
    result = steer(hooked2, dropped, FEATURE, 0.0, PROMPT, max_new_tokens=4)
    assert result.max_kl == 0
    with splice(hooked2, dropped) as spliced:
        ids = spliced.generate(to_tokens(hooked2, PROMPT), max_new_tokens=4, do_sample=False)
    assert result.ids_before == tuple(ids[0, 4:].tolist())


# --------------------------------------------------------------------------- sampling
def test_sampling_is_reproducible_and_leaves_the_random_state(model) -> None:
    sae = factories.residual(model, LAYER)
    state = torch.get_rng_state()
    first, again, other = (
        steer(model, sae, 3, 4.0, "w5 w6", max_new_tokens=8, temperature=1.0, seed=seed)
        for seed in (1, 1, 2)
    )
    assert same(first, again)
    assert first.before != other.before
    assert torch.equal(torch.get_rng_state(), state)


def test_the_same_seed_on_both_sides(model) -> None:
    sae = factories.residual(model, LAYER)
    result = steer(model, sae, 3, 0.0, PROMPT, max_new_tokens=8, temperature=1.0, seed=3)
    assert result.after == result.before


def test_sampling_options_reach_the_model(model) -> None:
    sae = factories.residual(model, LAYER)

    def drawn(**options: Any) -> Steering:
        return steer(model, sae, FEATURE, STRENGTH, PROMPT, max_new_tokens=12, **options)

    greedy = drawn()
    free = drawn(temperature=1.5)
    assert free.after != greedy.after
    assert drawn(temperature=1.5, top_k=1).after == greedy.after
    assert drawn(temperature=1.5, top_p=1e-6).after == greedy.after
    assert drawn(temperature=1e-4).after == greedy.after
    penalised = drawn(temperature=1e-3, freq_penalty=1e4)
    ids = [*to_tokens(model, PROMPT)[0].tolist(), *penalised.ids_after]
    assert len(set(ids)) == len(ids)


# --------------------------------------------------------------------------- sweeps
def test_a_sweep_is_its_separate_runs(model, monkeypatch) -> None:
    sae = factories.residual(model, LAYER)
    strengths = [8.0, -4.0, 0.0]
    options: dict[str, Any] = {"max_new_tokens": 5, "temperature": 0.8, "seed": 4}
    alone = [steer(model, sae, FEATURE, s, PROMPT, **options) for s in strengths]
    generate, calls = model.generate, []
    monkeypatch.setattr(model, "generate", lambda *a, **k: calls.append(k) or generate(*a, **k))
    sweep = steer(model, sae, FEATURE, (s for s in strengths), PROMPT, **options)
    assert len(calls) == 1 + len(strengths)
    assert isinstance(sweep, SteeringSweep)
    assert all(same(run, other) for run, other in zip(sweep, alone, strict=True))
    assert sweep[1:] == (sweep[1], sweep[2])
    frame = sweep.to_frame()
    assert frame["strength"].tolist() == strengths
    assert frame["text"].tolist() == [run.after for run in alone]
    assert frame["mean_kl"].tolist() == [run.mean_kl for run in alone]
    assert frame["relative_push"].tolist() == [run.relative_push for run in alone]
    assert frame["tokens_changed"].tolist()[-1] == 0


def test_one_strength_in_a_list_is_a_sweep(hooked2) -> None:
    sae = factories.residual(hooked2, LAYER)
    sweep = steer(hooked2, sae, FEATURE, np.linspace(1.0, 2.0, 2), PROMPT, max_new_tokens=1)
    assert [run.strength for run in sweep] == [1.0, 2.0]
    assert len(steer(hooked2, sae, FEATURE, [1.0], PROMPT, max_new_tokens=1)) == 1


def test_a_sweep_is_described(singular: Bundled) -> None:
    sweep = steer(*singular, [16.0, 0.0], KEYS, max_new_tokens=3)
    lines = repr(sweep).splitlines()
    assert lines[:3] == [
        "SteeringSweep(blocks.2.hook_resid_post feature 280, add, excluded bos, eos, pad, 2 strengths)",
        f"  prompt: {KEYS}",
        "  before: are quiet .",
    ]
    assert lines[3].startswith("  16: is clean .  (KL mean ")
    assert lines[4] == "  0: are quiet .  (KL mean 0, max 0; push 0; 0 tokens changed)"
    (line,) = sweep.plot().data
    assert list(line.x) == [0.0, 16.0]
    assert list(line.y) == [0.0, sweep[0].mean_kl]
    assert "is clean" in sweep._repr_html_()


# --------------------------------------------------------------------------- errors
def test_errors_of_feature_prompt_and_method(hooked2) -> None:
    sae = factories.residual(hooked2, LAYER)
    with pytest.raises(FeatureIndexError, match="Feature 96 does not exist"):
        steer(hooked2, sae, 96, 1.0, PROMPT)
    with pytest.raises(EmptySelectionError, match="The prompt is empty"):
        steer(hooked2, sae, 1, 1.0, "")
    with pytest.raises(UnknownNameError, match=r"'orthogonl'.*add, orthogonal.*mean 'orthogonal'"):
        unchecked(steer)(hooked2, sae, 1, 1.0, PROMPT, method="orthogonl")


@pytest.mark.parametrize(
    ("strength", "message"),
    [
        (math.nan, "strength=nan is not a finite number"),
        ([1.0, math.inf], "strength=inf is not a finite number"),
        ("16", "strength='16' is not a finite number"),
        (None, "strength=None is not a finite number"),
        ([], "No strength was given"),
    ],
)
def test_errors_of_strength(hooked2, strength: Any, message: str) -> None:
    with pytest.raises(GemmaScopeError, match=message):
        unchecked(steer)(hooked2, factories.residual(hooked2, LAYER), 1, strength, PROMPT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.5}, r"temperature=-0.5 is out of range. There is: 0 for the most"),
        ({"temperature": math.nan}, "temperature=nan is out of range"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 is out of range. There is: whole numbers from 1"),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0 is out of range"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p=0.0 is out of range.*up to 1"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p=1.5 is out of range"),
        ({"temperature": 1.0, "freq_penalty": -1.0}, "freq_penalty=-1.0 is out of range"),
        (
            {"temperature": 1.0, "top_k": 5, "top_p": 0.9},
            "top_k=5 and top_p=0.9 exclude each other",
        ),
        ({"top_k": 5}, r"top_k=5 has no effect at temperature 0.*Try: temperature=1.0"),
        ({"top_p": 0.9}, "top_p=0.9 has no effect"),
        ({"freq_penalty": 0.5}, "freq_penalty=0.5 has no effect"),
    ],
)
def test_errors_of_sampling(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SteeringError, match=message):
        Sampling(**options)


def test_errors_of_the_choice_of_tokens(hooked2) -> None:
    sae = factories.residual(hooked2, LAYER)
    with pytest.raises(SteeringError, match=r"beside a HookedSAE.*There is: exclude=\('bos',\)"):
        steer(hooked2, HookedSAE(sae, exclude="bos"), 1, 1.0, PROMPT, exclude=())
    with pytest.raises(EmptySelectionError, match="Nothing would be steered"):
        steer(hooked2, sae, 1, 1.0, PROMPT, positions=0)
    with pytest.raises(EmptySelectionError, match=r"\[24\] lie outside .* 0 to 23"):
        steer(hooked2, sae, 1, 1.0, PROMPT, positions=24)
    with pytest.raises(UnknownNameError, match="Unknown special token 'boss'"):
        steer(hooked2, sae, 1, 1.0, PROMPT, exclude="boss")


def test_one_dictionary_of_one_layer(hooked2) -> None:
    saes = factories.four_dictionaries(hooked2)
    with pytest.raises(SteeringError, match="takes one dictionary, got 4"):
        steer(hooked2, saes, 1, 1.0, PROMPT)
    hooks = tuple(f"blocks.{layer}.hook_resid_post" for layer in (0, 1))
    config = CrossLayerConfig(
        kind="crosscoder",
        layers=(0, 1),
        hooks_in=hooks,
        hooks_out=hooks,
        d_in=32,
        d_out=32,
        d_sae=(4, 4),
    )
    with pytest.raises(SteeringError, match=r"of one layer, this one has 2.*layer=\.\.\."):
        steer(hooked2, CrossCoder(config, lambda i: pytest.fail("opened")), 1, 1.0, PROMPT)


def test_the_edit_of_a_splice_does_the_same(singular: Bundled) -> None:
    model, sae, feature = singular
    with splice(model, sae, edits=Add(features=feature, amount=16.0)) as spliced:
        ids = spliced.generate(KEYS, max_new_tokens=3, do_sample=False)
    assert steer(*singular, 16.0, KEYS, max_new_tokens=3).ids_after == tuple(ids[0, -3:].tolist())
