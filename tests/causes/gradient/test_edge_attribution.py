"""Edge attribution: its identities, equal to exact patching to first order, right through post-norms."""

from __future__ import annotations

import copy

import pytest
import torch

from gemmascope_plugin.causes import (
    Task,
    attribution_patching,
    custom,
    edge_attribution,
    kl_divergence,
    logit_diff,
)
from gemmascope_plugin.causes.exact.edge_patching import edge_patching
from gemmascope_plugin.causes.replace import Writes, head_deltas
from gemmascope_plugin.errors import TaskError, UnknownNameError
from gemmascope_plugin.models.anatomy import Anatomy
from gemmascope_plugin.models.arithmetic import Arithmetic
from gemmascope_plugin.models.gradients import gradients_of
from gemmascope_plugin.models.load_model import bridge_from_hf, hooked_from_hf
from tests.causes.tasks import CLEAN, CORRUPT, LATE, RIGHT, TASK, WRONG
from tests.factories import n_hooks, tiny_hf, tiny_model, tiny_tokenizer, unchecked
from tests.ground_truth.cases import CASES
from tests.support.rounding import TINY
from tests.tiny_models import random_tokens

DIRECTIONS = pytest.mark.parametrize("direction", ["noising", "denoising"])


def largest(x: torch.Tensor) -> float:
    return float(x.abs().max())


@DIRECTIONS
def test_edges_of_a_writer_sum_to_its_node_score(model, direction: str) -> None:
    effects = edge_attribution(
        model, TASK, method="eap", direction=direction, writer_delta="jacobian"
    )
    nodes = effects.writer_effects()
    heads = attribution_patching(model, TASK, "z", direction=direction).values
    mlps = attribution_patching(
        model, TASK, "mlp_out", direction=direction, per_position=False
    ).values
    embed = attribution_patching(
        model, TASK, "resid_pre", direction=direction, per_position=False
    ).values
    for layer in range(3):
        assert largest(nodes[effects.edges.heads(layer)] - heads[layer]) < 1e-5 * largest(heads)
        assert float(nodes[effects.edges.mlp(layer)]) == pytest.approx(float(mlps[layer]), abs=TINY)
    assert float(nodes[0]) == pytest.approx(float(embed[0]), abs=1e-5)
    naive = edge_attribution(model, TASK, method="eap", direction=direction, writer_delta="naive")
    off = naive.writer_effects()[effects.edges.heads(0)] - heads[0]
    assert largest(off) > 0.05 * largest(heads)  # without the norm the identity fails


def test_exact_deltas_sum_to_what_the_layer_would_write(model) -> None:
    effects = edge_attribution(model, TASK, method="eap")
    bound, anatomy = TASK.bind(model), Anatomy(model)
    base, other = (Writes.read(model, tokens, 3) for tokens in (CLEAN, CORRUPT))
    names = [f"blocks.{layer}.hook_attn_out" for layer in range(3)]
    slopes = gradients_of(model, lambda: bound.measure(model, CLEAN).mean(), names)
    for layer, name in enumerate(names):
        moved = head_deltas(anatomy, layer, base.z[layer], other.z[layer] - base.z[layer])
        expected = torch.einsum("bshd,bsd->h", moved, slopes[name])
        got = effects.writer_effects()[effects.edges.heads(layer)]
        assert torch.allclose(got, expected, atol=TINY)


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_both_classes_agree(family: str) -> None:
    for options in ({"method": "eap"}, {"method": "eap-ig", "steps": 3}):
        hooked, bridge = (
            edge_attribution(tiny_model(family, backend), TASK, **options).values
            for backend in ("hooked", "bridge")
        )
        assert largest(hooked - bridge) < 5e-6


def scaled(factor: float):
    """Gemma 2 with all attention outputs larger, which the norm after them undoes."""
    hf = copy.deepcopy(tiny_hf("gemma2"))
    for layer in hf.model.layers:
        layer.self_attn.o_proj.weight.data *= factor
    return hooked_from_hf(hf, tiny_tokenizer(), "scaled")


