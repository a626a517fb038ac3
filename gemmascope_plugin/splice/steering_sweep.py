"""The same steering at several strengths: from a push that vanishes to one that drowns the text.

Cost: that of its runs, which share one unsteered continuation and its forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, overload

import gemmascope_plugin.figures as figures
from gemmascope_plugin.splice.steering_report import ENDED, Steering, one_line, text_html


@dataclass(frozen=True, eq=False, repr=False)
class SteeringSweep(Sequence[Steering]):
    """Steering of one prompt with one feature at several strengths, in the order given."""

    runs: tuple[Steering, ...]
    """One per strength, at least one."""

    def __len__(self) -> int:
        return len(self.runs)

    @overload
    def __getitem__(self, index: int) -> Steering: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Steering, ...]: ...

    def __getitem__(self, index: int | slice) -> Steering | tuple[Steering, ...]:
        return self.runs[index]

    @property
    def before(self) -> str:
        """Continuation without steering."""
        return self.runs[0].before

    def to_frame(self) -> Any:
        """A DataFrame, one row per strength.

        Columns: ``strength``, ``text`` (the steered continuation), ``mean_kl``, ``max_kl``,
        ``relative_push``, ``tokens_changed``; see :class:`Steering`. ``answer_before`` and
        ``answer_after``, log-probabilities, where an answer was asked about.
        """
        import pandas as pd

        columns = ("mean_kl", "max_kl", "relative_push", "tokens_changed")
        rows = [
            (run.strength, run.after, *(getattr(run, column) for column in columns)) for run in self
        ]
        frame = pd.DataFrame(rows, columns=["strength", "text", *columns])
        answers = [run.answer for run in self if run.answer is not None]
        if answers:
            frame["answer_before"] = [answer.before for answer in answers]
            frame["answer_after"] = [answer.after for answer in answers]
        return frame

    def plot(self) -> Any:
        """A plotly figure: mean divergence against strength."""
        runs = sorted(self.runs, key=lambda run: run.strength)
        return figures.curves(
            [run.strength for run in runs],
            {"mean KL": [run.mean_kl for run in runs]},
            title=self._title(),
            x_title="strength",
            y_title="mean KL of the next token (nats)",
        )

    def _title(self) -> str:
        return self.runs[0].title(strength=False)

    def __repr__(self) -> str:
        lines = [
            f"SteeringSweep({self._title()}, {len(self)} strengths)",
            f"  prompt: {one_line(self.runs[0].prompt)}",
            f"  before: {one_line(self.before)}",
        ]
        lines += [
            f"  {run.strength:g}: {one_line(run.after)}  "
            f"(KL mean {run.mean_kl:.3g}, max {run.max_kl:.3g}; push {run.relative_push:.3g}; "
            f"{run.tokens_changed} {'token' if run.tokens_changed == 1 else 'tokens'} changed)"
            for run in self
        ]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        frame = self.to_frame()
        frame["text"] = [run.after or ENDED for run in self]
        return (
            f"<div><b>{escape(self._title())}</b>"
            f"{text_html('before', self.runs[0].prompt, self.before)}"
            f"{figures.frame_html(frame, max_rows=len(frame))}</div>"
        )
