"""The result of ``hierarchy``: figures as a row, edges as a table.

Cost: none; everything is measured in ``hierarchy.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from typing_extensions import override

from gemmascope_plugin.measures.measured import Measured
from gemmascope_plugin.measures.tree_recovery import Recovery


@dataclass(frozen=True, eq=False, kw_only=True)
class Hierarchy(Measured):
    """How hierarchical one dictionary is; ``to_frame`` has it as a row, ``edges`` edge by edge."""

    forest: str
    """Where the forest is from: ``"own"``, ``"mcs"`` or ``"given"``."""
    parent: Int[torch.Tensor, " d_sae"]
    """Parent of each feature, -1 for none."""
    edges: Any
    """A DataFrame, one row per edge whose child is active on ``min_tokens`` tokens: ``parent``,
    ``child``, ``n_parent``, ``n_child``, ``coverage``, ``mcs``; ``parent_concept``, ``child_concept``
    (None for no concept), ``is_ancestor`` (NA where one is None); ``hit`` (NA where not probed)."""
    sibling_iou: float
    """Mean overlap of the token sets of siblings; NaN without siblings."""
    s_res: float
    """Share of the probed edges that meet the reconstruction condition; NaN for none."""
    n_probed: int
    """Edges behind ``s_res``."""
    recovery: Recovery | None
    """Agreement with the known concepts; None without concepts."""
    chance: Recovery | None
    """The same of random parents."""

    @property
    def n_edges(self) -> int:
        """Number of edges that are judged."""
        return len(self.edges)

    @property
    def coverage(self) -> float:
        """Mean of ``S_cov`` over the edges; NaN without edges."""
        return float(self.edges["coverage"].mean())

    @property
    def mcs(self) -> float:
        """Mean masked cosine similarity over the edges; NaN without edges."""
        return float(self.edges["mcs"].mean())

    @property
    def binary_mcs(self) -> float:
        """Mean of ``sqrt(S_cov)`` over the edges; NaN without edges."""
        return float((self.edges["coverage"] ** 0.5).mean())

    @override
    def row(self) -> dict[str, Any]:
        """Every figure by name; those of known concepts where there are some."""
        found = {
            **self._what(),
            "forest": self.forest,
            "n_edges": self.n_edges,
            "coverage": self.coverage,
            "mcs": self.mcs,
            "binary_mcs": self.binary_mcs,
            "sibling_iou": self.sibling_iou,
            "s_res": self.s_res,
            "n_probed": self.n_probed,
        }
        for prefix, recovery in (("tree", self.recovery), ("chance", self.chance)):
            if recovery is not None:
                found |= {
                    f"{prefix}_precision": recovery.precision,
                    f"{prefix}_recall": recovery.recall,
                    f"{prefix}_f1": recovery.f1,
                    f"{prefix}_edge_recovery": recovery.edge_recovery,
                }
        return found

    def __repr__(self) -> str:
        tree = ""
        if self.recovery is not None and self.chance is not None:
            tree = (
                f", tree precision {self.recovery.precision:.3f} (chance "
                f"{self.chance.precision:.3f}), recall {self.recovery.recall:.3f} (chance "
                f"{self.chance.recall:.3f})"
            )
        return (
            f"Hierarchy({self._head()}, forest {self.forest!r}: {self.n_edges} edges, coverage "
            f"{self.coverage:.3f}, MCS {self.mcs:.3f}, siblings' overlap {self.sibling_iou:.3f}, "
            f"S_res {self.s_res:.3f} of {self.n_probed} edges{tree})"
        )
