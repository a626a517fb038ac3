"""What a trace explains: logits, differences of logits, directions of the stream, features.

The logit of a token before the soft-cap is ``<W_U[:, y], w_f x / s_f>``. A logit alone says little: all
logits may rise together. Targets are therefore ``W_U[:, y] - mean_v W_U[:, v]``, or the difference of two
tokens, as in Ameisen et al., "Circuit Tracing", 2025.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float

from gemmascope_plugin.arguments import as_index
from gemmascope_plugin.errors import TaskError, WidthMismatchError
from gemmascope_plugin.models.protocol import check_finite
from gemmascope_plugin.models.tokens import token_id, token_label
from gemmascope_plugin.models.unembed import all_logits, unembedding
from gemmascope_plugin.tracing.linear.frozen_pass import FrozenPass
from gemmascope_plugin.tracing.linear.trace_site import PER_LAYER

WORDS = 8192
"""Rows of the unembedding that are added up at a time."""


@dataclass(frozen=True)
class Logit:
    """The logit of a token, minus the mean of all tokens."""

    token: str | int
    position: int = -1


@dataclass(frozen=True)
class LogitDifference:
    """The logit of a token minus that of another."""

    token: str | int
    other: str | int
    position: int = -1


@dataclass(frozen=True, eq=False)
class StreamDirection:
    """The product of the residual stream with a vector, such as a probe."""

    vector: Float[torch.Tensor, " d_model"]
    layer: int
    """Behind which layer the stream is read."""
    position: int = -1
    name: str = "direction"


@dataclass(frozen=True)
class FeatureTarget:
    """The pre-activation of an active feature."""

    site: str
    """The output hook of its dictionary, as caches name it."""
    feature: int
    position: int = -1


Target = str | int | tuple[Any, Any] | Logit | LogitDifference | StreamDirection | FeatureTarget


@dataclass(frozen=True, eq=False)
class Seed:
    """A non-feature target: a vector that reads the stream."""

    label: str
    position: int
    after: int
    """When it enters the sweep."""
    vector: Float[torch.Tensor, " d_model"]
    constant: float
    value: float
    """What it explains."""
    token: int
    """The token; -1 for what is not one token's logit."""
    probability: float
    """Of that token; 1 for others."""
    source: tuple[Any, ...]
    """What was asked for, in words and numbers: ``("logit", token, position)`` and so on."""

    @property
    def name(self) -> str:
        """What no other target of a trace is called: by numbers, as two tokens may look alike."""
        return f"{':'.join(map(str, self.source[:-1]))}@{self.position}"


def as_target(target: Target) -> Logit | LogitDifference | StreamDirection | FeatureTarget:
    """A word or id is a logit, a pair of them a difference."""
    if isinstance(target, str) or (number := as_index(target)) is not None:
        return Logit(target if isinstance(target, str) else number)  # pyright: ignore
    if isinstance(target, tuple) and len(target) == 2:
        return LogitDifference(*target)
    if isinstance(target, (Logit, LogitDifference, StreamDirection, FeatureTarget)):
        return target
    raise TaskError(
        f"{target!r} is not a target",
        fix='"word", ("word", "other"), Logit(...), LogitDifference(...), StreamDirection(...) or '
        "FeatureTarget(...)",
    )


def position_in(position: int, n_pos: int) -> int:
    """A position counted from the start."""
    if not -n_pos <= position < n_pos:
        raise TaskError(
            f"Target position {position} lies outside the prompt of {n_pos} tokens",
            exists=f"positions 0 to {n_pos - 1}, or {-n_pos} to -1 from the end",
        )
    return position % n_pos