def test_the_size_of_attention_outputs_does_not_matter() -> None:
    """The negative control is what other tools compute: it grows with the factor."""
    plain, large = scaled(1.0), scaled(10.0)
    for form in ("exact", "jacobian", "frozen"):
        first, second = (
            edge_attribution(m, TASK, method="eap", writer_delta=form).values
            for m in (plain, large)
        )
        assert largest(first - second) < 2e-4 * largest(first), form
    first, second = (
        edge_attribution(m, TASK, method="eap", writer_delta="naive").values for m in (plain, large)
    )
    heads = slice(1, 5)
    assert largest(second[heads]) > 5 * largest(first[heads])


def test_a_small_difference_is_first_order(double) -> None:
    """Halving the difference divides what is missing from the exact effect by about four."""
    model, gaps = copy.deepcopy(double), []
    for share in (0.02, 0.01):
        task = _nudged(model, share)
        exact, guess = edge_patching(model, task), edge_attribution(model, task, method="eap")
        gaps.append(largest(exact.flat - guess.flat))
    assert gaps[0] / gaps[1] == pytest.approx(4, rel=0.35)


def _nudged(model, share: float) -> Task:
    """A corrupted token whose embedding is moved near the clean one."""
    embedding = model.embed.W_E if hasattr(model.embed, "W_E") else model.embed.weight
    clean = CLEAN[:1]
    corrupt = clean.clone()
    corrupt[0, 3] = 250
    near = embedding.data[clean[0, 3]] + share * (embedding.data[7] - embedding.data[clean[0, 3]])
    embedding.data[250] = near
    return Task(clean, corrupt, logit_diff(RIGHT[:1], WRONG[:1]))


def test_integrated_gradients_conserve(model) -> None:
    missing = [
        abs(edge_attribution(model, TASK, method="eap-ig", steps=n).metadata["conservation"])
        for n in (3, 10)
    ]
    assert missing[1] < 0.01
    assert missing[1] < missing[0]


def test_each_steps_own_jacobian_keeps_the_node_identity(hooked2) -> None:
    """IG at the heads of layer 0 along the embeddings' line, one step at a time, by plain autograd."""
    steps = 4
    effects = edge_attribution(hooked2, TASK, method="eap-ig", steps=steps, writer_delta="jacobian")
    bound = TASK.bind(hooked2)
    base, other = (Writes.read(hooked2, tokens, 3) for tokens in (CLEAN, CORRUPT))
    name, total = "blocks.1.attn.hook_z", torch.zeros(4)
    for k in range(steps):
        alpha = (k + 0.5) / steps
        point = base.embed + alpha * (other.embed - base.embed)

        def run(point=point):
            return bound.measure(hooked2, CLEAN).mean()

        hooks = [("hook_embed", lambda x, hook, point=point: point)]
        slope = gradients_of(hooked2, run, [name], fwd_hooks=hooks)[name]
        total += ((other.z[1] - base.z[1]) * slope).sum((0, 1, 3)) / steps
    assert torch.allclose(effects.writer_effects()[effects.edges.heads(1)], total, atol=TINY)


def test_key_value_heads_are_the_sum_of_their_query_heads(hooked2) -> None:
    """A model that repeats the key-value heads for every query head has one reader for each copy."""
    effects = edge_attribution(hooked2, TASK, method="eap").values
    alone = copy.deepcopy(hooked2)
    alone.set_ungroup_grouped_query_attention(True)
    bound = TASK.bind(alone)
    names = ["blocks.1.attn.hook_k", "blocks.1.attn.hook_v"]
    slopes = gradients_of(alone, lambda: bound.measure(alone, CLEAN).mean(), names)
    assert slopes[names[0]].shape[2] == 4
    anatomy = Anatomy(hooked2)
    edges = edge_attribution(hooked2, TASK, method="eap").edges
    base, other = (Writes.read(hooked2, tokens, 3) for tokens in (CLEAN, CORRUPT))
    x = hooked2.run_with_cache(CLEAN, names_filter="blocks.1.hook_resid_pre")[1]
    stream, ln1 = x["blocks.1.hook_resid_pre"], anatomy.norm(1, "ln1")
    for port, name, weight in zip("kv", names, (anatomy.W_K(1), anatomy.W_V(1)), strict=True):
        pulled = torch.einsum("bshd,hmd->bshm", slopes[name], weight.repeat_interleave(2, 0))
        g = ln1.vjp(stream[:, :, None], pulled)
        by_head = torch.einsum("bsm,bshm->h", other.embed - base.embed, g)
        got = effects[0, edges.inputs(1, port)]
        assert torch.allclose(got, by_head.reshape(2, 2).sum(1), atol=TINY)


