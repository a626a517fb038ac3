"""Results of measures of one dictionary on one corpus: figures as a row, and how they look.

:class:`Measured` is what they have in common: of what, and on what. :class:`Measures` is made by
``measure.py``, :class:`Hierarchy`, with its table of edges, by ``hierarchy.py``.

Cost: none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from typing_extensions import override

import gemmascope_plugin.figures as figures
from gemmascope_plugin.files.bundle import plain_values
from gemmascope_plugin.files.stored_result import TABLE, TENSOR, StoredResult, record_of
from gemmascope_plugin.measures.forest_scores import Recovery
from gemmascope_plugin.splice import HookedSAE
from gemmascope_plugin.splice.fit import SpliceLoss

DENSE = 0.1
"""A feature active on a larger share of the tokens is dense."""
BIN_EDGES = tuple(10 ** (k / 2) for k in range(-10, 1))
"""Upper edges of the frequency bins: half decades from 1e-5 to 1. Each bin holds its upper edge."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Measured(StoredResult, ABC):
    """Figures of one dictionary; ``row`` has them by name."""

    hook_in: str
    hook_out: str
    d_sae: int
    level: int | None
    """Level of a nested dictionary; None for the whole."""
    n_tokens: int
    exclude: tuple[str | int, ...]
    """Special tokens that were left out."""

    @abstractmethod
    def row(self) -> dict[str, Any]:
        """Every figure by name, beginning with what was measured."""

    def to_frame(self) -> Any:
        """A DataFrame of one row, a column per figure."""
        import pandas as pd

        return pd.DataFrame([self.row()])

    def to_json(self) -> dict[str, Any]:
        """The row and the excluded tokens as plain values; numbers that are not finite are None."""
        return plain_values({**self.row(), "exclude": self.exclude})

    def _what(self) -> dict[str, Any]:
        """The beginning of the row."""
        return {
            "hook_in": self.hook_in,
            "hook_out": self.hook_out,
            "d_sae": self.d_sae,
            "level": self.level,
            "n_tokens": self.n_tokens,
        }

    def _head(self) -> str:
        """The beginning of the repr."""
        route = self.hook_out
        if self.hook_in != self.hook_out:
            route = f"{self.hook_in} -> {self.hook_out}"
        level = "" if self.level is None else f", level {self.level}"
        return (
            f"{route}{level}, {self.d_sae} features, {self.n_tokens} tokens, excluded "
            f"{self.exclude}"
        )

    def _repr_html_(self) -> str:
        return figures.frame_html(self.to_frame())


def subject(hooked: HookedSAE, n_tokens: int, exclude: tuple[str | int, ...]) -> dict[str, Any]:
    """The fields of a result that say of what it is."""
    return {
        "hook_in": hooked.hook_in,
        "hook_out": hooked.hook_out,
        "d_sae": hooked.d_sae,
        "level": hooked.level,
        "n_tokens": n_tokens,
        "exclude": exclude,
    }


@dataclass(frozen=True, eq=False, kw_only=True)
class Measures(Measured):
    """What was measured of one dictionary; ``to_frame`` has it as a row."""

    noun = "measures"

    l0: float
    """Mean number of active features per token."""
    fvu: float
    """Squared error over squared distance from the mean; NaN where the tokens do not vary."""
    losses: SpliceLoss = field(metadata=record_of(SpliceLoss))
    frequencies: Float[torch.Tensor, " d_sae"] = field(metadata=TENSOR)
    """Share of the tokens on which each feature is active."""
    r_l0: float
    """Uniformity of active features' importance, between 1 / L0 and 1."""
    r_l0_tokens: int
    """Number of tokens behind ``r_l0``."""
    max_cosine: float
    """Mean over decoder rows of the largest cosine with another row."""

    @property
    def delta_loss(self) -> float:
        """Rise of the next-token loss, in nats, with the reconstruction in place of its site."""
        return self.losses.delta

    @property
    def dead_share(self) -> float:
        """Share of the features that are active on none of these tokens."""
        return float((self.frequencies == 0).float().mean())

    @property
    def dense_share(self) -> float:
        """Share of the features that are active on more than a tenth of these tokens."""
        return float((self.frequencies > DENSE).float().mean())

    def histogram(self) -> Any:
        """A DataFrame, one row per bin of firing frequency: ``above``, ``up_to``, ``n_features``.

        The first row, ``up_to`` 0, counts the features that never fire. Bins are half decades; a
        frequency on an edge belongs to the bin below it.
        """
        import pandas as pd

        edges = torch.tensor(BIN_EDGES, dtype=torch.float64)
        alive = self.frequencies[self.frequencies > 0].double().cpu()
        counts = torch.bincount(torch.bucketize(alive, edges), minlength=len(edges)).tolist()
        rows = [(0.0, 0.0, self.d_sae - len(alive))]
        rows += zip((0.0, *BIN_EDGES[:-1]), BIN_EDGES, counts, strict=True)
        return pd.DataFrame(rows, columns=["above", "up_to", "n_features"])

    @override
    def row(self) -> dict[str, Any]:
        """Every figure by name."""
        return {
            **self._what(),
            "l0": self.l0,
            "fvu": self.fvu,
            "delta_loss": self.delta_loss,
            "share_of_zero": self.losses.share_of_zero,
            "share_of_mean": self.losses.share_of_mean,
            "dead_share": self.dead_share,
            "dense_share": self.dense_share,
            "r_l0": self.r_l0,
            "max_cosine": self.max_cosine,
        }

    def __repr__(self) -> str:
        return (
            f"Measures({self._head()}: L0 {self.l0:.1f}, FVU {self.fvu:.3f}, delta loss "
            f"{self.delta_loss:.4f} ({self.losses.share_of_zero:.1%} of zeros, "
            f"{self.losses.share_of_mean:.1%} of the mean), dead {self.dead_share:.1%}, dense "
            f"{self.dense_share:.1%}, r_L0 {self.r_l0:.3f}, max cosine {self.max_cosine:.3f})"
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class Hierarchy(Measured):
    """How hierarchical one dictionary is; ``to_frame`` has it as a row, ``edges`` edge by edge."""

    noun = "hierarchy"

    forest: str
    """Where the forest is from: ``"own"``, ``"mcs"`` or ``"given"``."""
    parent: Int[torch.Tensor, " d_sae"] = field(metadata=TENSOR)
    """Parent of each feature, -1 for none."""
    edges: Any = field(metadata=TABLE)
    """A DataFrame, one row per edge whose child is active on ``min_tokens`` tokens: ``parent``,
    ``child``, ``n_parent``, ``n_child``, ``coverage``, ``mcs``; ``parent_concept``, ``child_concept``
    (None for no concept), ``is_ancestor`` (NA where one is None); ``hit`` (NA where not probed)."""
    sibling_iou: float
    """Mean overlap of the token sets of siblings; NaN without siblings."""
    s_res: float
    """Share of the probed edges that meet the reconstruction condition; NaN for none."""
    n_probed: int
    """Edges behind ``s_res``."""
    recovery: Recovery | None = field(metadata=record_of(Recovery))
    """Agreement with the known concepts; None without concepts."""
    chance: Recovery | None = field(metadata=record_of(Recovery))
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
        figures = {
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
                figures |= {
                    f"{prefix}_precision": recovery.precision,
                    f"{prefix}_recall": recovery.recall,
                    f"{prefix}_f1": recovery.f1,
                    f"{prefix}_edge_recovery": recovery.edge_recovery,
                }
        return figures

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
