"""Writes ``tests/circuits/data/circuit_tracer_golden.safetensors``: attribution graphs by circuit-tracer.

circuit-tracer 0.5.0 wants an older transformers than this package, so it has an environment of its own:

    python -m venv PEER && PEER/bin/pip install circuit-tracer==0.5.0
    PEER/bin/python tests/benchmarks/circuit_tracer_golden.py

One random model of Gemma 2's shape (``trace_models.py``) with three layers, both soft-caps low enough to
bind and a window shorter than the prompt, and three sets of transcoders for it:

* ``normalized``: read ``ln2.hook_normalized``, the norm's output without its gain (Gemma Scope 1);
* ``gained``: read ``mlp.hook_in``, the same with the gain;
* ``skip``: the same with an affine skip (Gemma Scope 2), fewer features active.

**Definitions.** Nodes, in the order of rows and columns of the adjacency:

    features by (layer, position, index) | errors by (layer, position) | tokens | logits by probability.

Rows are targets, columns sources. Attention patterns and all norm scales are held fixed; MLPs pass
nothing but an affine skip (at position 0 too). A column holds what the source writes: activation times
decoder row, ``mlp_out`` less the reconstruction, embedding. A row is read with the encoder column, or
with ``W_U[:, token] - W_U.mean(1)`` at the last position: the logit *before* its soft-cap, of which the
mean over the vocabulary is taken off. Probabilities are those *after* the soft-cap. Biases (``b_enc``,
``b_dec``) are in no node. Features and errors at position 0 are zero: no feature there is a node, and
its errors are nodes with zero columns.

**The file.** ``model.*`` and ``transcoders.{case}.*`` as in ``trace_models.py``, ``tokens``, ``logits
[pos, d_vocab]``, and for each case

* ``active_features [n, 3]`` and ``activation_values [n]``;
* ``logit_tokens``, ``logit_probabilities``;
* ``adjacency_bits``: which of the ``nodes * nodes`` entries are not zero, eight a byte as
  ``numpy.packbits`` has it, and ``adjacency_values``, those entries in row-major order;
* ``node_influence`` and ``cumulative_scores`` (``compute_node_influence``, ``prune_graph``);
* ``prune.{i}.node_mask`` and ``prune.{i}.edge_bits``, one bit for each entry that is not zero, for the
  pairs of thresholds in the metadata.

The metadata have one entry, ``golden``: JSON of config, hooks, thresholds, replacement and completeness
scores, sizes and versions.

**Nothing hangs on rounding**: no pre-activation is close to its threshold, and pruning in float64 is
asserted to give the same masks.

Cost: ten seconds.
"""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from circuit_tracer import Graph
from circuit_tracer.graph import compute_graph_scores, compute_node_influence, prune_graph
from safetensors.torch import save_file
from trace_models import Case, gemma2_config, random_state, random_tokens, random_transcoders
from trace_peer import replacement_model, trace

OUT = Path(__file__).resolve().parents[1] / "circuits/data/circuit_tracer_golden.safetensors"
SEED = 0
D_SAE, LENGTH = 36, 14
CASES: dict[str, dict[str, Any]] = {
    "normalized": {"hook_in": "ln2.hook_normalized", "density": 0.25, "skip": False},
    "gained": {"hook_in": "mlp.hook_in", "density": 0.25, "skip": False},
    "skip": {"hook_in": "mlp.hook_in", "density": 0.12, "skip": True},
}
THRESHOLDS = ((0.8, 0.98), (0.6, 0.9))
"""Of nodes and of edges."""
MARGIN = 1e-3
"""Least distance of a pre-activation from its threshold."""
SIZES = {
    "n_layers": 3,
    "d_model": 32,
    "d_head": 8,
    "n_heads": 4,
    "n_key_value_heads": 2,
    "d_mlp": 48,
    "d_vocab": 60,
    "n_ctx": 32,
    "window_size": 5,
    "attn_scores_soft_cap": 5.0,
    "output_logits_soft_cap": 3.0,
    "attn_scale": 6.0**0.5,
}


def with_thresholds(case: Case, density: float) -> Case:
    """The case with thresholds that stay clear of the pre-activations of its own prompt.

    Features are active at a share ``density`` of the positions after BOS on average, some of them
    nowhere and some twice as often.
    """
    _, pre = replacement_model(case).get_activations(
        torch.tensor(case.tokens), apply_activation_function=False
    )
    generator = torch.Generator().manual_seed(SEED)
    weights = dict(case.transcoders)
    for layer, acts in enumerate(pre[:, 1:]):
        share = 2 * density * torch.rand(acts.shape[1], generator=generator)
        columns = zip(acts.T, 1 - share, strict=True)
        threshold = torch.stack([column.quantile(q) for column, q in columns]).clamp(min=0.05)
        while (close := (acts - threshold).abs().amin(0) < MARGIN).any():
            threshold[close] += MARGIN
        weights[f"{layer}.threshold"] = threshold
    return replace(case, transcoders=weights)


