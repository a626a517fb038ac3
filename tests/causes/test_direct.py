"""Direct contributions add up to the logit difference before the cap, piece by piece the right ones."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from gemmascope_plugin.causes import (
    Effects,
    Task,
    accumulated_logit_diff,
    direct_logit_attribution,
    logit_diff,
    probability,
)
from gemmascope_plugin.errors import ModelError, TaskError, UnknownNameError
from tests import factories
from tests.causes.tasks import CLEAN, RIGHT, TASK, WRONG
from tests.splice import cross_layer_cases
from tests.splice.gained_transcoders import folded
from tests.splice.reference import features
from tests.tiny_models import random_tokens

TEXTS = ["w9 w8 w7", "w30 w31 w32 w33 w34 w35", "w40"]
METRIC = logit_diff([10, 20, 30], ["w11", "w21", "w31"])
HEADS = [f"L{layer}H{h}" for layer in range(3) for h in range(4)]


def close(a: Any, b: Any, scale: float = 1.0) -> bool:
    return torch.allclose(torch.as_tensor(a), torch.as_tensor(b), atol=1e-5 * scale, rtol=1e-5)


def value(effects: Effects, label: str) -> float:
    return float(effects.values[effects.labels["component"].index(label)])


def sums(effects: Effects) -> bool:
    """Whether the pieces sum to the whole, to 1e-5 of their size."""
    size = float(effects.values.abs().sum())
    gap = abs(float(effects.values.sum()) - effects.metadata["metric_clean"])
    return gap < 1e-5 * size and effects.metadata["residual"] < 2e-5 * size


@torch.no_grad()
def before_cap(model: Any, tokens: torch.Tensor, right: int, wrong: int) -> float:
    logits = model.run_with_cache(tokens, names_filter=["unembed.hook_out"])[1]["unembed.hook_out"]
    return float(logits[0, -1, right] - logits[0, -1, wrong])


def gain(model: Any, norm: Any) -> torch.Tensor:
    return norm.w.detach() + float(getattr(model.cfg, "rmsnorm_uses_offset", False))


@torch.no_grad()
def slow(model: Any, *, post_norm: bool = True) -> dict[str, float]:
    """Every write of the run pushed through the frozen norms, mean over the prompts of the task."""
    cache = model.run_with_cache(CLEAN)[1]
    writes = {"embed": cache["hook_embed"]}
    for layer, block in enumerate(model.blocks):
        name = f"blocks.{layer}."
        writes[f"MLP{layer}"] = cache[f"{name}hook_mlp_out"]
        for head in range(4):
            r = cache[f"{name}attn.hook_z"][:, :, head] @ block.attn.W_O[head]
            scale = cache[f"{name}ln1_post.hook_scale"]
            writes[f"L{layer}H{head}"] = r / scale * gain(model, block.ln1_post) if post_norm else r
    scale = cache["ln_final.hook_scale"]
    direction = (model.W_U[:, RIGHT] - model.W_U[:, WRONG]).T * gain(model, model.ln_final)
    return {
        label: float(((write / scale)[:, -1] * direction).sum(-1).mean())
        for label, write in writes.items()
    }


def test_every_contribution_is_its_write_through_the_frozen_norms(model) -> None:
    effects = direct_logit_attribution(model, TASK, by="head")
    expected = slow(model)
    assert set(effects.labels["component"]) == set(expected)
    assert all(abs(value(effects, label) - want) < 1e-5 for label, want in expected.items())
    whole = [
        before_cap(model, row[None], r, w) for row, r, w in zip(CLEAN, RIGHT, WRONG, strict=True)
    ]
    assert close(effects.metadata["metric_clean"], sum(whole) / 2)
    assert sums(effects)
    # without the norm after attention they add up to something else
    naive = slow(model, post_norm=False)
    assert abs(sum(naive.values()) - sum(whole) / 2) > 0.01


def test_heads_of_a_layer_sum_to_its_attention(model) -> None:
    by_head = direct_logit_attribution(model, TASK, by="head")
    whole = direct_logit_attribution(model, TASK)
    assert sums(whole)
    for layer in range(3):
        heads = sum(value(by_head, f"L{layer}H{h}") for h in range(4))
        assert close(heads, value(whole, f"ATTN{layer}"))
        assert close(value(by_head, f"MLP{layer}"), value(whole, f"MLP{layer}"))


@torch.no_grad()
def test_transformer_lens_head_results_do_not_sum(model) -> None:
    tokens = CLEAN[:1]
    cache = model.run_with_cache(tokens)[1]
    results = cache.stack_head_results(layer=-1, pos_slice=-1)
    naive = cache.logit_attrs(
        results, tokens=RIGHT[0], incorrect_tokens=WRONG[0], pos_slice=-1, has_batch_dim=True
    )
    effects = direct_logit_attribution(model, tokens, metric=logit_diff(RIGHT[:1], WRONG[:1]))
    naive_sum = float(naive.sum()) + sum(
        value(effects, label) for label in effects.labels["component"] if "ATTN" not in label
    )
    assert sums(effects)
    assert abs(naive_sum - effects.metadata["metric_clean"]) > 0.05


def test_prompts_of_several_lengths_each_at_its_own_end(hooked2) -> None:
    effects = direct_logit_attribution(hooked2, TEXTS, by="head", metric=METRIC, batch_size=2)
    whole = 0.0
    for text, right, wrong in zip(TEXTS, (10, 20, 30), (11, 21, 31), strict=True):
        ids = torch.tensor([[2, *(int(word[1:]) for word in text.split())]])
        whole += before_cap(hooked2, ids, right, wrong) / 3
    assert close(effects.metadata["metric_clean"], whole)
    assert sums(effects)
    single = [
        direct_logit_attribution(hooked2, text, by="head", metric=logit_diff([r], [w])).values
        for text, r, w in zip(TEXTS, (10, 20, 30), (11, 21, 31), strict=True)
    ]
    assert close(effects.values, torch.stack(single).mean(0))
    assert effects.values_by_prompt is not None
    assert close(effects.values_by_prompt.T, torch.stack(single))


def test_sets_of_answers_count_with_their_mean(hooked2) -> None:
    sets = direct_logit_attribution(hooked2, "w9 w8", metric=logit_diff([[10, 20]], [[30]]))
    pairs = [
        direct_logit_attribution(hooked2, "w9 w8", metric=logit_diff([right], [30]))
        for right in (10, 20)
    ]
    assert close(sets.values, (pairs[0].values + pairs[1].values) / 2)
    assert sets.metadata["metric"] == "difference of mean logits"
    assert sets.metadata["answers"] == "'w10' (10), 'w20' (20) against 'w30' (30)"
    assert pairs[0].metadata["answers"] == "'w10' (10) against 'w30' (30)"
    assert "first prompt 'w10' (10) against 'w30' (30), metric" in repr(pairs[0])


@torch.no_grad()
def test_the_capped_difference_is_stated_beside_it(model) -> None:
    effects = direct_logit_attribution(model, CLEAN[:1], metric=logit_diff(RIGHT[:1], WRONG[:1]))
    logits = model(CLEAN[:1])[0, -1]
    capped = float(logits[RIGHT[0]] - logits[WRONG[0]])
    meta = effects.metadata
    assert close(meta["capped"], capped)
    assert close(meta["cap_slope"] * meta["metric_clean"], capped)
    assert meta["logits"] == "before the final soft-cap"
    if meta["soft_cap"] is None:
        assert close(meta["cap_slope"], 1.0)
    else:
        assert 0 < meta["cap_slope"] < 1


def test_folded_models(model) -> None:
    after, before = (direct_logit_attribution(m, TASK, by="head") for m in (folded(model), model))
    assert sums(after)
    assert torch.allclose(after.values, before.values, atol=1e-4)


def test_in_half_precision_the_sum_is_as_exact_as_the_model(hooked2) -> None:
    half = copy.deepcopy(hooked2).to(torch.bfloat16)
    rough = direct_logit_attribution(half, TASK, by="head")
    fine = direct_logit_attribution(hooked2, TASK, by="head")
    assert torch.allclose(rough.values, fine.values, atol=0.02)
    assert rough.metadata["residual"] < 0.03


def test_biases_are_contributions_of_their_own(hooked2) -> None:
    biased = copy.deepcopy(hooked2)
    generator = torch.Generator().manual_seed(0)
    for bias in (biased.unembed.b_U, biased.blocks[1].attn.b_O):
        bias.data = torch.randn(bias.shape, generator=generator) * 0.3
    effects = direct_logit_attribution(biased, TASK, by="head")
    labels = effects.labels["component"]
    assert {label for label in labels if label.startswith("b_")} == {"b_O1", "b_U"}
    b_U = biased.unembed.b_U
    assert close(value(effects, "b_U"), float((b_U[RIGHT] - b_U[WRONG]).mean()))
    assert sums(effects)
    assert sums(direct_logit_attribution(biased, TASK))


def test_features_error_and_bias_sum_to_what_they_replace(model) -> None:
    saes = [
        factories.mlp(model, 0, seed=3),
        factories.attention(model, 1, seed=2),
        factories.transcoder(model, 2, seed=4),
    ]
    split = direct_logit_attribution(model, TASK, by="feature", saes=saes)
    whole = direct_logit_attribution(model, TASK, by="head")
    assert sums(split)
    for site, replaced in (
        ("blocks.0.hook_mlp_out", ["MLP0"]),
        ("blocks.1.attn.hook_z", HEADS[4:8]),
        ("blocks.2.hook_mlp_out", ["MLP2"]),
    ):
        labels = [label for label in split.labels["component"] if label.startswith(site)]
        assert {f"{site} error", f"{site} b_dec"} <= set(labels)
        assert len(labels) > 2  # some features are active
        assert close(sum(value(split, x) for x in labels), sum(value(whole, x) for x in replaced))
        assert not set(replaced) & set(split.labels["component"])


@torch.no_grad()
def test_a_feature_adds_its_decoder_row(model) -> None:
    """Of an attention SAE through every head and the frozen norm; of a transcoder directly."""
    attention, transcoder = factories.attention(model, 1, seed=2), factories.transcoder(model, 2)
    split = direct_logit_attribution(model, TASK, by="feature", saes=[attention, transcoder])
    cache = model.run_with_cache(CLEAN)[1]
    direction = (model.W_U[:, RIGHT] - model.W_U[:, WRONG]).T * gain(model, model.ln_final)
    direction = direction / cache["ln_final.hook_scale"][:, -1]
    z, x = cache["blocks.1.attn.hook_z"].flatten(2), cache["blocks.2.ln2.hook_normalized"]
    block = model.blocks[1]
    through = torch.einsum("fhd,hdm->fm", attention.W_dec.unflatten(1, (4, -1)), block.attn.W_O)
    scale = cache["blocks.1.ln1_post.hook_scale"][:, -1]
    writes = {
        "blocks.1.attn.hook_z": (
            features(attention, z),
            through * gain(model, block.ln1_post),
            scale,
        ),
        "blocks.2.hook_mlp_out": (features(transcoder, x), transcoder.W_dec, torch.ones(2, 1)),
    }
    for site, (acts, rows, scale) in writes.items():
        expected = (acts[:, -1] / scale * (direction @ rows.T)).mean(0)
        active = acts[:, -1].any(0).nonzero()[:, 0].tolist()
        assert active
        assert all(abs(value(split, f"{site}/{f}") - float(expected[f])) < 1e-5 for f in active)


def test_a_dictionary_of_the_stream_replaces_what_lies_before_it(model) -> None:
    sae = factories.residual(model, 1)
    split = direct_logit_attribution(model, TASK, by="feature", saes=[sae])
    components = [c for c in split.labels["component"] if not c.startswith("blocks.1.")]
    assert components == [*HEADS[8:], "MLP2"]
    assert sums(split)


def test_cross_layer_features_add_up_over_their_outputs(model, hf) -> None:
    code = cross_layer_cases.made("clt", model, hf)
    split = direct_logit_attribution(model, TASK, by="feature", saes=code)
    assert sums(split)
    assert not [label for label in split.labels["component"] if label.startswith("MLP")]
    whole = direct_logit_attribution(model, TASK, by="head")
    mlps = sum(value(whole, f"MLP{layer}") for layer in range(3))
    labels = [label for label in split.labels["component"] if label.startswith("blocks.")]
    assert close(sum(value(split, label) for label in labels), mlps)


def test_what_would_be_counted_twice_is_refused(hooked2) -> None:
    pairs = [
        [factories.mlp(hooked2, 1), factories.residual(hooked2, 1)],
        [factories.residual(hooked2, 0), factories.residual(hooked2, 1)],
        [factories.mlp(hooked2, 1), factories.transcoder(hooked2, 1)],
    ]
    for saes in pairs:
        with pytest.raises(ModelError, match="decompose the same part.*one of the two"):
            direct_logit_attribution(hooked2, TASK, by="feature", saes=saes)
    assert factories.n_hooks(hooked2) == 0


def test_mistakes(hooked2) -> None:
    with pytest.raises(TaskError, match="No metric was given.*metric=logit_diff"):
        direct_logit_attribution(hooked2, "w9 w8")
    with pytest.raises(TaskError, match="only a difference of logits"):
        direct_logit_attribution(hooked2, Task(CLEAN, CLEAN.flip(0), probability(RIGHT)))
    with pytest.raises(UnknownNameError, match="Unknown by 'heads'.*Did you mean 'head'"):
        factories.unchecked(direct_logit_attribution)(hooked2, TASK, by="heads")
    with pytest.raises(UnknownNameError, match="no part in by='head'.*by=\"feature\""):
        direct_logit_attribution(hooked2, TASK, by="head", saes=[factories.mlp(hooked2, 0)])
    with pytest.raises(UnknownNameError, match="needs dictionaries"):
        direct_logit_attribution(hooked2, TASK, by="feature")


def test_the_accumulated_difference_grows_by_the_direct_contributions(model) -> None:
    stream = accumulated_logit_diff(model, TASK, scale="final")
    whole = direct_logit_attribution(model, TASK)
    assert close(stream.values[0, 0], value(whole, "embed"))
    for layer in range(3):
        pre, mid, post = stream.values[layer].tolist()
        assert close(mid - pre, value(whole, f"ATTN{layer}"))
        assert close(post - mid, value(whole, f"MLP{layer}"))
    assert close(stream.values[2, 2], whole.metadata["metric_clean"])
    assert stream.metadata["residual"] < 1e-5


@torch.no_grad()
def test_each_stream_by_its_own_scale(model) -> None:
    stream = accumulated_logit_diff(model, TASK)
    x = model.run_with_cache(CLEAN)[1]["blocks.1.hook_resid_mid"][:, -1]
    scale = (x.pow(2).mean(-1, keepdim=True) + model.cfg.eps).sqrt()
    logits = x / scale * gain(model, model.ln_final) @ model.W_U
    expected = [float(row[r] - row[w]) for row, r, w in zip(logits, RIGHT, WRONG, strict=True)]
    assert close(stream.values[1, 1], sum(expected) / 2)
    assert stream.plot().data[0].type == "heatmap"
    with pytest.raises(UnknownNameError, match="Unknown scale 'last'"):
        factories.unchecked(accumulated_logit_diff)(model, TASK, scale="last")


def test_a_table_has_shares_of_the_whole(hooked2) -> None:
    effects = direct_logit_attribution(hooked2, random_tokens(1, 6), metric=logit_diff([9], [8]))
    frame = effects.to_frame()
    assert list(frame.columns) == ["component", "effect", "share"]
    assert abs(frame["share"].sum() - 1) < 1e-4
    assert effects.plot().data[0].type == "bar"
