"""What steering did: both continuations, and what changed at every position of the same text.

1. The report is *teacher-forced*: both runs read the prompt and the unsteered continuation, so position
   ``i`` compares what is predicted after the same tokens, and not where two texts have drifted apart.
2. ``KL(before || after) = sum_v p_v (log p_v - log q_v)`` in nats, ``p`` and ``q`` the distributions of
   the next token, in float32 whatever the type of the model.
3. Means are over the tokens that are not excluded (BOS, EOS, PAD by default).

Cost: nothing beyond what ``steering_run.py`` measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import zip_longest
from typing import Any, Literal, get_args, overload

import torch
from jaxtyping import Bool, Float

import gemmascope_plugin.figures as figures
from gemmascope_plugin.errors import number_of
from gemmascope_plugin.splice.sampling import Sampling

Method = Literal["add", "orthogonal"]
"""``add``: the direction is added. ``orthogonal``: what points along it is multiplied."""

METHODS: tuple[Method, ...] = get_args(Method)

ENDED = "(the text ends)"
"""Stands for a continuation without any token."""


@dataclass(frozen=True)
class AnswerChange:
    """An answer's log-probability without and with steering, in nats."""

    answer: str
    wrong: str | None
    before: float
    """Minus that of ``wrong``, where there is one."""
    after: float

    def __repr__(self) -> str:
        against = "" if self.wrong is None else f" against {self.wrong!r}"
        return f"{self.answer!r}{against} {self.before:+.3f} -> {self.after:+.3f} nats"