def prune(graph: Graph, thresholds: tuple[float, float]) -> tuple[torch.Tensor, ...]:
    """Masks and cumulative scores in float32, after float64 has given the same masks."""
    masks = tuple(prune_graph(graph, *thresholds))
    single = graph.adjacency_matrix, graph.logit_probabilities
    graph.adjacency_matrix, graph.logit_probabilities = (tensor.double() for tensor in single)
    torch.set_default_dtype(torch.float64)  # it makes a tensor of weights in the default type
    try:
        exact = prune_graph(graph, *thresholds)
    finally:
        torch.set_default_dtype(torch.float32)
        graph.adjacency_matrix, graph.logit_probabilities = single
    for name, mask, reference in zip(("nodes", "edges"), masks, exact, strict=False):
        assert torch.equal(mask, reference), (
            f"{thresholds}: {name} depend on rounding: another seed"
        )
    return masks


def bits(mask: torch.Tensor) -> torch.Tensor:
    """A mask, eight entries a byte."""
    return torch.from_numpy(np.packbits(mask.numpy().reshape(-1)))


def results(graph: Graph) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and numbers of one graph."""
    adjacency = graph.adjacency_matrix
    nonzero = adjacency != 0
    weights = torch.zeros(len(adjacency))
    weights[-len(graph.logit_probabilities) :] = graph.logit_probabilities
    tensors = {
        "active_features": graph.active_features.to(torch.int16),
        "activation_values": graph.activation_values,
        "logit_tokens": graph.logit_token_ids,
        "logit_probabilities": graph.logit_probabilities,
        "adjacency_bits": bits(nonzero),
        "adjacency_values": adjacency[nonzero],
        "node_influence": compute_node_influence(adjacency, weights),
    }
    for i, thresholds in enumerate(THRESHOLDS):
        nodes, edges, tensors["cumulative_scores"] = prune(graph, thresholds)
        assert not edges[~nonzero].any(), "an edge without weight was kept"
        tensors[f"prune.{i}.node_mask"] = nodes
        tensors[f"prune.{i}.edge_bits"] = bits(edges[nonzero])
    replacement, completeness = compute_graph_scores(graph)
    numbers = {
        "nodes": len(adjacency),
        "replacement_score": replacement,
        "completeness_score": completeness,
    }
    return {name: value.contiguous() for name, value in tensors.items()}, numbers


def main() -> None:
    """Traces the three cases and writes the file."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(SEED)
    config = gemma2_config(**SIZES)
    state = random_state(config, generator)
    tokens = random_tokens(config, LENGTH, generator)
    tensors = {f"model.{name}": value for name, value in state.items()}
    tensors["tokens"] = torch.tensor(tokens)
    words: dict[str, Any] = {
        "config": config,
        "thresholds": THRESHOLDS,
        "versions": {
            name: version(name) for name in ("circuit-tracer", "transformer-lens", "torch")
        },
        "cases": {},
    }
    for name, options in CASES.items():
        made = random_transcoders(
            config, D_SAE, options["density"], generator, skip=options["skip"]
        )
        case = Case(config, state, made, tokens, hook_in=options["hook_in"])
        case = with_thresholds(case, options["density"])
        model = replacement_model(case)
        logits, _ = model.get_activations(torch.tensor(tokens))
        # A skip is added and taken off again, which rounds.
        assert torch.allclose(logits[0], tensors.setdefault("logits", logits[0].clone()), atol=1e-5)
        arrays, numbers = results(trace(model, tokens, batch_size=64))
        tensors |= {f"{name}.{key}": value for key, value in arrays.items()}
        tensors |= {f"transcoders.{name}.{key}": value for key, value in case.transcoders.items()}
        hooks = {"hook_in": case.hook_in, "hook_out": case.hook_out}
        words["cases"][name] = {**hooks, **numbers}
        active = len(arrays["active_features"])
        share = len(arrays["adjacency_values"]) / numbers["nodes"] ** 2
        n_kept = [int(arrays[f"prune.{i}.node_mask"].sum()) for i in range(len(THRESHOLDS))]
        print(f"{name}: {active} features, {numbers}, {share:.2f} of entries, {n_kept} nodes kept")
    OUT.parent.mkdir(exist_ok=True)
    save_file(tensors, OUT, metadata={"golden": json.dumps(words)})
    print(f"{OUT.name}: {OUT.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
