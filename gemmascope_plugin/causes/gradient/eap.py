"""Edge attribution patching: gradients at the ends of the way, or their mean along it.

* ``eap``: gradients of the base run (Syed et al., arXiv 2310.10348).
* ``clean-corrupted``: the mean of the gradients of both runs.
* ``eap-ig`` (inputs): the mean along a straight line from the base embeddings to the other run's, by the
  **midpoint** rule ``alpha_k = (k + 1/2) / n`` (Hanna et al., arXiv 2403.17806, which takes the left
  ends; ten times the steps for the same error). The scores out of the embedding sum to the whole
  difference of the metric as ``n`` grows.
* ``eap-ig-activations``: per writer site (the heads of a layer, an MLP, the embedding) the line of *its*
  activation, the rest recomputed; edges of that site alone are scored. Needed for zero and mean
  replacement, where the embedding has no line to follow.

Cost: per prompt 1, 2, ``steps`` or ``steps * (2 layers + 1)`` forward and backward passes, the last of
these from each writer's layer on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from gemmascope_plugin.causes.gradient.edge_runs import EdgeMethod, EdgeRuns, Path, deltas_between
from gemmascope_plugin.causes.gradient.slopes import EMBED
from gemmascope_plugin.causes.metric import Metric
from gemmascope_plugin.causes.metrics import KLDivergence
from gemmascope_plugin.causes.replace import Replacement, Writes
from gemmascope_plugin.errors import TaskError
from gemmascope_plugin.graphs.edge_map import EdgeMap
from gemmascope_plugin.types import Direction


@dataclass(frozen=True)
class EAP(EdgeMethod):
    """Gradients of the base run."""

    name = "eap"
    title = "edge attribution patching"
    paper = "Syed et al., arXiv 2310.10348"
    cost = "one forward and one backward pass"

    def check(
        self, metrics: Sequence[Metric], direction: Direction, replacement: Replacement
    ) -> None:
        """Refuses a metric that is smallest at the base run as well."""
        super().check(metrics, direction, replacement)
        if direction == "noising" and any(isinstance(metric, KLDivergence) for metric in metrics):
            raise TaskError(
                "The KL divergence from the clean run has no gradient at the clean run: every score "
                "would be 0",
                fix="logit_diff, direction='denoising', or method='eap-ig'",
            )

    def paths(self, runs: EdgeRuns) -> Iterator[Path]:
        """The base run alone."""
        yield Path(runs.deltas, [runs.at(EMBED, runs.base.embed)])


@dataclass(frozen=True)
class CleanCorrupted(EdgeMethod):
    """Mean of the gradients of both runs."""

    name = "clean-corrupted"
    title = "edge attribution patching of both runs"
    paper = "the code of Hanna et al., arXiv 2403.17806"
    cost = "two forward and backward passes"
    between_prompts = True

    def paths(self, runs: EdgeRuns) -> Iterator[Path]:
        """Both ends."""
        ends = (runs.base.embed, runs.other_embedding())
        yield Path(runs.deltas, [runs.at(EMBED, embedded) for embedded in ends])


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
            raise TaskError(f"steps={self.steps} gives no points on the line", fix="steps=10")

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
