"""What interventions did: a tensor of numbers with named axes, and how sure they are.

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

Tables, figures and text depend on the axes (``effects_view.py``); a result is kept in one file
(``effects_file.py``). Each number is a mean over prompts; where the change of every prompt is known as
well, the result says how sure it is:

1. Standard error: sample standard deviation over ``sqrt(prompts)``.
2. Bootstrap: prompts are drawn again with replacement, the mean of each draw is taken, and the interval
   lies between two percentiles of those means (Efron 1979).
3. Sign-flip test: if patching has no effect, each prompt's change is as likely negative as positive. The
   share of sign patterns under which the mean is at least as far from 0 is the p-value. All patterns
   are tried where there are at most ``n`` of them, else ``n`` random ones and the given one.
4. Correction for many cells: the share of patterns under which *any* cell is at least as extreme
   (max statistic; Westfall & Young 1993). So that cells compare, the statistic is the mean over the root
   mean square, which orders patterns as Student's t does.

Cost: of 2 to 4, ``cells * n * prompts`` multiplications, and memory for at most ``2^22`` numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float

import gemmascope_plugin.figures as figures
from gemmascope_plugin.causes.components import COMPONENTS
from gemmascope_plugin.causes.effects_file import load_effects, plain_effects, save_effects
from gemmascope_plugin.causes.effects_view import frame_of, plot_of, text_of, top_of
from gemmascope_plugin.causes.labelled_values import LabelledValues
from gemmascope_plugin.errors import InputError, TaskError
from gemmascope_plugin.models.protocol import describe, with_call

if TYPE_CHECKING:
    from pandas import DataFrame

    from gemmascope_plugin.figures.fragments import Figure

SHOWN = 10
"""Rows of a table in a notebook."""
_AT_ONCE = 1 << 22
"""Numbers held at a time."""


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


class Interval(NamedTuple):
    """Bounds per cell."""

    lower: torch.Tensor
    upper: torch.Tensor


class PValues(NamedTuple):
    """Probability of so large an effect by chance, per cell."""

    single: torch.Tensor
    """For the cell alone."""
    corrected: torch.Tensor
    """For any cell to be so extreme: below 0.05 in one of twenty sweeps without any effect."""


def standard_error(changes: Float[torch.Tensor, "*cell prompt"]) -> Float[torch.Tensor, "*cell"]:
    """Standard error of the mean over prompts."""
    _check_prompts(changes)
    return changes.double().std(-1) / changes.shape[-1] ** 0.5


def bootstrap(
    changes: Float[torch.Tensor, "*cell prompt"], n: int, seed: int, level: float
) -> Interval:
    """Percentile interval of the mean over prompts."""
    _check_prompts(changes)
    if not 0 < level < 1:
        raise TaskError(f"The level {level} is not a probability between 0 and 1", fix="level=0.95")
    n_prompts = changes.shape[-1]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(n_prompts, (n, n_prompts), generator=generator)
    weight = torch.zeros(n, n_prompts, dtype=torch.float64)
    weight.scatter_add_(1, drawn, torch.ones_like(weight))
    q = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    cells = _cells(changes)
    bounds = [
        (part @ weight.T / n_prompts).quantile(q, dim=-1)
        for part in cells.split(max(1, _AT_ONCE // n))
    ]
    lower, upper = torch.cat(bounds, 1).reshape(2, *changes.shape[:-1])
    return Interval(lower, upper)


def permutation_test(changes: Float[torch.Tensor, "*cell prompt"], n: int, seed: int) -> PValues:
    """Sign-flip test that the mean over prompts is 0."""
    _check_prompts(changes)
    cells = _cells(changes)
    root = cells.pow(2).mean(-1).sqrt()
    scaled = torch.where(root[:, None] > 0, cells / root[:, None], 0) / cells.shape[1]
    # a pattern that only rounding tells from the given one counts as it
    sizes = scaled.sum(-1).abs() * (1 - 1e-9)
    single, corrected = torch.zeros_like(sizes), torch.zeros_like(sizes)
    total, exact = 0, 2 ** cells.shape[1] <= n
    for signs in _patterns(cells.shape[1], n, seed, max(1, _AT_ONCE // len(cells))):
        flipped = (scaled @ signs.T).abs()
        single += (flipped >= sizes[:, None]).sum(-1)
        # most extreme cell per pattern, compared with every cell
        corrected += _at_least(flipped.amax(0), sizes)
        total += len(signs)
    if not exact:  # the given pattern is one of them
        single, corrected, total = single + 1, corrected + 1, total + 1
    shape = changes.shape[:-1]
    return PValues((single / total).reshape(shape), (corrected / total).reshape(shape))


def _at_least(
    values: Float[torch.Tensor, " pattern"], bounds: Float[torch.Tensor, " cell"]
) -> Float[torch.Tensor, " cell"]:
    """How many values reach each bound."""
    return len(values) - torch.searchsorted(values.sort().values, bounds).double()


def _patterns(n_prompts: int, n: int, seed: int, size: int) -> Iterator[torch.Tensor]:
    """Sign patterns ``[pattern, prompt]`` of -1 and 1, some at a time: all, or random ones."""
    everything = 2**n_prompts
    if everything <= n:
        for numbers in torch.arange(everything).split(size):
            bits = numbers[:, None] >> torch.arange(n_prompts) & 1
            yield 1 - 2 * bits.double()
        return
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, n, size):
        shape = (min(size, n - start), n_prompts)
        yield 1 - 2 * torch.randint(2, shape, generator=generator).double()


def _cells(changes: torch.Tensor) -> Float[torch.Tensor, "cell prompt"]:
    return changes.reshape(-1, changes.shape[-1]).double().cpu()


def _check_prompts(changes: torch.Tensor) -> None:
    if changes.shape[-1] < 2:
        raise TaskError("One prompt says nothing about others", fix="a task of several prompts")
