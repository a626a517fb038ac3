"""How edges are scored: what ``edge_attribution`` was asked for, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from gemmascope_plugin.causes.replace import Replacement
from gemmascope_plugin.causes.writes import DeltaForm
from gemmascope_plugin.errors import TaskError, check_choice
from gemmascope_plugin.types import Direction

EdgeMethod = Literal["eap", "eap-ig", "eap-ig-activations", "clean-corrupted"]
EDGE_METHODS = get_args(EdgeMethod)
MAX_ROWS = 64
"""Rows of one forward and backward pass by default."""
STEPS = 10
"""Points on the line by default."""


@dataclass(frozen=True)
class EdgeOptions:
    """How edges are scored.

    Raises:
        UnknownNameError: An unknown method, mode or form.
        TaskError: Options that do not go together, or no step.
    """

    method: Any = "eap-ig"
    steps: int | None = None
    mode: Any = "noising"
    writer_delta: Any = "exact"
    replacement: Replacement = "other"
    per_position: bool = False
    by_prompt: bool = False
    memory_budget: int | str = "2 GB"
    max_rows: int = MAX_ROWS

    def __post_init__(self) -> None:
        check_choice("method", self.method, EDGE_METHODS)
        check_choice("mode", self.mode, get_args(Direction))
        check_choice("writer_delta", self.writer_delta, get_args(DeltaForm))
        if self.steps is not None and not self.integrates:
            raise TaskError(
                f"steps plays no part in method={self.method!r}, which follows no line",
                fix="method='eap-ig', or without steps=",
            )
        if self.n_steps < 1:
            raise TaskError(f"steps={self.steps} are no steps", fix="steps=10")
        if self.replacement != "other" and self.method in ("eap-ig", "clean-corrupted"):
            raise TaskError(
                f"{self.method!r} goes from one prompt's run to another's, and replacement="
                f"{self.replacement!r} is no run of a prompt",
                fix="method='eap-ig-activations' or 'eap'",
            )
        if self.per_position and self.by_prompt:
            raise TaskError(
                "per_position and by_prompt together would keep every token's matrix",
                fix="one of them",
            )

    @property
    def integrates(self) -> bool:
        """Whether gradients are averaged along a line."""
        return self.method.startswith("eap-ig")

    @property
    def n_steps(self) -> int:
        """Points at which gradients are taken; 1 where there is no line."""
        if not self.integrates:
            return 1
        return STEPS if self.steps is None else self.steps
