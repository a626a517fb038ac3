"""Edge attribution patching: gradients at the ends of the way, of the base run or of both.

* ``eap``: gradients of the base run (Syed et al., arXiv 2310.10348).
* ``clean-corrupted``: the mean of the gradients of both runs.

Cost: one or two forward and backward passes per prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gemmascope_plugin.causes.gradient.edge_runs import EdgeMethod, EdgeRuns, Path
from gemmascope_plugin.causes.gradient.slopes import EMBED
from gemmascope_plugin.causes.metric import Metric
from gemmascope_plugin.causes.metrics import KLDivergence
from gemmascope_plugin.causes.replace import Replacement
from gemmascope_plugin.errors import TaskError
from gemmascope_plugin.types import Direction


@dataclass(frozen=True)
class EAP(EdgeMethod):
    """Gradients of the base run."""

    name = "eap"
    title = "edge attribution patching"
    paper = "Syed et al., arXiv 2310.10348"
    cost = "one forward and one backward pass"

    def check(self, metrics: Sequence[Metric], mode: Direction, replacement: Replacement) -> None:
        """Refuses a metric that is smallest at the base run as well."""
        super().check(metrics, mode, replacement)
        if mode == "noising" and any(isinstance(metric, KLDivergence) for metric in metrics):
            raise TaskError(
                "The KL divergence from the clean run has no gradient at the clean run: every score "
                "would be 0",
                fix="logit_diff, mode='denoising', or method='eap-ig'",
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