@pytest.mark.parametrize("method", ["eap", "eap-ig", "eap-ig-activations", "clean-corrupted"])
def test_parts_positions_and_prompts_do_not_matter(hooked2, method: str) -> None:
    line = {"steps": 3} if "-ig" in method else {}
    whole = edge_attribution(hooked2, TASK, method=method, **line)
    parts = edge_attribution(hooked2, TASK, method=method, max_rows=2, **line)
    by_pos = edge_attribution(hooked2, TASK, method=method, per_position=True, **line)
    by_prompt = edge_attribution(hooked2, TASK, method=method, by_prompt=True, **line)
    for other in (parts.values, by_pos.total, by_prompt.values):
        assert torch.allclose(whole.values, other, atol=TINY)
    assert by_pos.values.shape == (*whole.values.shape, CLEAN.shape[1])
    first = Task(CLEAN[:1], CORRUPT[:1], logit_diff(RIGHT[:1], WRONG[:1]))
    alone = edge_attribution(hooked2, first, method=method, **line)
    assert torch.allclose(by_prompt.values_by_prompt[..., 0], alone.values, atol=TINY)


def test_prompts_of_several_lengths_are_those_one_by_one(model) -> None:
    short, other = (
        random_tokens(batch_size=1, length=6, seed=8),
        random_tokens(batch_size=1, length=6, seed=9),
    )
    other[:, :3] = short[:, :3]
    tokens = torch.zeros(2, 8, dtype=torch.long)
    mask = torch.zeros(2, 8, dtype=torch.bool)
    clean, corrupt = tokens.clone(), tokens.clone()
    clean[0], corrupt[0], mask[0] = CLEAN[0], CORRUPT[0], True
    # the short one is padded in front, as tokenizers do for generation
    clean[1, 2:], corrupt[1, 2:], mask[1, 2:] = short[0], other[0], True
    both = Task(clean, corrupt, logit_diff(RIGHT, WRONG), mask=mask)
    alone = [
        Task(CLEAN[:1], CORRUPT[:1], logit_diff(RIGHT[:1], WRONG[:1])),
        Task(short, other, logit_diff(RIGHT[1:], WRONG[1:])),
    ]
    for options in ({"method": "eap"}, {"method": "eap-ig", "steps": 2}):
        got = edge_attribution(model, both, by_prompt=True, **options).values_by_prompt
        for i, task in enumerate(alone):
            assert torch.allclose(
                got[..., i], edge_attribution(model, task, **options).values, atol=TINY
            )
        streamed = edge_attribution(model, alone, **options)
        assert torch.allclose(streamed.values, got.mean(-1), atol=TINY)
        assert streamed.metadata["n_prompts"] == 2


def test_zero_and_mean_replacement(hooked2) -> None:
    exact = edge_patching(hooked2, TASK, replacement="zero")
    for method, least in (("eap", 0.2), ("eap-ig-activations", 0.6)):
        guess = edge_attribution(hooked2, TASK, method=method, replacement="zero")
        assert guess.pearson(exact) > least
    means = [
        edge_attribution(hooked2, TASK, method="eap", replacement=kind).values
        for kind in ("mean", "overall_mean")
    ]
    assert not torch.allclose(*means, atol=1e-4)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_hand_built_circuits_rank_first(case) -> None:
    for method in ("eap", "eap-ig", "clean-corrupted"):
        line = {"steps": 3} if "-ig" in method else {}
        effects = edge_attribution(case.make("hooked"), case.task, method=method, **line)
        best = effects.flat.abs().topk(len(case.true_edges)).indices
        places = effects.edges.mask.nonzero()[best].tolist()
        best_edges = {(effects.edges.writers[u], effects.edges.readers[v]) for u, v in places}
        assert best_edges == case.true_edges, method


