"""What interventions did: a tensor of numbers with named axes.

================== ================================ ===================================================
axes               of                               a number is
================== ================================ ===================================================
layer, head, pos,  patching, exact or estimated     the change of the metric if this part is patched
feature, site ...
writer, reader     edges                            the change if this reader sees another writer; 0
(and pos)                                           where no edge leads from one to the other
sender, receiver   paths                            the change along the paths between both
component          direct logit attribution         what it adds to the logit difference
layer, pos, token  logit lens                       the probability of a token after a layer
================== ================================ ===================================================

Each number is a mean over prompts. Where the change of every prompt is known as well, the result says how
sure it is: standard errors, intervals, p-values (``significance.py``). Tables, figures and text depend on
the axes (``effects_view.py``); a result is kept in one file (``effects_file.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import gemmascope_plugin.figures as figures
from gemmascope_plugin.causes.components import COMPONENTS
from gemmascope_plugin.causes.effects_file import load_effects, plain_effects, save_effects
from gemmascope_plugin.causes.effects_view import frame_of, plot_of, text_of, top_of
from gemmascope_plugin.causes.labelled_values import LabelledValues
from gemmascope_plugin.causes.significance import (
    Interval,
    PValues,
    bootstrap,
    permutation_test,
    standard_error,
)
from gemmascope_plugin.errors import InputError, TaskError
from gemmascope_plugin.models.protocol import describe, with_call

if TYPE_CHECKING:
    from pandas import DataFrame

    from gemmascope_plugin.figures.fragments import Figure

SHOWN = 10
"""Rows of a table in a notebook."""


@dataclass(frozen=True, eq=False, repr=False)
class Effects(LabelledValues):
    """Change of the metric per intervention, averaged over prompts.

    Example:
        >>> import gemmascope_plugin as gs
        >>> suite = gs.tiny()
        >>> task = gs.Task.builtin("induction", suite.model, n=4)
        >>> effects = gs.activation_patching(suite.model, task, "z", layers=[2], heads=[0, 1])
        >>> effects.axes, tuple(effects.values.shape)
        (('layer', 'head'), (1, 2))
    """

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

    def to_frame(self, *, significance: bool = False) -> DataFrame:
        """A DataFrame, one row per intervention: coordinates, ``effect``, ``share``.

        Edges have the columns ``source``, ``target`` and ``port``; the logit lens has ``token``, ``id``,
        ``rank`` and ``probability``.

        Args:
            significance: Also ``se``, the standard error, and ``low`` and ``high``, the bounds of
                :meth:`bootstrap`.

        Raises:
            TaskError: Significance of one prompt, or of a method that gives means only.
        """
        columns = {}
        if significance:
            low, high = self.bootstrap()
            columns = {"se": self.standard_error(), "low": low, "high": high}
        return frame_of(self, columns)

    def top(self, n: int = 10) -> DataFrame:
        """The ``n`` rows of :meth:`to_frame` with the largest absolute effect."""
        return top_of(self, n)

    def spearman(self, other: Effects) -> float:
        """Rank correlation with other effects of the same interventions; ties share their mean rank.

        Raises:
            TaskError: The two were measured on other interventions.
        """
        return self._correlation(other, by_rank=True)

    def pearson(self, other: Effects) -> float:
        """Correlation with other effects of the same interventions.

        Raises:
            TaskError: The two were measured on other interventions.
        """
        return self._correlation(other, by_rank=False)

    def _correlation(self, other: Effects, *, by_rank: bool) -> float:
        import pandas as pd

        names = [name for name in {**self.labels, **other.labels} if name != "pos"]
        axes = names if self.of_edges else {*self.labels, *other.labels}
        if any(self.labels.get(axis) != other.labels.get(axis) for axis in axes):
            raise TaskError(
                f"The effects are of different interventions: {self!r} and {other!r}",
                fix="the same component, prompts and features for both",
            )
        first, second = (pd.Series(effects.flat.tolist()) for effects in (self, other))
        if by_rank:
            first, second = first.rank(), second.rank()
        return float(first.corr(second))

    def plot(self) -> Figure:
        """A plotly figure: a heatmap for two axes, ranked bars for one.

        Edges are summed over positions. The logit lens names the most likely token of each layer and
        position; ``at(token=" Paris").plot()`` colours by the probability of one.

        Raises:
            TaskError: There are more axes, or none.
        """
        return plot_of(self)

    def save(self, path: str | Path) -> Path:
        """Keeps the effects in one file; an older file is replaced.

        Args:
            path: The file; its folder is made if need be.

        Returns:
            The path.

        Raises:
            GemmaScopeError: The file cannot be written, or metadata or labels do not fit into it.
        """
        return save_effects(path, self)

    @classmethod
    def load(cls, path: str | Path) -> Effects:
        """Reads what :meth:`save` has written, exactly.

        Raises:
            MissingFileError: There is no such file.
            BadFileError: It is damaged, contradicts itself, or is of another version.
        """
        return cls(**load_effects(path))

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values that JSON can hold; features and nodes as lists."""
        return plain_effects(self)

    def __repr__(self) -> str:
        return text_of(self)

    def _repr_html_(self) -> str:
        return f"<p>{escape(repr(self))}</p>{figures.frame_html(self.top(SHOWN), SHOWN)}"


def check_effects(effects: object, call: str = "") -> None:
    """Refuses what is not the result of patching nodes, exactly or by attribution."""
    if isinstance(effects, Effects) and effects.metadata.get("component") in COMPONENTS:
        return
    text = repr(effects) if isinstance(effects, Effects) else describe(effects)
    fix = "effects = gemmascope_plugin.attribution_patching(model, task, component)"
    raise InputError(f"{text} is not the effects of nodes", fix=with_call(fix, call))
