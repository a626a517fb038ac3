"""A circuit: all nodes of a task ranked by effect, and which of them are kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import gemmascope_plugin.figures as figures
from gemmascope_plugin.circuits.node import Node
from gemmascope_plugin.errors import EmptySelectionError


@dataclass(frozen=True)
class Circuit:
    """Nodes ranked by the size of their effect on a task, the first ``size`` of them kept."""

    ranking: tuple[Node, ...]
    """Every node that was considered, most important first."""
    scores: tuple[float, ...]
    """Effect of each node on the metric, in the order of ``ranking``."""
    size: int
    """How many nodes the circuit keeps."""
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The kept nodes."""
        return self.ranking[: self.size]

    def top(self, n: int) -> Circuit:
        """The circuit of the ``n`` most important nodes.

        Raises:
            EmptySelectionError: ``n`` is negative or larger than the number of nodes.
        """
        if not 0 <= n <= len(self.ranking):
            raise EmptySelectionError(
                f"A circuit of {n} nodes was asked for", exists=f"{len(self.ranking)} nodes"
            )
        return replace(self, size=n)

    def to_frame(self) -> Any:
        """A DataFrame, one row per considered node, most important first."""
        import pandas as pd

        rows = [
            {
                "rank": i + 1,
                "node": node.label,
                "kind": node.kind,
                "layer": node.layer,
                "score": score,
                "kept": i < self.size,
            }
            for i, (node, score) in enumerate(zip(self.ranking, self.scores, strict=True))
        ]
        return pd.DataFrame(rows)

    def plot(self) -> Any:
        """A plotly figure of the kept nodes and their scores."""
        return figures.bars(
            [node.label for node in self.nodes],
            list(self.scores[: self.size]),
            title=f"Circuit for {self.metadata.get('task')}: {self.size} of {len(self.ranking)}",
            x_title=f"effect on {self.metadata.get('metric')}",
        )

    def __repr__(self) -> str:
        head = ", ".join(node.label for node in self.nodes[:6])
        more = f", and {self.size - 6} more" if self.size > 6 else ""
        return (
            f"Circuit({self.metadata.get('task')}, {self.size} of {len(self.ranking)} nodes by "
            f"{self.metadata.get('method')}: {head}{more})"
        )