def test_edges_rank_as_exactly_patched_ones_do_and_the_norm_matters() -> None:
    for family in ("gemma2", "gemma3"):
        model = tiny_model(family, "hooked")
        exact = edge_patching(model, TASK)
        ranks = {
            form: edge_attribution(model, TASK, method="eap", writer_delta=form).spearman(exact)
            for form in ("exact", "naive")
        }
        assert ranks["exact"] > max(0.8, ranks["naive"])


def test_the_model_is_left_alone(model) -> None:
    before = n_hooks(model)
    effects = edge_attribution(model, TASK, method="eap")
    assert n_hooks(model) == before
    assert not any(p.grad is not None for p in model.parameters())
    assert effects.metadata["sign"].startswith("positive")
    with pytest.raises(TaskError):
        edge_attribution(model, Task(CLEAN, CORRUPT, custom(lambda x, n: x[:, 0].detach() * 0)))
    assert n_hooks(model) == before


BAD = [
    ({"method": "epa"}, UnknownNameError, "Unknown method 'epa'.*Did you mean 'eap'"),
    ({"direction": "noise"}, UnknownNameError, "Unknown direction 'noise'"),
    ({"writer_delta": "jvp"}, UnknownNameError, "Unknown writer_delta 'jvp'.*jacobian"),
    ({"steps": 0}, TaskError, "steps=0 gives no points on the line"),
    ({"method": "eap", "steps": 3}, TaskError, "steps plays no part in method='eap'"),
    ({"replacement": "zero"}, TaskError, "method='eap-ig-activations'"),
    ({"per_position": True, "by_prompt": True}, TaskError, "one of them"),
    ({"memory_budget": 1000}, TaskError, "is too little.*8 tokens needs about .*MB"),
]


@pytest.mark.parametrize(("options", "error", "text"), BAD, ids=[str(b[0]) for b in BAD])
def test_bad_options(hooked2, options: dict, error, text: str) -> None:
    with pytest.raises(error, match=text):
        unchecked(edge_attribution)(hooked2, TASK, **options)


def test_a_divergence_has_no_gradient_at_the_clean_run(hooked2) -> None:
    task = Task(CLEAN, CORRUPT, kl_divergence())
    with pytest.raises(TaskError, match="no gradient at the clean run.*direction='denoising'"):
        edge_attribution(hooked2, task, method="eap")
    assert (
        largest(edge_attribution(hooked2, task, method="eap", direction="denoising").values) > 1e-4
    )
    assert largest(edge_attribution(hooked2, task, method="eap-ig").values) > 1e-4
    with pytest.raises(TaskError, match="There is no task"):
        edge_attribution(hooked2, [])


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@pytest.mark.parametrize("method", ["eap", "eap-ig", "eap-ig-activations", "clean-corrupted"])
def test_late_passes_give_what_whole_ones_do(method: str, backend: str, monkeypatch) -> None:
    """Prompts begin to differ at several positions; whole passes are those of the model's modules."""
    options = {"method": method, "max_rows": 8, "by_prompt": True}
    options |= {"steps": 2} if "ig" in method else {}
    forms = ("exact", "jacobian") if method == "eap-ig" else ("exact",)
    families = ("gemma3", "gemma2") if method == "eap-ig" else ("gemma3",)
    models = [(tiny_model(family, backend), 1e-5) for family in families]
    build = {"hooked": hooked_from_hf, "bridge": bridge_from_hf}[backend]
    half = build(copy.deepcopy(tiny_hf("gemma3")).to(torch.bfloat16), tiny_tokenizer(), "half")
    for model, share in [*models, (half, 0.1)]:
        for form in forms:
            late = edge_attribution(model, LATE, writer_delta=form, **options)
            by_pos = edge_attribution(
                model, LATE, writer_delta=form, **{**options, "by_prompt": False}, per_position=True
            )
            with monkeypatch.context() as patched:
                patched.setattr(Arithmetic, "of", lambda *args: None)
                whole = edge_attribution(model, LATE, writer_delta=form, **options)
            assert late.values_by_prompt is not None and whole.values_by_prompt is not None
            for late_values, whole_values in (
                (late.values_by_prompt, whole.values_by_prompt),
                (by_pos.values.sum(-1), whole.values),
            ):
                assert float((late_values - whole_values).norm()) < share * float(
                    whole_values.norm()
                )
            assert not by_pos.values[..., :2].any()
