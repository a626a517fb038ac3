"""Circuits of edges: all kept is clean, none is corrupt, any is the slow definition."""

from __future__ import annotations

import pytest
import torch

from gemmascope_plugin.causes.exact.edge_patching import edge_patching
from gemmascope_plugin.causes.memory import Limit
from gemmascope_plugin.causes.replace import Writes
from gemmascope_plugin.circuits.edge_ablation import EdgeAblation
from gemmascope_plugin.errors import GemmaScopeError
from gemmascope_plugin.models.anatomy import Anatomy
from tests.causes.tasks import CLEAN, CORRUPT, TASK, score
from tests.factories import n_hooks
from tests.ground_truth.cases import CASES
from tests.support.rounding import TINY


def random_circuits(ablation: EdgeAblation, n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(n, *ablation.edges.mask.shape, generator=generator) < 0.5


@torch.no_grad()
def slowly(model, is_kept: torch.Tensor) -> float:
    """One reader after the other, writer by writer, from the definition; the model runs once per reader.

    Readers are fixed from the first to the last, each by a pass in which those before it are fixed
    already.
    """
    anatomy, edges = Anatomy(model), EdgeAblation(model, TASK.bind(model)).edges
    other = Writes.read(model, CORRUPT, 3)
    fixed: list = []
    for column, reader in enumerate(edges.readers):
        with model.hooks(fwd_hooks=fixed):
            _, cache = model.run_with_cache(CLEAN)
        removed = [
            node
            for row, node in enumerate(edges.writers)
            if edges.mask[row, column] and not is_kept[row, column]
        ]
        d = torch.zeros_like(cache["hook_embed"])
        for node in removed:
            if node.kind == "embed":
                d += other.embed - cache["hook_embed"]
            elif node.kind == "mlp":
                d += other.mlp[node.layer] - cache[node.hook]
        for layer in range(3):
            heads = [node.index for node in removed if node.kind == "head" and node.layer == layer]
            if heads:
                z = cache[f"blocks.{layer}.attn.hook_z"]
                mixed = z.clone()
                mixed[:, :, heads] = other.z[layer][:, :, heads]
                post = anatomy.norm(layer, "ln1_post")
                d += post(anatomy.head_sum(layer, mixed)) - post(anatomy.head_sum(layer, z))
        fixed.append(_as_hook(anatomy, reader, cache, d))
    with model.hooks(fwd_hooks=fixed):
        return score(model(CLEAN))


def _as_hook(anatomy, reader, cache, d):
    node, layer = reader.node, None if reader.node.kind == "logits" else reader.node.layer
    if layer is None:
        return "blocks.2.hook_resid_post", lambda x, hook: x + d
    if node.kind == "mlp":
        value = anatomy.mlp_input(layer).value(cache[f"blocks.{layer}.hook_resid_mid"] + d)
        return anatomy.mlp_input(layer).hook, lambda x, hook: value
    x, ln1 = cache[f"blocks.{layer}.hook_resid_pre"], anatomy.norm(layer, "ln1")
    weight = {"q": anatomy.W_Q, "k": anatomy.W_K, "v": anatomy.W_V}[reader.port](layer)[node.index]
    name = f"blocks.{layer}.attn.hook_{reader.port}"
    new = cache[name][:, :, node.index] + (ln1(x + d) - ln1(x)) @ weight

    def put(values, hook):
        values = values.clone()
        values[:, :, node.index] = new
        return values

    return name, put


def test_circuits_are_what_the_definition_says(model) -> None:
    ablation = EdgeAblation(model, TASK.bind(model))
    circuits = random_circuits(ablation, 2)
    got = ablation.metric(circuits).mean(1)
    for is_kept, value in zip(circuits, got.tolist(), strict=True):
        assert value == pytest.approx(slowly(model, is_kept), abs=1e-5)


def test_all_is_clean_and_none_is_corrupt(model) -> None:
    before = n_hooks(model)
    bound = TASK.bind(model)
    ablation = EdgeAblation(model, bound)
    shape = ablation.edges.mask.shape
    values = ablation.metric(torch.stack([torch.ones(shape).bool(), torch.zeros(shape).bool()]))
    with torch.no_grad():
        ends = [bound.measure(model, tokens) for tokens in (CLEAN, CORRUPT)]
    assert torch.allclose(values, torch.stack(ends), atol=TINY)
    assert n_hooks(model) == before


def test_one_removed_edge_is_exact_edge_patching(hooked2) -> None:
    ablation = EdgeAblation(hooked2, TASK.bind(hooked2))
    exact = edge_patching(hooked2, TASK)
    places = ablation.edges.mask.nonzero()[::9]
    circuits = torch.ones(len(places), *ablation.edges.mask.shape, dtype=torch.bool)
    circuits[torch.arange(len(places)), places[:, 0], places[:, 1]] = False
    full = ablation.metric(torch.ones(1, *ablation.edges.mask.shape, dtype=torch.bool))
    got = ablation.metric(circuits) - full
    expected = exact.values_by_prompt[places[:, 0], places[:, 1]]
    assert torch.allclose(got, expected, atol=TINY)
    assert float(expected.abs().max()) > 1e-2


def test_batches_do_not_matter(hooked2) -> None:
    bound = TASK.bind(hooked2)
    circuits = random_circuits(EdgeAblation(hooked2, bound), 5)
    whole = EdgeAblation(hooked2, bound).metric(circuits)
    parts = EdgeAblation(hooked2, bound, limit=Limit(1, "1 GB")).metric(circuits)
    assert torch.allclose(whole, parts, atol=TINY)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_the_true_edges_alone_do_the_task(case, backend: str) -> None:
    model = case.make(backend)
    ablation = EdgeAblation(model, case.task.bind(model))
    is_kept = torch.zeros(ablation.edges.mask.shape, dtype=torch.bool)
    for writer, reader in case.true_edges:
        is_kept[ablation.edges.writer(writer), ablation.edges.reader(reader)] = True
    full = torch.ones_like(is_kept)
    alone, whole, rest, none = ablation.metric(torch.stack([is_kept, full, ~is_kept, ~full])).mean(
        1
    )
    assert float(alone) == pytest.approx(float(whole), abs=1e-4)
    assert float(rest) == pytest.approx(float(none), abs=1e-4)


def test_too_little_memory(hooked2) -> None:
    with pytest.raises(GemmaScopeError, match="budget.*too small"):
        EdgeAblation(hooked2, TASK.bind(hooked2), limit=Limit(8, 1000))
