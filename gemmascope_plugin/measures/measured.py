"""What all measures of one dictionary on one corpus have in common: of what, on what, and how it looks.

Cost: none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, eq=False, kw_only=True)
class Measured(ABC):
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
        import gemmascope_plugin.figures as figures

        return figures.frame_html(self.to_frame())
