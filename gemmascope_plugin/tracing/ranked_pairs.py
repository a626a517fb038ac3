"""The largest products of two sets of vectors, without all products at once.

Cost: one product of each pair; ``ROWS`` rows of them are in memory.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int64

ROWS = 512
"""Rows at a time."""


def ranked_pairs(
    first: Float[torch.Tensor, "row width"], second: Float[torch.Tensor, "column width"], top: int
) -> tuple[Int64[np.ndarray, " top"], Int64[np.ndarray, " top"], Float[np.ndarray, " top"]]:
    """Rows, columns and values of the largest absolute products that are not zero, by size.

    Args:
        first: One vector a row.
        second: One vector a column.
        top: How many at most.
    """
    rows, columns = (one.any(1).nonzero()[:, 0] for one in (first, second))
    parts = []
    for some in rows.split(ROWS):
        products = (first[some] @ second[columns].T).flatten()
        best = products.abs().topk(min(top, len(products))).indices
        row, column = best // max(len(columns), 1), best % max(len(columns), 1)
        parts.append((some[row], columns[column], products[best]))
    if not parts:
        empty = np.zeros(0, dtype=np.int64)
        return empty, empty, np.zeros(0)
    found = [torch.cat(values) for values in zip(*parts, strict=True)]
    order = found[2].abs().argsort(descending=True, stable=True)[:top]
    order = order[found[2][order] != 0]
    row, column, value = (values[order].cpu().numpy() for values in found)
    return row, column, value.astype(np.float64)
