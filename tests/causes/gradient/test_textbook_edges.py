"""Without a norm after attention, edge attribution is the textbook formula."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from gemmascope_plugin.causes import Task, edge_attribution, logit_diff
from gemmascope_plugin.graphs.edge_map import EdgeMap
from gemmascope_plugin.models.gradients import gradients_of
from tests.support.rounding import TINY

CLEAN = torch.tensor([[1, 5, 9, 12, 3], [1, 7, 8, 2, 6]])
CORRUPT = torch.tensor([[1, 5, 20, 12, 3], [1, 30, 8, 2, 6]])
TASK = Task(CLEAN, CORRUPT, logit_diff([10, 11], [12, 13]))


@pytest.fixture(scope="module")
def pre_norm() -> Any:
    """A random model of two layers with norms before attention and MLP only."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    torch.manual_seed(0)
    config = HookedTransformerConfig(
        n_layers=2,
        d_model=24,
        n_ctx=16,
        d_head=8,
        n_heads=3,
        d_mlp=40,
        d_vocab=64,
        act_fn="gelu",
        normalization_type="RMS",
        positional_embedding_type="rotary",
        gated_mlp=True,
        initializer_range=0.3,
        seed=0,
    )
    return HookedTransformer(config).requires_grad_(False)


def textbook(model: Any) -> torch.Tensor:
    """``(z'_u - z_u) . dm/dr_v``, every factor read at the model's own hooks."""
    model = copy.deepcopy(model)
    model.set_use_split_qkv_input(True)
    model.set_use_attn_result(True)
    model.set_use_hook_mlp_in(True)
    edges, bound = EdgeMap(2, 3, 3), TASK.bind(model)
    readers = [f"blocks.{layer}.hook_{port}_input" for layer in range(2) for port in "qkv"]
    readers += [f"blocks.{layer}.hook_mlp_in" for layer in range(2)]
    last = "blocks.1.hook_resid_post"
    slopes = gradients_of(model, lambda: bound.measure(model, CLEAN).mean(), [*readers, last])
    clean, corrupt = (model.run_with_cache(tokens)[1] for tokens in (CLEAN, CORRUPT))
    out = torch.zeros(edges.mask.shape)
    for row, writer in enumerate(edges.writers):
        name = f"blocks.{writer.layer}.attn.hook_result" if writer.kind == "head" else writer.hook
        delta = corrupt[name] - clean[name]
        delta = delta[:, :, writer.index] if writer.kind == "head" else delta
        for column, (node, port) in enumerate(edges.readers):
            if not edges.mask[row, column]:
                continue
            if node.kind == "logits":
                slope = slopes[last]
            elif node.kind == "mlp":
                slope = slopes[f"blocks.{node.layer}.hook_mlp_in"]
            else:
                slope = slopes[f"blocks.{node.layer}.hook_{port}_input"][:, :, node.index]
            out[row, column] = (delta * slope).sum()
    return out


def test_it_is_the_textbook_formula(pre_norm) -> None:
    expected = textbook(pre_norm)
    assert float(expected.abs().max()) > 1e-2
    for form in ("exact", "jacobian", "frozen", "naive"):
        got = edge_attribution(pre_norm, TASK, method="eap", writer_delta=form).values
        assert torch.allclose(got, expected, atol=TINY), form