class Readout:
    """Logits of a frozen pass as vectors that read the end of the stream."""

    def __init__(self, frozen: FrozenPass) -> None:
        self._frozen = frozen
        self._out = unembedding(frozen.model)
        self._mean = check_finite(self._mean_row(), "The mean of the unembedding", frozen.model)
        self._chances: dict[int, torch.Tensor] = {}
        self._scale = frozen.final_scale()
        self._b_U = self._out.bias

    def top(self, count: int, share: float, position: int) -> list[Seed]:
        """The likeliest next tokens, ``count`` at most: as many as reach a share of the probability."""
        values, ids = self._probabilities(position).topk(min(count, self._out.d_vocab))
        enough = int((values.cumsum(0) < share).sum()) + 1
        return [self.logit(Logit(int(token), position)) for token in ids[:enough]]

    def seed(self, target: Logit | LogitDifference | StreamDirection) -> Seed:
        """A non-feature target."""
        if isinstance(target, Logit):
            return self.logit(target)
        if isinstance(target, LogitDifference):
            return self.difference(target)
        return self.direction(target)

    def logit(self, target: Logit) -> Seed:
        """One token's logit minus the mean."""
        position = position_in(target.position, self._frozen.n_pos)
        token = self._id(target.token, position)
        chance = float(self._probabilities(position)[token])
        bias = 0.0 if self._b_U is None else float(self._b_U[token] - self._b_U.mean())
        vector = self._row(token) - self._mean
        source = ("logit", token, position)
        return self._seed(self._word(token), vector, bias, token, chance, source)

    def difference(self, target: LogitDifference) -> Seed:
        """One token's logit minus another's."""
        position = position_in(target.position, self._frozen.n_pos)
        token, other = (self._id(word, position) for word in (target.token, target.other))
        if token == other:
            raise TaskError(f"The difference of {self._word(token)!r} and itself is zero")
        bias = 0.0 if self._b_U is None else float(self._b_U[token] - self._b_U[other])
        vector = self._row(token) - self._row(other)
        words = self._word(token), self._word(other)
        label = " - ".join(word if word == word.strip() else repr(word) for word in words)
        source = ("difference", token, other, position)
        return self._seed(label, vector, bias, -1, 1.0, source)

    def direction(self, target: StreamDirection) -> Seed:
        """A vector at the stream behind a layer."""
        frozen, layer = self._frozen, target.layer
        if not 0 <= layer < frozen.n_layers:
            raise TaskError(
                f"There is no layer {layer}", exists=f"layers 0 to {frozen.n_layers - 1}"
            )
        if target.vector.shape != (frozen.anatomy.d_model,):
            raise WidthMismatchError(
                f"The direction has shape {tuple(target.vector.shape)}, the stream width "
                f"{frozen.anatomy.d_model}"
            )
        vector = target.vector.to(self._mean)
        if not bool(vector.isfinite().all()) or not bool(vector.any()):
            raise TaskError(
                f"The direction {target.name!r} is zero or not finite: there is nothing to explain",
                fix="a vector of finite numbers, not all of them 0",
            )
        position = position_in(target.position, frozen.n_pos)
        value = float(vector @ frozen.stream(layer + 1)[position])
        after = PER_LAYER * layer + PER_LAYER - 1
        source = ("direction", target.name, layer, position)
        return Seed(target.name, position, after, vector, 0.0, value, -1, 1.0, source)

    def _seed(
        self,
        label: str,
        vector: torch.Tensor,
        bias: float,
        token: int,
        chance: float,
        source: tuple[Any, ...],
    ) -> Seed:
        position = source[-1]
        frozen, gain = self._frozen, self._frozen.anatomy.ln_final.gain
        reads = vector if gain is None else vector * gain.to(vector)
        reads = reads / self._scale[position]
        value = float(reads @ frozen.stream(frozen.n_layers)[position]) + bias
        after = PER_LAYER * frozen.n_layers - 1
        return Seed(label, position, after, reads, bias, value, token, chance, source)

    def _probabilities(self, position: int) -> Float[torch.Tensor, " d_vocab"]:
        """The model's own, after the soft-cap; once a position."""
        if position not in self._chances:
            frozen = self._frozen
            end = self._out.read(frozen.stream(frozen.n_layers)[position][None])
            chances = all_logits(self._out, end)[0].softmax(-1)
            self._chances[position] = check_finite(
                chances, "The probability by token", frozen.model
            )
        return self._chances[position]

    def _row(self, token: int) -> Float[torch.Tensor, " d_model"]:
        return self._out.weight[token].to(self._mean)

    def _mean_row(self) -> Float[torch.Tensor, " d_model"]:
        """Over all words, some at a time: the unembedding is never copied as a whole."""
        total = self._frozen.embed.new_zeros(self._frozen.anatomy.d_model, dtype=torch.float64)
        for rows in self._out.weight.split(WORDS):
            total += rows.to(self._frozen.dtype).sum(0)
        return (total / self._out.d_vocab).to(self._frozen.dtype)

    def _id(self, token: str | int, position: int) -> int:
        return token_id(self._frozen.model, token, self._frozen.tokens[: position + 1])

    def _word(self, token: int) -> str:
        return token_label(self._frozen.model, token)


def check_distinct(targets: Sequence[tuple[Any, str, int]]) -> None:
    """Refuses a target that is there twice; each is an identity, a label and a position."""
    identities: set[Any] = set()
    for identity, label, position in targets:
        if identity in identities:
            raise TaskError(
                f"The target {label!r} at position {position} is given twice",
                fix="each target once",
            )
        identities.add(identity)
