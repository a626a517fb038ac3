"""How faithful a circuit is, beside its baselines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import gemmascope_plugin.figures as figures
from gemmascope_plugin.circuits.circuit import Circuit


@dataclass(frozen=True)
class Scores:
    """Faithfulness of a circuit and its ranking's prefixes, and of random circuits."""

    circuit: Circuit
    sizes: tuple[int, ...]
    """Numbers of kept nodes that were measured."""
    faithfulness_by_size: tuple[float, ...]
    """1 = the full model, 0 = everything ablated."""
    random_by_size: tuple[tuple[float, ...], ...]
    """Faithfulness of random circuits, per size."""
    metric_full: float
    """Metric of the full model."""
    metric_empty: float
    """Metric with every node ablated."""
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def faithfulness(self) -> float:
        """Of the circuit itself."""
        return self.faithfulness_by_size[self.sizes.index(self.circuit.size)]

    @property
    def random(self) -> tuple[float, ...]:
        """Of the random circuits of the circuit's size."""
        return self.random_by_size[self.sizes.index(self.circuit.size)]

    def smallest(self, at_least: float) -> int | None:
        """The smallest measured size from which on faithfulness stays at ``at_least`` or above."""
        smallest = None
        for n, faithfulness in sorted(
            zip(self.sizes, self.faithfulness_by_size, strict=True), reverse=True
        ):
            if faithfulness < at_least:
                break
            smallest = n
        return smallest

    def to_frame(self) -> Any:
        """A DataFrame, one row per size."""
        import pandas as pd

        rows = [
            {
                "size": n,
                "faithfulness": f,
                "random_mean": sum(r) / len(r) if r else float("nan"),
                "random_min": min(r, default=float("nan")),
                "random_max": max(r, default=float("nan")),
            }
            for n, f, r in zip(
                self.sizes, self.faithfulness_by_size, self.random_by_size, strict=True
            )
        ]
        return pd.DataFrame(rows)

    def plot(self) -> Any:
        """A plotly figure: faithfulness by size, with the range of the random circuits."""
        frame = self.to_frame()
        low, high = frame["random_min"].tolist(), frame["random_max"].tolist()
        n_random = len(self.random_by_size[0])
        return figures.curves(
            list(self.sizes),
            {"circuit": frame["faithfulness"].tolist()},
            band=(f"{n_random} random circuits", low, high) if n_random else None,
            title=f"Faithfulness on {self.metadata.get('n_prompts')} held-out prompts",
            x_title="nodes kept",
            y_title="faithfulness",
            hline=1.0,
        )

    def __repr__(self) -> str:
        best = max(self.random, default=float("nan"))
        return (
            f"Scores({self.metadata.get('task')}, {self.circuit.size} of "
            f"{len(self.circuit.ranking)} nodes, faithfulness {self.faithfulness:.3f}, best of "
            f"{len(self.random)} random {best:.3f}, metric full {self.metric_full:.3f}, "
            f"empty {self.metric_empty:.3f})"
        )
