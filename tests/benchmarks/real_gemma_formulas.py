"""What the field's usual formulas get wrong on a real Gemma, beside what this package gives.

Every figure stands beside a truth that needs no formula: single edges patched exactly, circuits that are
run, sums that must add up, a factor that the model undoes.

1. *Edges.* EAP and EAP-IG (5 midpoints) with heads' writes taken through the norm after attention
   (``writer_delta="exact"``), and as libraries without that norm take them (``"naive"``). The truth is
   exact patching of single edges: the 25 largest of each of the four scores, and 100 random ones.
2. *Circuits.* The best ``k`` of all edges by EAP-IG, run on held-out prompts.
3. *Scale.* ``W_O`` of the layer with the largest edge times 3. The norm after attention undoes it.
4. *Direct logit attribution by head*: TransformerLens' ``stack_head_results`` with ``apply_ln_to_stack``.
   The truth is what the attention layers add to the logit difference.

Intervals are over prompts (``real_gemma_intervals.py``). All of it is read on the weights that
``model.gemmascope_source`` names.

Cost: about 4 minutes for each task on two cores.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float

import gemmascope_plugin as gs
from gemmascope_plugin.causes import edge_attribution
from gemmascope_plugin.causes.effects import Effects
from gemmascope_plugin.causes.exact.edge_patching import edge_patching
from gemmascope_plugin.circuits.scored_methods import graph_of
from gemmascope_plugin.circuits.select import top_n
from tests.benchmarks.real_gemma_intervals import over_prompts, pearson, spearman

METHODS: dict[str, dict[str, Any]] = {
    "EAP": {"method": "eap"},
    "EAP-IG": {"method": "eap-ig", "steps": 5},
}
FORMS = {"usual": "naive", "here": "exact"}
SIZES = (20, 40, 60, 80, 100, 150, 200, 300, 400, 600)
N_LARGEST, N_RANDOM = 25, 100
FAITHFUL = 0.8
Scores = dict[tuple[str, str], Effects]
Row = tuple[str, str, str, str]


def table(model: Any, task: Any, held_out: Any) -> Iterator[Row]:
    """Rows ``(figure, usual formula, here, truth)`` for one task.

    Args:
        model: A ``HookedTransformer``.
        task: Prompts that edges are scored on.
        held_out: Prompts that circuits are run on.
    """
    scores: Scores = {
        (method, form): edge_attribution(model, task, writer_delta=delta, by_prompt=True, **options)
        for method, options in METHODS.items()
        for form, delta in FORMS.items()
    }
    sample = sampled_edges(list(scores.values()))
    exact = patched(model, task, scores["EAP", "here"], sample)
    yield from correlations(scores, exact, sample)
    yield from largest_edge(scores, exact, sample)
    yield scale(model, task, exact)
    yield from head_contributions(model, task)
    yield from circuits(model, held_out, scores)


def sampled_edges(scores: list[Effects]) -> Bool[torch.Tensor, "writer reader"]:
    """The largest edges of every score, and random ones."""
    mask = scores[0].edges.mask
    sample = torch.zeros_like(mask).flatten()
    for effects in scores:
        sizes = effects.total.masked_fill(~mask, 0).abs().flatten()
        sample[sizes.topk(min(N_LARGEST, len(sizes))).indices] = True
    places = mask.flatten().nonzero().flatten()
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(0))
    sample[places[order[:N_RANDOM]]] = True
    return sample.view_as(mask) & mask


def patched(model: Any, task: Any, like: Effects, sample: torch.Tensor) -> Effects:
    """Exact effects of the sampled edges."""
    edges = like.edges
    pairs = [(edges.writers[u], edges.readers[v]) for u, v in sample.nonzero().tolist()]
    return edge_patching(model, task, edges=pairs)


def correlations(
    scores: Scores, exact: Effects, sample: Bool[torch.Tensor, "writer reader"]
) -> Iterator[Row]:
    """Agreement with exact single edges, for edges out of heads and for all."""
    for method in METHODS:
        for label, edges in (("from heads", sample & from_heads(exact)), ("all sampled", sample)):
            for name, figure in (("Pearson", pearson), ("Spearman", spearman)):
                truth = exact.values_by_prompt[edges].T
                cells = [
                    str(over_prompts(figure, scores[method, form].values_by_prompt[edges].T, truth))
                    for form in FORMS
                ]
                title = f"{method}, {int(edges.sum())} edges {label}: {name} with exact"
                yield (title, *cells, "1")


def largest_edge(
    scores: Scores, exact: Effects, sample: Bool[torch.Tensor, "writer reader"]
) -> Iterator[Row]:
    """Where each score ranks the sampled edge with the largest exact effect, of all and out of heads."""
    for label, edges in (("", sample), (" from a head", sample & from_heads(exact))):
        u, v = divmod(int(exact.total.masked_fill(~edges, 0).abs().argmax()), sample.shape[1])
        edge = f"{exact.edges.writers[u].label} -> {exact.edges.readers[v].label}"
        for method in METHODS:
            cells = []
            for form in FORMS:
                values = scores[method, form].total
                rank = int((values[exact.edges.mask].abs() > values[u, v].abs()).sum()) + 1
                cells.append(f"rank {rank}, {float(values[u, v]):.3f}")
            truth = f"{float(exact.total[u, v]):.3f}"
            yield (f"{method}: largest exact edge{label}, {edge}", *cells, truth)


def from_heads(exact: Effects) -> Bool[torch.Tensor, "writer reader"]:
    """True at edges out of attention heads."""
    is_head = torch.tensor([node.kind == "head" for node in exact.edges.writers])
    return exact.edges.mask & is_head[:, None]


def circuits(model: Any, held_out: Any, scores: Scores) -> Iterator[Row]:
    """Faithfulness on held-out prompts of the best edges by EAP-IG."""
    curves = {}
    for form in FORMS:
        graph = graph_of(scores["EAP-IG", form])
        sizes = [size for size in SIZES if size < graph.n_edges]
        circuit = top_n(graph, min(SIZES[-1], graph.n_edges))
        curves[form] = gs.evaluate(model, circuit, held_out, sizes=sizes, n_random=0)
    for size in SIZES:
        cells = [
            f"{curve.faithfulness_by_size[curve.sizes.index(size)]:.2f}"
            if size in curve.sizes
            else "-"
            for curve in curves.values()
        ]
        yield (f"best {size} edges by EAP-IG: faithfulness, held out", *cells, "1")
    cells = [_smallest(curve) for curve in curves.values()]
    yield (f"fewest edges with faithfulness >= {FAITHFUL} / from which it stays", *cells, "")


def _smallest(curve: Any) -> str:
    pairs = zip(curve.sizes, curve.faithfulness_by_size, strict=True)
    first = next((size for size, share in pairs if share >= FAITHFUL), None)
    return f"{first or 'none'} / {curve.smallest(FAITHFUL) or 'none'}"


def scale(model: Any, task: Any, exact: Effects) -> Row:
    """``W_O`` of a layer times 3: what becomes of its heads' edges."""
    rows = exact.total.abs().amax(1)
    layer = max(
        (node.layer for node in exact.edges.writers if node.kind == "head"),
        key=lambda layer: float(rows[exact.edges.heads(layer)].max()),
    )
    weight = model.blocks[layer].attn.W_O.data
    original, cells = weight.clone(), []
    mask = exact.edges.mask[exact.edges.heads(layer)]
    for delta in FORMS.values():
        values = []
        for factor in (1, 3):
            try:
                weight.copy_(factor * original)
                effects = edge_attribution(model, task, method="eap", writer_delta=delta)
            finally:
                weight.copy_(original)
            values.append(effects.total[effects.edges.heads(layer)][mask])
        cells.append(f"times {float((values[0] * values[1]).sum() / values[0].square().sum()):.4f}")
    return (
        f"W_O of layer {layer} times 3, which changes nothing: its edges' scores",
        *cells,
        "times 1",
    )


