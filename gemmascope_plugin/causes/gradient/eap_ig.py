"""Edge attribution patching with integrated gradients: the mean along a line, by the midpoint rule.

* ``eap-ig`` (inputs): a straight line from the base embeddings to the other run's, at
  ``alpha_k = (k + 1/2) / n`` (Hanna et al., arXiv 2403.17806, which takes the left ends; ten times the
  steps for the same error). The scores out of the embedding sum to the whole difference of the metric as
  ``n`` grows.
* ``eap-ig-activations``: per writer site (the heads of a layer, an MLP, the embedding) the line of *its*
  activation, the rest recomputed; edges of that site alone are scored. Needed for zero and mean
  replacement, where the embedding has no line to follow.

Cost: ``steps`` forward and backward passes, or ``steps * (2 layers + 1)`` from each writer's layer on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from gemmascope_plugin.causes.gradient.edge_runs import EdgeMethod, EdgeRuns, Path, deltas_between
from gemmascope_plugin.causes.gradient.slopes import EMBED
from gemmascope_plugin.causes.writes import Writes
from gemmascope_plugin.errors import TaskError
from gemmascope_plugin.graphs.edge_map import EdgeMap

STEPS = 10
"""Points on the line by default."""


@dataclass(frozen=True)
class EapIgActivations(EdgeMethod):
    """Gradients along the line of each writer's own activation."""

    name = "eap-ig-activations"
    title = "edge attribution patching with integrated gradients of activations"
    paper = "Hanna et al., arXiv 2403.17806; Marks et al., arXiv 2403.19647"
    cost = "`steps * (2 layers + 1)` forward and backward passes"

    steps: int = STEPS

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise TaskError(f"steps={self.steps} are no steps", fix="steps=10")

    @property
    def n_steps(self) -> int:
        """The midpoints."""
        return self.steps

    def paths(self, runs: EdgeRuns) -> Iterator[Path]:
        """One path per writer site."""
        for hook, writers, start, end in _sites(runs):
            points = list(runs.along(hook, start, end, self.steps))
            yield Path(runs.deltas, points, writers=writers)


@dataclass(frozen=True)
class EapIg(EapIgActivations):
    """Gradients along the line of the embedding."""

    name = "eap-ig"
    title = "edge attribution patching with integrated gradients"
    paper = "Hanna et al., arXiv 2403.17806"
    cost = "`steps` forward and backward passes"
    between_prompts = True
    conserves = True

    def paths(self, runs: EdgeRuns) -> Iterator[Path]:
        """One path, or one per midpoint where each has its own Jacobian."""
        base, other = runs.base, runs.other
        points = runs.along(EMBED, base.embed, other.embed, self.steps)
        if runs.form != "jacobian":
            yield Path(runs.deltas, list(points))
            return
        for point in points:  # each step's own Jacobian keeps the node identity step by step
            end = _moved(point.writes, base, other)
            deltas = deltas_between(runs.anatomy, point.writes, end, runs.form)
            yield Path(deltas, [point], 1 / self.steps)


def _sites(runs: EdgeRuns) -> Iterator[tuple[str, slice, torch.Tensor, torch.Tensor]]:
    """Hook of each writer site, its rows, and its activation in both runs."""
    edges, base, other = EdgeMap.of(runs.anatomy), runs.base, runs.other
    yield EMBED, slice(0, 1), base.embed, other.embed
    for layer in range(runs.anatomy.n_layers):
        name, mlp = f"blocks.{layer}.", edges.mlp(layer)
        yield f"{name}attn.hook_z", edges.heads(layer), base.z[layer], other.z[layer]
        yield f"{name}hook_mlp_out", slice(mlp, mlp + 1), base.mlp[layer], other.mlp[layer]


def _moved(here: Writes, base: Writes, other: Writes) -> Writes:
    """The run ``here``, moved by the difference between the two others."""
    return Writes(
        here.embed + (other.embed - base.embed),
        here.z + (other.z - base.z),
        here.mlp + (other.mlp - base.mlp),
    )
