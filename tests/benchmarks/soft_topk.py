"""What does the soft top-k cost, against SAELens' hard top-k in the same process on the same scores?

    python -m tests.benchmarks.soft_topk [--rows 4096] [--width 16384] [--threads 2] [--smoke]

Random normal scores, as they are and after ReLU, float32.  Every call runs once before it is timed; the
sides take turns; medians.  A ratio of 3 means that the soft one takes three times as long.

The last lines say what the alternatives would cost on 256 rows: 40 halvings of the interval that holds
``b``, which miss the sum by 2e-3 at ``alpha`` 1e-4, and sorting whole rows, without the rest of a
solution that would start from it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from sae_lens.saes.topk_sae import TopK

from gemmascope_plugin.saes import soft_topk

REPEATS = 7


def medians(*runs: Callable[[], object]) -> list[float]:
    """Median seconds of each call; they take turns, after one round that does not count."""
    times: list[list[float]] = [[] for _ in runs]
    for i in range(REPEATS + 1):
        for run, series in zip(runs, times, strict=True):
            start = time.perf_counter()
            result = run()
            if i:
                series.append(time.perf_counter() - start)
            del result
    return [statistics.median(series) for series in times]


def both_ways(select: Callable[[torch.Tensor], torch.Tensor], scores: torch.Tensor) -> object:
    """Forward and backward, into a gradient of the scores."""
    leaf = scores.detach().requires_grad_()
    return torch.autograd.grad(select(leaf), leaf, scores)


def bisection(scores: torch.Tensor, k: int, alpha: float) -> torch.Tensor:
    """The obvious solution, in float32."""
    low, high = scores.amin(-1, True) - 60 * alpha, scores.amax(-1, True) + 60 * alpha
    weights = scores
    for _ in range(40):
        b = (low + high) / 2
        u = (scores - b) / alpha
        half = torch.exp(-u.abs()) / 2
        weights = torch.where(u > 0, 1 - half, half)
        over = weights.sum(-1, keepdim=True) > k
        low, high = torch.where(over, b, low), torch.where(over, high, b)
    return weights


def compare(scores: torch.Tensor, k: int, alpha: float, kind: str) -> None:
    """One line: forward, and forward with backward."""
    hard = TopK(k)

    def soft(x: torch.Tensor) -> torch.Tensor:
        return soft_topk(x, k, alpha)

    def used(x: torch.Tensor) -> torch.Tensor:
        return x * soft_topk(x, k, alpha)

    forward = medians(lambda: hard(scores), lambda: soft(scores))
    both = medians(*(lambda f=f: both_ways(f, scores) for f in (hard, soft, used)))
    error = float((soft(scores).sum(-1, dtype=torch.float64) - k).abs().max())
    print(
        f"{kind:6} k {k:3} alpha {alpha:<6g} forward {forward[0] * 1e3:5.0f} -> "
        f"{forward[1] * 1e3:5.0f} ms: {forward[1] / forward[0]:.2f}x;  with backward "
        f"{both[0] * 1e3:5.0f} -> {both[1] * 1e3:5.0f} ms: {both[1] / both[0]:.2f}x, times the "
        f"scores {both[2] / both[0]:.2f}x;  |sum - k| <= {error:.0e}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--width", type=int, default=16384)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="16 rows of 1,024 scores")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.rows, options.width, options.threads = 16, 1024, 1
    torch.set_num_threads(options.threads)
    normal = torch.randn(options.rows, options.width, generator=torch.Generator().manual_seed(0))
    print(f"{options.rows} x {options.width}, float32, {options.threads} threads: hard -> soft")
    for kind, scores in (("normal", normal), ("relu", normal.relu())):
        for k in (64, 320):
            for alpha in (1.0, 0.05, 1e-4):
                compare(scores, k, alpha, kind)
    few = normal[:256]
    fast, halvings, sort = medians(
        lambda: soft_topk(few, 64, 0.05), lambda: bisection(few, 64, 0.05), lambda: few.sort(-1)
    )
    print(
        f"256 rows, k 64, alpha 0.05: ours {fast * 1e3:.0f} ms, 40 halvings {halvings / fast:.1f}x, "
        f"sorting alone {sort / fast:.1f}x"
    )


if __name__ == "__main__":
    main()
