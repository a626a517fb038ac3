"""What happens if one reader sees another value of one writer: a matrix of metric changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float

import gemmascope_plugin.figures as figures
from gemmascope_plugin.errors import TaskError
from gemmascope_plugin.graphs.conservation import conservation_text
from gemmascope_plugin.graphs.edge_map import EdgeMap


@dataclass(frozen=True, eq=False)
class EdgeEffects:
    """Change of the metric per edge, averaged over prompts."""

    values: Float[torch.Tensor, "writer reader *pos"]
    """``metric(edge patched) - metric(base)``, positive = patching raises the metric; 0 where there is no
    edge. A third axis, if there is one, is the position."""
    edges: EdgeMap
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Method, mode, metric at both ends, number of prompts, residuals."""
    by_prompt: Float[torch.Tensor, "prompt writer reader"] | None = None
    """The same per prompt, if it was asked for."""

    def __post_init__(self) -> None:
        shape = tuple(self.edges.mask.shape)
        assert tuple(self.values.shape[:2]) == shape, f"{tuple(self.values.shape)}, not {shape}"

    @property
    def total(self) -> Float[torch.Tensor, "writer reader"]:
        """Summed over positions."""
        return self.values if self.values.ndim == 2 else self.values.sum(2)

    @property
    def flat(self) -> Float[torch.Tensor, " edge"]:
        """The effects of all edges that exist, in the order of ``edges.mask.nonzero()``."""
        return self.total[self.edges.mask]

    @property
    def gap(self) -> float:
        """``metric(clean) - metric(corrupt)``."""
        return self.metadata["metric_clean"] - self.metadata["metric_corrupt"]

    def node_effects(self) -> Float[torch.Tensor, " writer"]:
        """Each writer's effects, summed over its readers.

        The writer's own first-order effect only with ``writer_delta="jacobian"``.
        """
        return self.total.sum(1)

    def to_frame(self) -> Any:
        """A DataFrame, one row per edge (and position): ``source, target, port, effect, share``."""
        import pandas as pd

        places = self.edges.mask.nonzero()
        writers = [node.label for node in self.edges.writers]
        readers = [(reader.node.label, reader.port) for reader in self.edges.readers]
        frame = pd.DataFrame(
            {
                "source": [writers[u] for u, _ in places.tolist()],
                "target": [readers[v][0] for _, v in places.tolist()],
                "port": [readers[v][1] for _, v in places.tolist()],
            }
        )
        values = self.values[self.edges.mask].cpu()
        if values.ndim == 2:
            n_pos = values.shape[1]
            frame = frame.loc[frame.index.repeat(n_pos)].reset_index(drop=True)
            frame["pos"] = list(range(n_pos)) * len(values)
        frame["effect"] = values.flatten().tolist()
        frame["share"] = (values.flatten() / self.gap).tolist()
        return frame

    def top(self, n: int = 10) -> Any:
        """The ``n`` rows of :meth:`to_frame` with the largest absolute effect."""
        frame = self.to_frame()
        order = frame["effect"].abs().sort_values(ascending=False, kind="stable").index[:n]
        return frame.loc[order].reset_index(drop=True)

    def pearson(self, other: EdgeEffects) -> float:
        """Correlation with other effects of the same edges."""
        return self._correlation(other, "pearson")

    def spearman(self, other: EdgeEffects) -> float:
        """Rank correlation with other effects of the same edges."""
        return self._correlation(other, "spearman")

    def _correlation(self, other: EdgeEffects, method: Any) -> float:
        import pandas as pd

        if self.edges != other.edges:
            raise TaskError(f"The effects are of different models: {self!r} and {other!r}")
        mine, theirs = (pd.Series(e.flat.cpu().tolist()) for e in (self, other))
        if method == "spearman":
            mine, theirs = mine.rank(), theirs.rank()
        return float(mine.corr(theirs))

    def plot(self) -> Any:
        """A plotly heatmap, writers by readers."""
        values = self.total.masked_fill(~self.edges.mask.to(self.total.device), float("nan"))
        return figures.heatmap(
            values.cpu().numpy(),
            x=[reader.label for reader in self.edges.readers],
            y=[node.label for node in self.edges.writers],
            x_title="reader",
            y_title="writer",
            title=f"Edges: {self.metadata.get('method')}, {self.metadata.get('mode')}",
            color_title="effect",
        )

    def __repr__(self) -> str:
        meta = self.metadata
        return (
            f"EdgeEffects({meta.get('method')}, {meta.get('mode')}, {self.edges.n_edges} edges, "
            f"{meta.get('n_prompts')} prompts, metric clean "
            f"{meta.get('metric_clean', float('nan')):.3f}, "
            f"corrupt {meta.get('metric_corrupt', float('nan')):.3f}{conservation_text(meta)})"
        )
