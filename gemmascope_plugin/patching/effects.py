"""What interventions did: a tensor of metric changes with named axes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple

import torch

import gemmascope_plugin.figures as figures
from gemmascope_plugin.errors import TaskError


class FeatureId(NamedTuple):
    """One feature of one spliced dictionary."""

    site: str
    """Output hook of the dictionary."""
    feature: int
    """Index in the dictionary."""

    def __str__(self) -> str:
        return f"{self.site}/{self.feature}"


@dataclass(frozen=True, eq=False)
class Effects:
    """Change of the metric per intervention, averaged over prompts."""

    values: torch.Tensor
    """``metric(patched) - metric(base)``; the base run is corrupted when denoising, clean when noising.
    Positive = patching raises the metric."""
    axes: tuple[str, ...]
    """Name of each axis of ``values``: ``layer``, ``pos``, ``head``, ``feature``."""
    labels: Mapping[str, tuple[Any, ...]]
    """Coordinate of each entry along each axis."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Component, mode, method, metric values at both ends, number of prompts, token policy."""

    def __post_init__(self) -> None:
        sizes = tuple(len(self.labels[axis]) for axis in self.axes)
        assert sizes == tuple(self.values.shape), f"{sizes} labels for {tuple(self.values.shape)}"

    @property
    def gap(self) -> float:
        """``metric(clean) - metric(corrupt)``."""
        return self.metadata["metric_clean"] - self.metadata["metric_corrupt"]

    @property
    def share(self) -> torch.Tensor:
        """``values / gap``: 1 = the patch alone carries the whole effect (denoising)."""
        return self.values / self.gap

    def to_frame(self) -> Any:
        """A DataFrame, one row per intervention: coordinates, ``effect``, ``share``."""
        import pandas as pd

        rows = []
        for coordinates in product(*(self.labels[axis] for axis in self.axes)):
            row: dict[str, Any] = {}
            for axis, value in zip(self.axes, coordinates, strict=True):
                row.update(value._asdict() if isinstance(value, FeatureId) else {axis: value})
            rows.append(row)
        frame = pd.DataFrame(rows)
        frame["effect"] = self.values.flatten().tolist()
        frame["share"] = self.share.flatten().tolist()
        return frame

    def top(self, n: int = 10) -> Any:
        """The ``n`` rows of :meth:`to_frame` with the largest absolute effect."""
        frame = self.to_frame()
        order = frame["effect"].abs().sort_values(ascending=False, kind="stable").index[:n]
        return frame.loc[order].reset_index(drop=True)

    def spearman(self, other: Effects) -> float:
        """Rank correlation with other effects of the same interventions; ties share their mean rank.

        Raises:
            TaskError: The two were measured on other interventions.
        """
        import pandas as pd

        if self.labels != other.labels:
            raise TaskError(
                f"The effects are of different interventions: {self!r} and {other!r}",
                fix="the same component, prompts and features for both",
            )
        mine, theirs = (pd.Series(e.values.flatten().tolist()).rank() for e in (self, other))
        return float(mine.corr(theirs))

    def plot(self) -> Any:
        """A plotly figure: a heatmap for two axes, ranked bars for one."""
        title = f"{self.metadata['component']}: {self.metadata['method']}, {self.metadata['mode']}"
        if len(self.axes) == 1:
            ranked = self.top(20)
            names = [" ".join(str(v) for v in row[:-2]) for row in ranked.itertuples(index=False)]
            return figures.bars(names, ranked["effect"].tolist(), title=title, x_title="effect")
        y, x = self.axes
        columns = self.metadata.get("tokens") if x == "pos" else None
        return figures.heatmap(
            self.values.cpu().numpy(),
            x=list(columns or self.labels[x]),
            y=list(self.labels[y]),
            x_title="token" if columns else x,
            y_title=y,
            title=title,
            color_title="effect",
        )

    def __repr__(self) -> str:
        meta = self.metadata
        shape = " x ".join(f"{len(self.labels[a])} {a}" for a in self.axes)
        return (
            f"Effects({meta.get('component')}, {meta.get('method')}, {meta.get('mode')}, {shape}, "
            f"metric clean {meta.get('metric_clean', float('nan')):.3f}, "
            f"corrupt {meta.get('metric_corrupt', float('nan')):.3f}, "
            f"excluded tokens {meta.get('exclude')})"
        )
