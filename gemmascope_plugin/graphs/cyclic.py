"""The matrix of a graph whose groups of nodes may reach each other both ways.

Two groups, or a group and a node between its members, can lead into each other, though their members
never do. Influence then goes round, less of it each time: ``I = sum_k w M^k`` is summed until what is
left is too small to matter. It ends, as each time some of it reaches nodes that nothing explains.

Cost: one pass over the entries per step; some tens of steps.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from gemmascope_plugin.errors import GemmaScopeError
from gemmascope_plugin.graphs.adjacency import Adjacency

MAX_STEPS = 10_000
"""A path that is longer goes round for ever."""
TOLERANCE = 1e-13
"""What is left of the influence, as a share of all."""


class Cyclic(Adjacency):
    """Direct effects in no order."""

    def entries(self, keep: np.ndarray) -> Cyclic:
        """The same with only some entries left.

        Args:
            keep: True for those that stay, one per entry.
        """
        cut = super().entries(keep)
        return Cyclic(cut.matrix, cut.nodes)

    def compacted(self, nodes: np.ndarray) -> Cyclic:
        """Only some nodes, numbered anew.

        Args:
            nodes: True for those, ``[node]``.
        """
        cut = super().compacted(nodes)
        return Cyclic(cut.matrix, cut.nodes)

    @cached_property
    def normalised(self) -> Cyclic:
        """``Abar`` of all columns."""
        found = super().normalised
        return Cyclic(found.matrix, found.nodes)

    def influence(self, weights: np.ndarray) -> np.ndarray:
        """``sum_k w M^k`` of this matrix as it is, ``k >= 1``.

        Args:
            weights: Of the nodes, ``[node]``.

        Raises:
            GemmaScopeError: The sum has no end.
        """
        matrix = self.matrix.astype(np.float64)
        found, step = np.zeros(self.n_nodes), np.asarray(weights, dtype=np.float64)
        for _ in range(MAX_STEPS):
            step = step[self.nodes] @ matrix
            found += step
            if np.abs(step).max(initial=0) <= TOLERANCE * np.abs(found).max(initial=0):
                return found
        raise GemmaScopeError(
            "Influence goes round in the graph for ever", fix="groups without a cycle between them"
        )


def in_any_order(matrix: Any, nodes: np.ndarray) -> Adjacency:
    """Rows of a graph; in the order of the pass, in which one walk over them is enough, or in none.

    Args:
        matrix: ``scipy.sparse.csr_array [row, node]``.
        nodes: The node of each row, ascending.
    """
    targets = np.repeat(nodes, np.diff(matrix.indptr))
    return (Adjacency if (matrix.indices < targets).all() else Cyclic)(matrix, nodes)
