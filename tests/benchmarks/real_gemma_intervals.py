"""Percentile intervals over resampled prompts, for the tables of ``real_gemma.py``.

1. A figure is a function of values per prompt, ``[prompt, ...]``.
2. Prompts are drawn with replacement ``n`` times, the same draws for every table entry that is compared.
3. The interval is from the 2.5th to the 97.5th percentile of the figure over the draws.

Cost: ``n`` times the figure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float

Figure = Callable[..., float]
DRAWS = 500
LEVEL = 0.95


@dataclass(frozen=True)
class Measured:
    """A figure and its interval over prompts."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def over_prompts(figure: Figure, *by_prompt: Float[torch.Tensor, "prompt ..."]) -> Measured:
    """``figure`` of the means over prompts, with its interval.

    Args:
        figure: Takes one mean per tensor.
        *by_prompt: Tensors over the same prompts.
    """
    n_prompts = len(by_prompt[0])
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(n_prompts, (DRAWS, n_prompts), generator=generator)
    values = torch.tensor(
        [figure(*(values[draw].mean(0) for values in by_prompt)) for draw in draws]
    )
    tails = torch.tensor([0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    low, high = values.nanquantile(tails).tolist()
    return Measured(figure(*(values.mean(0) for values in by_prompt)), low, high)


def pearson(x: Float[torch.Tensor, " unit"], y: Float[torch.Tensor, " unit"]) -> float:
    """Pearson's correlation."""
    return float(torch.corrcoef(torch.stack([x.double(), y.double()]))[0, 1])


def spearman(x: Float[torch.Tensor, " unit"], y: Float[torch.Tensor, " unit"]) -> float:
    """Spearman's correlation; ties do not occur among measured effects."""
    return pearson(*(values.argsort().argsort().double() for values in (x, y)))
