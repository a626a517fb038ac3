"""How sure a mean over prompts is: standard errors, bootstrap intervals, sign-flip tests.

1. Standard error: sample standard deviation over ``sqrt(prompts)``.
2. Bootstrap: prompts are drawn again with replacement, the mean of each draw is taken, and the interval
   lies between two percentiles of those means (Efron 1979).
3. Sign-flip test: if patching has no effect, each prompt's change is as likely negative as positive. The
   share of sign patterns under which the mean is at least as far from 0 is the p-value. All patterns
   are tried where there are at most ``n`` of them, else ``n`` random ones and the given one.
4. Correction for many cells: the share of patterns under which *any* cell is at least as extreme
   (max statistic; Westfall & Young 1993). So that cells compare, the statistic is the mean over the root
   mean square, which orders patterns as Student's t does.

All take changes ``[..., prompt]`` and work on all cells at once. Cost: ``cells * n * prompts``
multiplications; memory for at most ``2^22`` numbers at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float

from gemmascope_plugin.errors import TaskError

_AT_ONCE = 1 << 22
"""Numbers held at a time."""


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
    _check(changes)
    return changes.double().std(-1) / changes.shape[-1] ** 0.5


def bootstrap(
    changes: Float[torch.Tensor, "*cell prompt"], n: int, seed: int, level: float
) -> Interval:
    """Percentile interval of the mean over prompts."""
    _check(changes)
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
    _check(changes)
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


def _check(changes: torch.Tensor) -> None:
    if changes.shape[-1] < 2:
        raise TaskError("One prompt says nothing about others", fix="a task of several prompts")
