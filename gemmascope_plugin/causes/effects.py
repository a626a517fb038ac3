"""What interventions did: a tensor of metric changes with named axes.

Each number is a mean over prompts. Where the change of every prompt is known as well, the result says how
sure it is: standard errors, intervals, p-values (``significance.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch

import gemmascope_plugin.figures as figures
from gemmascope_plugin.causes.significance import (
    Interval,
    PValues,
    bootstrap,
    permutation_test,
    standard_error,
)
from gemmascope_plugin.errors import TaskError, UnknownNameError, check_choice, nearest, shorten
from gemmascope_plugin.graphs.conservation import conservation_text
from gemmascope_plugin.graphs.node import FeatureId


@dataclass(frozen=True, eq=False)
class Effects:
    """Change of the metric per intervention, averaged over prompts."""

    values: torch.Tensor
    """``metric(patched) - metric(base)``; the base run is corrupted when denoising, clean when noising.
    Positive = patching raises the metric."""
    axes: tuple[str, ...]
    """Name of each axis of ``values``: ``layer``, ``pos``, ``head``, ``neuron``, ``feature``..."""
    labels: Mapping[str, tuple[Any, ...]]
    """Coordinate of each entry along each axis."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Component, mode, method, metric values at both ends, number of prompts, token policy."""
    values_by_prompt: torch.Tensor | None = None
    """The same for each prompt, ``[..., prompt]``; None where a method gives means only."""

    def __post_init__(self) -> None:
        sizes = tuple(len(self.labels[axis]) for axis in self.axes)
        assert sizes == tuple(self.values.shape), f"{sizes} labels for {tuple(self.values.shape)}"
        each = self.values_by_prompt
        assert each is None or sizes == tuple(each.shape[:-1]), f"{sizes} for {tuple(each.shape)}"

    @property
    def gap(self) -> float:
        """``metric(clean) - metric(corrupt)``."""
        return self.metadata["metric_clean"] - self.metadata["metric_corrupt"]

    @property
    def share(self) -> torch.Tensor:
        """``values / gap``: 1 = the patch alone carries the whole effect (denoising)."""
        return self.values / self.gap

    def at(self, **coordinates: Any) -> Effects:
        """The effects at some coordinates: ``at(layer=3)``, ``at(layer=[3, 4], head=0)``.

        Args:
            **coordinates: One coordinate, which drops the axis, or several, which keep it.

        Raises:
            UnknownNameError: An axis or a coordinate that there is not.
        """
        found = self
        for axis, wanted in coordinates.items():
            check_choice("axis", axis, self.axes)
            labels = self.labels[axis]
            # a feature is one coordinate, though a tuple
            several = wanted not in labels and isinstance(wanted, list | tuple | range)
            for label in wanted if several else [wanted]:
                if label not in labels:
                    raise UnknownNameError(
                        f"There is no {axis} {label!r} among these effects",
                        exists=shorten(labels),
                        nearest=nearest(str(label), map(str, labels)),
                    )
            index = [labels.index(label) for label in wanted] if several else labels.index(wanted)
            found = found._taken(axis, index)
        return found

    def _taken(self, axis: str, index: int | list[int]) -> Effects:
        """One index drops the axis, a list keeps it."""
        dim = self.axes.index(axis)
        place = (slice(None),) * dim + (index,)
        each = None if self.values_by_prompt is None else self.values_by_prompt[place]
        labels, metadata = dict(self.labels), dict(self.metadata)
        axes = self.axes
        if isinstance(index, int):
            axes = tuple(a for a in axes if a != axis)
            metadata["at"] = {**metadata.get("at", {}), axis: labels.pop(axis)[index]}
        else:
            labels[axis] = tuple(labels[axis][i] for i in index)
        return Effects(self.values[place], axes, labels, metadata, each)

    def standard_error(self) -> torch.Tensor:
        """Standard error of each effect over prompts.

        Raises:
            TaskError: There is one prompt, or the method gives means only.
        """
        return standard_error(self._by_prompt())

    def bootstrap(self, n: int = 1000, seed: int = 0, level: float = 0.95) -> Interval:
        """Percentile bootstrap over prompts: ``lower`` and ``upper`` of each effect.

        Args:
            n: Draws of prompts.
            seed: Of the draws.
            level: Probability between the bounds.

        Raises:
            TaskError: There is one prompt, or the method gives means only.
        """
        return bootstrap(self._by_prompt(), n, seed, level)

    def permutation_test(self, n: int = 10_000, seed: int = 0) -> PValues:
        """Sign-flip test that an effect is 0: p-values ``single`` and ``corrected`` for many cells.

        Args:
            n: Sign patterns; all of them are tried if they are not more than this.
            seed: Of random patterns.

        Raises:
            TaskError: There is one prompt, or the method gives means only.
        """
        return permutation_test(self._by_prompt(), n, seed)

    def _by_prompt(self) -> torch.Tensor:
        if self.values_by_prompt is None:
            raise TaskError(
                f"{self.metadata.get('method', 'This method')} gives means over prompts only",
                fix="activation_patching, which keeps every prompt's change",
            )
        return self.values_by_prompt

    def to_frame(self, *, significance: bool = False) -> Any:
        """A DataFrame, one row per intervention: coordinates, ``effect``, ``share``.

        Args:
            significance: Also ``se``, the standard error, and ``low`` and ``high``, the bounds of
                :meth:`bootstrap`.

        Raises:
            TaskError: Significance of one prompt, or of a method that gives means only.
        """
        import pandas as pd

        rows = []
        for coordinates in product(*(self.labels[axis] for axis in self.axes)):
            row: dict[str, Any] = {}
            for axis, value in zip(self.axes, coordinates, strict=True):
                row.update(value._asdict() if isinstance(value, FeatureId) else {axis: value})
            rows.append(row)
        frame = pd.DataFrame(rows, index=range(len(rows)))
        columns = {"effect": self.values, "share": self.share}
        if significance:
            low, high = self.bootstrap()
            columns.update(se=self.standard_error(), low=low, high=high)
        for name, values in columns.items():
            frame[name] = values.flatten().tolist()
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
        """A plotly figure: a heatmap for two axes, ranked bars for one.

        Raises:
            TaskError: There are more axes, or none.
        """
        if len(self.axes) not in (1, 2):
            first = self.axes[0] if self.axes else None
            raise TaskError(
                f"A figure shows one or two axes, these effects have {len(self.axes)}",
                exists=", ".join(self.axes) or f"one effect of {float(self.values):.4g}",
                fix=f"effects.at({first}={self.labels[first][0]!r}).plot()" if first else None,
            )
        title = f"{self.metadata['component']}: {self.metadata['method']}, {self.metadata['mode']}"
        title += "".join(f", {axis} {value}" for axis, value in self.metadata.get("at", {}).items())
        if len(self.axes) == 1:
            ranked = self.top(20)
            names = [" ".join(str(v) for v in row[:-2]) for row in ranked.itertuples(index=False)]
            return figures.bars(names, ranked["effect"].tolist(), title=title, x_title="effect")
        (y_title, rows), (x_title, columns) = map(self._ticks, self.axes)
        return figures.heatmap(
            self.values.cpu().numpy(),
            x=columns,
            y=rows,
            x_title=x_title,
            y_title=y_title,
            title=title,
            color_title="effect",
        )

    def _ticks(self, axis: str) -> tuple[str, list[Any]]:
        """Title and labels of an axis in a figure; positions are tokens of the first prompt."""
        tokens = self.metadata.get("tokens")
        if axis == "pos" and tokens:
            return "token", [tokens[position] for position in self.labels[axis]]
        return axis, list(self.labels[axis])

    def __repr__(self) -> str:
        meta = self.metadata
        shape = " x ".join(f"{len(self.labels[a])} {a}" for a in self.axes)
        answers = f"first prompt {meta['answers']}, " if meta.get("answers") else ""
        # Rounded first: no minus before zero.
        clean, corrupt = (
            round(meta.get(f"metric_{run}", float("nan")), 3) + 0.0 for run in ("clean", "corrupt")
        )
        excluded = ", ".join(map(str, meta.get("exclude") or ())) or "none"
        return (
            f"Effects({meta.get('component')}, {meta.get('method')}, {meta.get('mode')}, {shape}, "
            f"{answers}metric clean {clean:.3f}, corrupt {corrupt:.3f}, "
            f"excluded tokens {excluded}{conservation_text(meta)})"
        )