@torch.no_grad()
def head_contributions(model: Any, task: Any) -> Iterator[Row]:
    """Direct logit attribution by head."""
    task = one_length(model, task)
    effects = gs.direct_logit_attribution(model, task, by="head")
    is_head = [label.startswith("L") for label in effects.labels["component"]]
    here = effects.values_by_prompt[is_head].T.cpu()
    usual, truth = transformer_lens_heads(model, task)
    sums = [str(over_prompts(lambda x: float(x.sum()), values)) for values in (usual, here)]
    yield ("direct logit attribution: sum over heads", *sums, f"{float(truth.mean()):.3f}")
    belongs = set(here.mean(0).abs().topk(10).indices.tolist())
    largest = set(usual.mean(0).abs().topk(10).indices.tolist())
    yield (
        "direct logit attribution: of the ten largest heads, right ones",
        str(len(belongs & largest)),
        "10",
        "10",
    )


def one_length(model: Any, task: Any) -> Any:
    """The prompts of the most frequent length: TransformerLens stacks one position for all."""
    lengths = task.bind(model).lengths.tolist()
    usual = max(set(lengths), key=lengths.count)
    rows = [i for i, length in enumerate(lengths) if length == usual]
    metric = task.metric
    answers = ([list(words)[i] for i in rows] for words in (metric.answer, metric.wrong))
    clean, corrupt = ([prompts[i] for i in rows] for prompts in (task.clean, task.corrupt))
    return gs.Task(clean, corrupt, gs.logit_diff(*answers), name=task.name)


def transformer_lens_heads(
    model: Any, task: Any
) -> tuple[Float[torch.Tensor, "prompt head"], Float[torch.Tensor, " prompt"]]:
    """What TransformerLens says each head adds, and what the attention layers really add."""
    bound = task.bind(model)
    assert bool((bound.lengths == bound.clean.shape[1]).all()), "one length: positions are shared"
    wanted = ("hook_z", "ln_final.hook_scale", "hook_attn_out", "hook_resid_post", "hook_embed")
    _, cache = model.run_with_cache(bound.clean, names_filter=lambda name: name.endswith(wanted))
    right, wrong = (ids.ids[:, 0] for ids in (bound.metric.right, bound.metric.wrong))
    # The final norm's gain belongs to the direction: TransformerLens leaves it there when unfolded.
    direction = (model.W_U[:, right] - model.W_U[:, wrong]) * model.ln_final.w[:, None]
    results = cache.stack_head_results(layer=-1, pos_slice=-1)
    results = cache.apply_ln_to_stack(results, layer=-1, pos_slice=-1)
    heads = torch.einsum("hbd,db->bh", results, direction)
    layers = [cache[f"blocks.{i}.hook_attn_out"][:, -1] for i in range(model.cfg.n_layers)]
    written = sum(layers) / cache["ln_final.hook_scale"][:, -1]
    return heads, torch.einsum("bd,db->b", written, direction)
