"""Model and transcoders of circuit-tracer's graphs compute here what they computed there."""

from __future__ import annotations

import pytest
import torch

from gemmascope_plugin.models.points import reading
from gemmascope_plugin.saes import decode, encode_sparse
from tests.circuits.golden import CASES, Golden, golden
from tests.support.rounding import assert_rounded

TERMS = 3 * (4 * 32 + 14 + 2 * 48)
"""Of the sums on the way to the end of the stored model: three layers, each with four products of width
32, attention over 14 tokens and an MLP of 48."""


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Golden:
    return golden(request.param)


def reads(case: Golden) -> list[torch.Tensor]:
    """What the transcoder of every layer reads ``[pos, d_model]``."""
    names = [sae.cfg.metadata.hook_name for sae in case.transcoders]
    how = [reading(case.model, name) for name in names]
    _, cache = case.model.run_with_cache(case.tokens[None], names_filter=[r.hook for r in how])
    return [r(cache[r.hook][0]) for r in how]


def test_the_rebuilt_model_has_the_stored_logits(case: Golden) -> None:
    assert_rounded(case.model(case.tokens[None])[0], case.logits, TERMS)


def test_the_same_features_are_active_with_the_same_values(case: Golden) -> None:
    features, values = [], []
    for layer, (sae, x) in enumerate(zip(case.transcoders, reads(case), strict=True)):
        acts = encode_sparse(sae, x, keep=torch.arange(len(x)) > 0)
        layers = torch.full_like(acts.rows, layer)
        features.append(torch.stack([layers, acts.rows, acts.indices], dim=1))
        values.append(acts.values)
    assert torch.equal(torch.cat(features), case.active_features)
    assert_rounded(torch.cat(values), case.activation_values, TERMS)


def test_probabilities_are_those_after_the_soft_cap(case: Golden) -> None:
    probabilities = case.logits[-1].softmax(-1)
    top = probabilities.topk(len(case.logit_tokens))
    assert torch.equal(top.indices, case.logit_tokens)
    assert_rounded(top.values, case.logit_probabilities, len(probabilities))


def test_every_part_of_an_axis_has_its_place(case: Golden) -> None:
    n = len(case.adjacency)
    assert case.targets.stop == n == len(case.node_influence) == len(case.cumulative_scores)
    sources = torch.zeros(n, dtype=torch.bool)
    sources[case.features] = sources[case.targets] = True
    assert torch.equal(case.adjacency.any(1), sources)  # errors and tokens have no row
    assert not case.adjacency[:, case.targets].any()
    for pruned in case.pruned:
        assert pruned.node_mask[case.embeddings.start :].all()
        assert not (pruned.edge_mask & (case.adjacency == 0)).any()


def test_errors_are_what_the_transcoder_does_not_write_and_zero_at_bos(case: Golden) -> None:
    """Seen through the last layer's errors at the last position, which the logits read directly."""
    layer, pos = len(case.transcoders) - 1, len(case.tokens) - 1
    names = [f"blocks.{layer}.hook_mlp_out", "ln_final.hook_scale"]
    _, cache = case.model.run_with_cache(case.tokens[None], names_filter=names)
    sae, x = case.transcoders[layer], reads(case)[layer]
    written = decode(sae, encode_sparse(sae, x).to_dense(), x)
    error = cache[names[0]][0, pos] - written[pos]
    directions = case.model.W_U[:, case.logit_tokens] - case.model.W_U.mean(1, keepdim=True)
    read = case.model.ln_final.w / cache[names[1]][0, pos] @ directions.mul(error[:, None])
    column = case.errors.start + layer * len(case.tokens) + pos
    assert_rounded(case.adjacency[case.targets, column], read, TERMS)
    at_bos = case.adjacency[:, case.errors][:, :: len(case.tokens)]
    assert not at_bos.any()
