"""EAP-IG as its authors run it, for ``causes.py``: left ends, split inputs, a point per pass.

The peer is the algorithm of EAP-IG (Hanna et al., arXiv 2403.17806) written down here; the authors' code
needs another version of TransformerLens and a GPU.

* As there: points ``k/n`` of the line from the corrupted embeddings to the clean ones, the clean end left
  out; one point per pass; gradients at TransformerLens' split inputs of queries, keys, values and MLPs.
* Not as there: heads' differences go through the norm after attention, as in this package, so that the
  scores can be compared; heads' results are formed from ``z``, not by TransformerLens' much slower
  ``use_attn_result``; key-value heads are not ungrouped. All of that is in the peer's favour.

Accuracy is the conservation residual ``|scores out of the embedding / whole difference - 1|``. It swings
from one number of points to the next, and is small by chance at some: left ends count as equal from the
number on from which they stay as good.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from gemmascope_plugin.causes import Task
from gemmascope_plugin.causes.bound_task import BoundTask
from gemmascope_plugin.causes.replace import Writes, write_deltas
from gemmascope_plugin.graphs.edge_map import EdgeMap
from gemmascope_plugin.models.anatomy import Anatomy
from gemmascope_plugin.models.gradients import gradients_of

MOST_LEFT_ENDS = 2000
PORTS = ("hook_q_input", "hook_k_input", "hook_v_input", "hook_mlp_in")


def midpoints(n: int) -> np.ndarray:
    """Points on the line from clean (0) to corrupted (1)."""
    return (np.arange(n) + 0.5) / n


def left_ends(n: int) -> np.ndarray:
    """The same, counted from the corrupted end."""
    return 1 - np.arange(n) / n


def split_input_scores(model: Any, task: Task, alphas: np.ndarray, rows: int) -> torch.Tensor:
    """The peer on a ``HookedTransformer``: scores ``[writer, reader]``.

    Args:
        model: The model.
        task: The prompts.
        alphas: Points on the line.
        rows: Prompts per pass.
    """
    anatomy, bound = Anatomy(model), task.bind(model)
    edges, layers = EdgeMap.of(anatomy), range(anatomy.n_layers)
    names = [f"blocks.{layer}.{port}" for layer in layers for port in PORTS]
    names.append(f"blocks.{len(layers) - 1}.hook_resid_post")
    total = torch.zeros(edges.mask.shape)
    model.set_use_split_qkv_input(True)
    model.set_use_hook_mlp_in(True)
    try:
        for part in bound.parts(rows):
            clean, corrupt = (
                Writes.read(model, t, len(layers)) for t in (part.clean, part.corrupt)
            )
            deltas = write_deltas(anatomy, clean, corrupt)
            for alpha in alphas.tolist():
                embed = torch.lerp(clean.embed, corrupt.embed, alpha)
                slopes = slopes_at(model, part, embed, names)
                readers = [slopes[name] for name in names]
                readers = [g if g.ndim == 4 else g[:, :, None] for g in readers]
                total += torch.einsum("bpwm,bprm->wr", deltas, torch.cat(readers, 2))
    finally:
        model.set_use_split_qkv_input(False)
        model.set_use_hook_mlp_in(False)
    return (total / (len(bound) * len(alphas))).masked_fill(~edges.mask, 0)


def slopes_at(
    model: Any, bound: BoundTask, embed: torch.Tensor, names: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Gradients of the clean prompts' metric with other embeddings."""
    return gradients_of(
        model,
        lambda: bound.measure(model, bound.clean).sum(),
        names,
        fwd_hooks=[("hook_embed", lambda x, hook: embed)],
    )


def equal_steps(model: Any, task: Task, numbers: Iterable[int]) -> dict[int, tuple[int, float]]:
    """Midpoints to the left ends from which on the residual stays as small, and that residual.

    Scores out of the embedding sum to the metric's slope along the line. It is read at 97 places; the
    polynomial through them stands for it, so that thousands of rules cost nothing.
    """
    bound = task.bind(model)
    ends = bound.ends(model)
    whole = ends["metric_corrupt"] - ends["metric_clean"]
    slope = np.polynomial.Chebyshev.interpolate(
        lambda alphas: _slopes(model, bound, alphas), 96, domain=[0, 1]
    )

    def residual(alphas: np.ndarray) -> float:
        return abs(float(slope(alphas).mean()) / whole - 1)

    lefts = [residual(left_ends(m)) for m in range(1, MOST_LEFT_ENDS)]
    steps = {}
    for n in numbers:
        target = residual(midpoints(n))
        worse = [m for m, left in enumerate(lefts, 1) if left > target]
        steps[n] = (1 + max(worse, default=0), target)
    return steps


def _slopes(model: Any, bound: BoundTask, alphas: np.ndarray) -> np.ndarray:
    """Derivative of the mean metric along the line at each point."""
    clean, corrupt = (Writes.read(model, t, 1).embed for t in (bound.clean, bound.corrupt))
    values = []
    for alpha in alphas.tolist():
        slope = slopes_at(model, bound, torch.lerp(clean, corrupt, alpha), ["hook_embed"])
        values.append(float((slope["hook_embed"] * (corrupt - clean)).sum()) / len(bound))
    return np.array(values)