@dataclass(frozen=True, eq=False)
class NextTokens:
    """Distributions of the next token before and after, per position."""

    kl: Float[torch.Tensor, " pos"]
    """``KL(before || after)`` in nats."""
    top_before: tuple[str, ...]
    """The most probable next token before."""
    p_before: Float[torch.Tensor, " pos"]
    """Its probability before."""
    p_after: Float[torch.Tensor, " pos"]
    """Its probability after."""
    top_after: tuple[str, ...]
    """The most probable next token after."""
    p_top_after: Float[torch.Tensor, " pos"]
    """Its probability after."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Steering:
    """A continuation without and with steering, and what changed on the way."""

    prompt: str
    before: str
    """Continuation without steering; ``prompt + before`` is the whole text."""
    after: str
    """Continuation with steering; ``prompt + after`` is the whole text."""
    feature: int
    strength: float
    method: Method
    site: str
    """Output hook of the dictionary, where the model was steered."""
    exclude: tuple[str | int, ...]
    """Special tokens that were not steered."""
    sampling: Sampling
    """How both continuations were drawn."""
    tokens: tuple[str, ...]
    """Tokens of the prompt and of the unsteered continuation: the text of everything per position."""
    ids_before: tuple[int, ...]
    """Token ids of the unsteered continuation, without special tokens at its end."""
    ids_after: tuple[int, ...]
    """Token ids of the steered continuation, without special tokens at its end."""
    is_kept: Bool[torch.Tensor, " pos"]
    """False at excluded tokens."""
    steered: Bool[torch.Tensor, " pos"]
    """True at the tokens that were steered."""
    next_tokens: NextTokens
    """Both distributions of the next token, per position."""
    relative_push: float
    """Length of what was added over the length of the activation, mean over the steered tokens of the
    text; NaN if none of them was steered. Far above 1 the activation drowns; below 0.004 most of it
    is lost in the rounding of a model in bfloat16."""
    answer: AnswerChange | None = None
    """Log-probability of an answer that was asked about, without and with steering."""

    @property
    def kl(self) -> Float[torch.Tensor, " pos"]:
        """``KL(unsteered || steered)`` of the next token at every position, in nats."""
        return self.next_tokens.kl

    @property
    def mean_kl(self) -> float:
        """Mean of :attr:`kl` over the tokens that are not excluded."""
        return float(self.kl[self.is_kept].mean())

    @property
    def max_kl(self) -> float:
        """Largest :attr:`kl` at a token that is not excluded."""
        return float(self.kl[self.max_kl_pos])

    @property
    def max_kl_pos(self) -> int:
        """Position of :attr:`max_kl`."""
        return int(self.kl.masked_fill(~self.is_kept, -1.0).argmax())

    @property
    def first_difference(self) -> int | None:
        """First position of the whole text at which the continuations differ; None if nowhere."""
        return min(self._differences(), default=None)

    @property
    def tokens_changed(self) -> int:
        """Number of positions at which the continuations differ, also where only one goes on."""
        return len(self._differences())

    def _differences(self) -> list[int]:
        start = len(self.tokens) - len(self.ids_before)
        pairs = zip_longest(self.ids_before, self.ids_after)
        return [start + i for i, (before, after) in enumerate(pairs) if before != after]

    def to_frame(self) -> Any:
        """A DataFrame, one row per position.

        Columns: ``pos``, ``token``, ``steered``, ``kl``; ``top_before``, the most probable next token
        without steering, with its probability ``p_before`` without and ``p_after`` with steering;
        ``top_after``, the most probable one with steering, with its probability ``p_top_after``.
        """
        import pandas as pd

        after = self.next_tokens
        columns = {
            "pos": range(len(self.tokens)),
            "token": self.tokens,
            "steered": self.steered.tolist(),
            "kl": self.kl.tolist(),
            "top_before": after.top_before,
            "p_before": after.p_before.tolist(),
            "p_after": after.p_after.tolist(),
            "top_after": after.top_after,
            "p_top_after": after.p_top_after.tolist(),
        }
        return pd.DataFrame(columns)

    def plot(self) -> Any:
        """A plotly figure: the divergence at every token."""
        return figures.curves(
            range(len(self.tokens)),
            {"KL": self.kl.tolist()},
            title=self.title(),
            x_title="token",
            y_title="KL of the next token (nats)",
            ticks=self.tokens,
        )

    def title(self, *, strength: bool = True) -> str:
        """What was done, in one line; with how strongly, unless ``strength=False``."""
        excluded = ", ".join(map(str, self.exclude)) or "nothing"
        how = f"{self.method}, strength {self.strength:g}" if strength else self.method
        return f"{self.site} feature {self.feature}, {how}, excluded {excluded}"

    def summary(self) -> str:
        """The figures, in one line."""
        first = self.first_difference
        differ = "same text" if first is None else f"texts differ from position {first}"
        return (
            f"mean {self.mean_kl:.3g} nats, max {self.max_kl:.3g} after "
            f"{self.tokens[self.max_kl_pos]!r} (position {self.max_kl_pos}); "
            f"push {self.relative_push:.3g} of the activation; {differ}"
        )

    def __repr__(self) -> str:
        return (
            f"Steering({self.title()})\n  prompt: {one_line(self.prompt)}\n"
            f"  before: {one_line(self.before)}\n  after:  {one_line(self.after)}\n"
            f"  KL:     {self.summary()}"
            + ("" if self.answer is None else f"\n  answer: {self.answer}")
        )

    def _repr_html_(self) -> str:
        rows = [("KL (nats)", self.kl.tolist())]
        return (
            f"<div>{figures.token_rows_html(self.tokens, rows, title=self.title())}"
            f"{_text_html('before', self.prompt, self.before)}"
            f"{_text_html('after', self.prompt, self.after)}"
            f"<p><small>{escape(self.summary())}</small></p>"
            + ("" if self.answer is None else f"<p><small>{escape(repr(self.answer))}</small></p>")
            + "</div>"
        )


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
            f"{number_of(run.tokens_changed, 'token')} changed)"
            for run in self
        ]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        frame = self.to_frame()
        frame["text"] = [run.after or ENDED for run in self]
        return (
            f"<div><b>{escape(self._title())}</b>"
            f"{_text_html('before', self.runs[0].prompt, self.before)}"
            f"{figures.frame_html(frame, max_rows=len(frame))}</div>"
        )


def one_line(text: str) -> str:
    """A text without blanks around it, its line ends written as in Python; words if there is none."""
    return text.strip(" ").replace("\n", "\\n").replace("\r", "\\r") or ENDED


def _text_html(name: str, prompt: str, continuation: str) -> str:
    """Prompt and continuation as a line of HTML, the continuation marked."""
    return (
        f'<div style="white-space:pre-wrap"><b>{escape(name)}</b> {escape(prompt)}'
        f"<mark>{escape(continuation or ENDED)}</mark></div>"
    )
