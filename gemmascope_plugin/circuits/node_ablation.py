"""Runs the model with only some of its nodes: every other one gets its replacement at every position.

The kept nodes are recomputed in that context. Reconstruction errors of dictionaries are kept.  What
takes a node's place is what it is in the corrupted run of the same prompt, zero, or a mean over that
run.

Cost: one row per circuit and prompt, from the lowest replaced node and the first difference on; circuits
ride on the batch axis.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float

from gemmascope_plugin.causes.bound_task import BoundTask
from gemmascope_plugin.causes.components import layer_of
from gemmascope_plugin.causes.replace import Replacement, replaced
from gemmascope_plugin.causes.replayed import Part, joined, replayed
from gemmascope_plugin.graphs.node import Node
from gemmascope_plugin.models.record import write


def node_metric(
    runner: Any,
    bound: BoundTask,
    nodes: Sequence[Node],
    kept: Bool[torch.Tensor, "circuit node"],
    *,
    replacement: Replacement = "other",
    max_rows: int,
) -> Float[torch.Tensor, "circuit prompt"]:
    """The metric of every prompt with the nodes outside each circuit replaced.

    Args:
        runner: The model, or the model with dictionaries spliced in.
        bound: The task.
        nodes: All nodes that may be replaced.
        kept: True where a circuit keeps a node.
        replacement: What the others get.
        max_rows: Prompt copies per forward pass.
    """
    hooks = list(dict.fromkeys(node.hook for node in nodes))
    whole = replacement != "other"
    rows = max(1, min(len(bound), max_rows))
    options: dict[str, Any] = {"rows": rows, "here": hooks, "there": hooks, "whole": whole}
    parts = tuple(replayed(runner, bound, bound.clean, bound.corrupt, **options))
    corrupt = joined(parts, hooks, *bound.clean.shape, other=True)
    given = {name: replaced(x, bound.mask, replacement) for name, x in corrupt.items()}
    values = torch.zeros(len(kept), len(bound))
    for part in parts:
        size, window = max(1, max_rows // len(part.index)), part.replay.window(part.start)
        some = {name: x[part.index][:, window] for name, x in given.items()}
        for chunk in torch.arange(len(kept)).split(size):
            measured = _measured(part, window, nodes, kept[chunk], some)
            values[chunk[:, None], part.index.cpu()] = measured.to(values)
    return values


def _measured(
    part: Part,
    window: slice,
    nodes: Sequence[Node],
    kept: Bool[torch.Tensor, "circuit node"],
    given: Mapping[str, Float[torch.Tensor, "part pos ..."]],
) -> Float[torch.Tensor, "circuit part"]:
    """One pass from the lowest node that any of the circuits does not keep."""
    removed = [
        node for node, all_kept in zip(nodes, kept.all(0).tolist(), strict=True) if not all_kept
    ]
    if not removed:
        return part.base.expand(len(kept), -1)
    hooks = [(name, _ablate(name, nodes, kept, x)) for name, x in given.items()]
    layer = 0 if part.replay.runs_whole else max(0, min(layer_of(n.hook) for n in removed))
    return part.metric(layer, window, copies=len(kept), hooks=hooks)


def _ablate(
    name: str,
    nodes: Sequence[Node],
    kept: Bool[torch.Tensor, "circuit node"],
    given: Float[torch.Tensor, "prompt pos ..."],
) -> Callable[..., torch.Tensor]:
    """Hook that replaces the nodes at ``name`` that each copy's circuit does not keep."""
    here = [(i, node) for i, node in enumerate(nodes) if node.hook == name]
    columns = torch.tensor([i for i, _ in here])
    index = torch.tensor([node.index for _, node in here], device=given.device)
    whole = here[0][1].kind not in ("head", "feature")

    def replace(activation: torch.Tensor) -> torch.Tensor:
        copies = activation.unflatten(0, (len(kept), -1))
        keep = kept[:, columns].to(activation.device)
        if whole:
            return torch.where(keep[:, :, None, None], copies, given).flatten(0, 1)
        # heads and features lie on axis 2 of [prompt, pos, head or feature, ...]
        old, new = copies.index_select(3, index), given.index_select(2, index)
        keep = keep.reshape(len(kept), 1, 1, -1, *([1] * (old.ndim - 4)))
        return copies.index_copy(3, index, torch.where(keep, old, new)).flatten(0, 1)

    return write(replace)
