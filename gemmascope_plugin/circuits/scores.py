"""How faithful a circuit is, beside its baselines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float

import gemmascope_plugin.figures as figures
from gemmascope_plugin.errors import TaskError
from gemmascope_plugin.graphs.circuit import Circuit


@dataclass(frozen=True)
class Scores:
    """Faithfulness of a circuit and its ranking's prefixes, and of random circuits."""

    circuit: Circuit
    sizes: tuple[int, ...]
    """Numbers of kept units that were measured."""
    faithfulness_by_size: tuple[float, ...]
    """1 = the full model, 0 = everything ablated."""
    random_by_size: tuple[tuple[float, ...], ...]
    """Faithfulness of random circuits, per size."""
    metric_full: float
    """Metric of the full model."""
    metric_empty: float
    """Metric with every node ablated."""
    own: float | None = None
    """Faithfulness of the circuit; None where it is the best ``size`` units."""
    completeness: float = float("nan")
    """Faithfulness of everything *but* the circuit: near 0 if nothing is missing from it."""
    kl: float = float("nan")
    """Divergence of the circuit's next-token distribution from the model's, in nats."""
    by_prompt: Float[torch.Tensor, "three prompt"] | None = None
    """Metric per prompt of the circuit, of the full model, and with nothing kept."""
    minimality: tuple[float, ...] | None = None
    """Share of the whole effect that each kept unit alone makes, in the order of the graph."""
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def faithfulness(self) -> float:
        """Of the circuit itself, which need not be the first units of the ranking."""
        if self.own is not None:
            return self.own
        return self.faithfulness_by_size[self.sizes.index(self.circuit.size)]

    @property
    def random(self) -> tuple[float, ...]:
        """Of the random circuits of the circuit's size."""
        return self.random_by_size[self.sizes.index(self.circuit.size)]

    def interval(self, *, level: float = 0.95, n: int = 1000, seed: int = 0) -> tuple[float, float]:
        """Percentile interval of the faithfulness over resampled prompts.

        Args:
            level: Share of the resamples inside.
            n: Resamples.
            seed: Of the resampling.

        Raises:
            TaskError: The metric of single prompts was not kept.
        """
        if self.by_prompt is None:
            raise TaskError("These scores have no values of single prompts", fix="evaluate(...)")
        generator = torch.Generator().manual_seed(seed)
        size = self.by_prompt.shape[1]
        draws = torch.randint(size, (n, size), generator=generator)
        own, full, empty = self.by_prompt.double()[:, draws].mean(-1)
        found = (own - empty) / (full - empty)
        low, high = found.quantile(
            torch.tensor([0.5 - level / 2, 0.5 + level / 2]).double()
        ).tolist()
        return low, high

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
            x_title=f"{self.circuit.graph.unit}s kept",
            y_title="faithfulness",
            hline=1.0,
        )

    def __repr__(self) -> str:
        # Rounded first: no minus before zero.
        best = round(max(self.random, default=float("nan")), 3) + 0.0
        faithfulness = round(self.faithfulness, 3) + 0.0
        return (
            f"Scores({self.metadata.get('task')}, {self.circuit.size} of {self.circuit.n_units} "
            f"{self.circuit.graph.unit}s, faithfulness {faithfulness:.3f}, best of "
            f"{len(self.random)} random {best:.3f}, metric full {self.metric_full:.3f}, "
            f"empty {self.metric_empty:.3f})"
        )
