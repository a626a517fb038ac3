"""Checks a circuit by ablating everything outside it in the real model.

1. Outside nodes get their value from the corrupted run at every position; the circuit's nodes are
   recomputed in that context. Reconstruction errors of dictionaries are kept.
2. Faithfulness ``f(C) = (m(C) - m(none)) / (m(all) - m(none))`` with ``m(none)`` the metric when every
   node is ablated: a ratio of means over prompts, never a mean of ratios (Marks et al., arXiv
   2403.19647, section 4).
3. The same for the first 0, 1, 2, ... nodes of the ranking, and for random circuits of each size.

Cost: one row of prompts per circuit; circuits ride on the batch axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from random import Random
from typing import Any

import torch
from jaxtyping import Bool, Float

from gemmascope_plugin.circuits.circuit import Circuit
from gemmascope_plugin.circuits.node import Node
from gemmascope_plugin.circuits.scores import Scores
from gemmascope_plugin.errors import TaskError, UnknownNameError
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.patching import Task
from gemmascope_plugin.patching.exact import MAX_ROWS
from gemmascope_plugin.patching.nodes import patchable, read
from gemmascope_plugin.patching.task import MIN_GAP, BoundTask


@torch.no_grad()
def evaluate(
    circuit: Circuit,
    model: HookedModel,
    task: Task,
    *,
    saes: Any = None,
    sizes: Sequence[int] | None = None,
    n_random: int = 20,
    seed: int = 0,
    max_rows: int = MAX_ROWS,
) -> Scores:
    """Faithfulness of a circuit, of every prefix of its ranking, and of random circuits.

    Args:
        circuit: From :func:`discover`; use a task with other prompts here than there.
        model: The model.
        task: Held-out prompts.
        saes: The dictionaries that the circuit's features belong to.
        sizes: Circuit sizes to measure; 0 to all nodes by default, at most 25 of them, always
            with the circuit's own size.
        n_random: Random circuits of each size.
        seed: Seed of the random circuits.
        max_rows: Prompt copies per forward pass.

    Raises:
        EmptySelectionError: A size below 0 or above the number of nodes.
        TaskError: The metric with everything ablated hardly differs from the full model's.
        UnknownNameError: The circuit has features and no dictionaries were given.
    """
    bound = task.bind(model)
    chosen = sorted({circuit.size, *(sizes or _default_sizes(len(circuit.ranking)))})
    rng = Random(seed)
    kept = [circuit.top(n).nodes for n in chosen]
    kept += [tuple(rng.sample(circuit.ranking, n)) for n in chosen for _ in range(n_random)]
    masks = _masks(circuit.ranking, kept + [circuit.ranking, ()])
    has_features = any(node.kind == "feature" for node in circuit.ranking)
    if has_features and saes is None:
        raise UnknownNameError(
            "The circuit has features", fix="evaluate(..., saes=[the same dictionaries])"
        )
    context = patchable(model, "feature", saes) if has_features else nullcontext(model)
    with context as runner:
        values = ablated_metric(runner, bound, circuit.ranking, masks, max_rows)
    full, empty = float(values[-2]), float(values[-1])
    if abs(full - empty) < MIN_GAP:
        raise TaskError(
            f"The metric is {full:.6f} with all nodes and {empty:.6f} with none; faithfulness "
            "cannot be put on a scale between them"
        )
    share = ((values[:-2] - empty) / (full - empty)).tolist()
    random = [
        tuple(share[len(chosen) + i * n_random : len(chosen) + (i + 1) * n_random])
        for i in range(len(chosen))
    ]
    return Scores(
        circuit=circuit,
        sizes=tuple(chosen),
        faithfulness_by_size=tuple(share[: len(chosen)]),
        random_by_size=tuple(random),
        metric_full=full,
        metric_empty=empty,
        metadata={"task": bound.name, "n_prompts": len(bound.clean), "ablation": "corrupt"},
    )


def _default_sizes(n_nodes: int) -> list[int]:
    step = max(1, -(-n_nodes // 24))
    return [*range(0, n_nodes, step), n_nodes]


def _masks(
    ranking: Sequence[Node], circuits: Sequence[Sequence[Node]]
) -> Bool[torch.Tensor, "circuit node"]:
    """True where a circuit keeps a node."""
    column = {node: i for i, node in enumerate(ranking)}
    masks = torch.zeros(len(circuits), len(ranking), dtype=torch.bool)
    for row, nodes in enumerate(circuits):
        for node in nodes:
            masks[row, column[node]] = True
    return masks


def ablated_metric(
    runner: Any,
    bound: BoundTask,
    nodes: Sequence[Node],
    masks: Bool[torch.Tensor, "circuit node"],
    max_rows: int = MAX_ROWS,
) -> Float[torch.Tensor, " circuit"]:
    """Mean metric on clean prompts with the nodes outside each circuit at their corrupted value."""
    hooks = list(dict.fromkeys(node.hook for node in nodes))
    _, corrupt = read(runner, bound.corrupt, hooks)
    copies = max(1, max_rows // len(bound.clean))
    means = []
    for chunk in masks.split(copies):
        fwd_hooks = [(name, _ablate(name, nodes, chunk, corrupt[name])) for name in hooks]
        with runner.hooks(fwd_hooks=fwd_hooks):
            logits = runner(bound.clean.repeat(len(chunk), 1))
        means.append(bound.metric(logits).reshape(len(chunk), -1).mean(1))
    return torch.cat(means)


def _ablate(
    name: str,
    nodes: Sequence[Node],
    masks: Bool[torch.Tensor, "circuit node"],
    corrupt: torch.Tensor,
) -> Callable[..., torch.Tensor]:
    """Hook that replaces the nodes at ``name`` that each copy's circuit does not keep."""
    here = [(i, node) for i, node in enumerate(nodes) if node.hook == name]
    columns = torch.tensor([i for i, _ in here])
    index = torch.tensor([node.index for _, node in here], device=corrupt.device)
    is_mlp = here[0][1].kind == "mlp"

    def hook_fn(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        copies = activation.unflatten(0, (len(masks), -1))
        keep = masks[:, columns].to(activation.device)
        if is_mlp:
            return torch.where(keep[:, :, None, None], copies, corrupt).flatten(0, 1)
        # heads and features lie on axis 2 of [prompt, pos, head or feature, ...]
        old, new = copies.index_select(3, index), corrupt.index_select(2, index)
        keep = keep.reshape(len(masks), 1, 1, -1, *([1] * (old.ndim - 4)))
        return copies.index_copy(3, index, torch.where(keep, old, new)).flatten(0, 1)

    return hook_fn
