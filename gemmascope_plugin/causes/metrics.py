"""The usual metrics. All are signed so that higher is better.

==================== =============================================================================
``logit_diff``       ``logit(answer) - logit(wrong)``; a set counts with its log-sum-exp
``probability``      probability of the answer or set, minus that of ``wrong`` if given
``margin``           ``logit(answer) - max logit of all other tokens``
``cross_entropy``    *minus* the cross-entropy: ``log p(answer)``, in nats
``kl_divergence``    *minus* ``sum_v p(v) log(p(v) / q(v))``, ``p`` of the clean run, ``q`` of the
                     run asked about: 0 on the clean run. Its gradient there is zero, so first-order
                     methods on the clean run say nothing about it.
``custom``           any function of the logits
``sequence_logprob`` ``log p(answer)`` of answers of several tokens, minus that of ``wrong`` if given
                     (``sequence.py``)
==================== =============================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float

from gemmascope_plugin.causes.metric import AnswerMetric, Answers, BoundMetric, Metric, answer_list
from gemmascope_plugin.errors import TaskError
from gemmascope_plugin.models.gate import gate
from gemmascope_plugin.models.protocol import HookedModel, describe
from gemmascope_plugin.models.readout import Readout


class LogitDiff(AnswerMetric):
    """``logit(answer) - logit(wrong)``."""

    name = "logit difference"

    def score(self, readout: Readout, bound: BoundMetric) -> Float[torch.Tensor, " row"]:
        """Difference in logits, in nats of odds."""
        assert bound.right is not None and bound.wrong is not None
        right, wrong = (
            tokens.filled(readout.pick(tokens.ids), -torch.inf).logsumexp(-1)
            for tokens in (bound.right, bound.wrong)
        )
        return right - wrong


class Probability(AnswerMetric):
    """Probability of the answer, or of the whole set, minus that of ``wrong`` if given."""

    name = "probability"

    def score(self, readout: Readout, bound: BoundMetric) -> Float[torch.Tensor, " row"]:
        """Probability mass, 0 to 1, or a difference of two."""
        assert bound.right is not None
        whole = readout.log_normaliser()[:, None]
        right, wrong = (
            None
            if sets is None
            else sets.filled((readout.pick(sets.ids) - whole).exp(), 0.0).sum(-1)
            for sets in (bound.right, bound.wrong)
        )
        assert right is not None
        return right if wrong is None else right - wrong


class Margin(AnswerMetric):
    """``logit(answer) - max`` over all tokens that are not answers."""

    name = "margin"

    def score(self, readout: Readout, bound: BoundMetric) -> Float[torch.Tensor, " row"]:
        """Difference in logits; positive where the answer is the prediction."""
        assert bound.right is not None
        sets = bound.right
        right = sets.filled(readout.pick(sets.ids), -torch.inf).amax(-1)
        # one more than there are answers: the best of the others is among them
        best, ids, _ = readout.top(sets.ids.shape[1] + 1)
        inside = ((ids[:, :, None] == sets.ids[:, None]) & sets.mask[:, None]).any(-1)
        other = ids.gather(1, best.masked_fill(inside, -torch.inf).argmax(1, keepdim=True))
        return right - readout.pick(other)[:, 0]


class CrossEntropy(AnswerMetric):
    """``log p(answer)``: minus the cross-entropy, so that higher is better."""

    name = "minus cross-entropy"

    def score(self, readout: Readout, bound: BoundMetric) -> Float[torch.Tensor, " row"]:
        """In nats, at most 0."""
        assert bound.right is not None
        return bound.right.filled(readout.log_probs(bound.right.ids), -torch.inf).logsumexp(-1)


class KLDivergence(Metric):
    """Minus the Kullback-Leibler divergence from the clean run, summed over the vocabulary."""

    name = "minus KL divergence"

    def bind(
        self, model: HookedModel, n_prompts: int, prompts: Sequence[Any] | None = None
    ) -> BoundMetric:
        """Knows the clean run only once the task has run it."""
        return BoundMetric(self, n_prompts)

    def score(self, readout: Readout, bound: BoundMetric) -> Float[torch.Tensor, " row"]:
        """In nats, at most 0."""
        assert bound.reference is not None, "the task gives what the clean run says"
        return -readout.divergence_from(bound.reference)


def divergence_at(question: Metric) -> KLDivergence:
    """The divergence where another metric asks."""
    return KLDivergence(position=question.position, before_cap=question.before_cap)


@dataclass(frozen=True, kw_only=True)
class Custom(Metric):
    """Any function of the logits."""

    reads_all_logits = True
    fn: Callable[..., Any]
    """Logits ``[prompt, d_vocab]`` and the numbers ``[prompt]`` of these prompts to ``[prompt]``."""
    name: str = "custom metric"  # pyright: ignore[reportIncompatibleVariableOverride]

    def bind(
        self, model: HookedModel, n_prompts: int, prompts: Sequence[Any] | None = None
    ) -> BoundMetric:
        """Nothing to look up."""
        return BoundMetric(self, n_prompts)

    def score(self, readout: Readout, bound: BoundMetric) -> Float[torch.Tensor, " row"]:
        """What the function says."""
        logits = readout.all().float()
        value = self.fn(logits, bound.prompts)
        if not isinstance(value, torch.Tensor) or value.shape != logits.shape[:1]:
            shape = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise TaskError(
                f"The metric {self.name!r} gave {shape} for logits {tuple(logits.shape)}",
                fix=f"a tensor of shape {tuple(logits.shape[:1])}, one number per prompt",
            )
        return value.float()


Position = int | Sequence[int]


@gate()
def logit_diff(
    answer: Answers,
    wrong: Answers,
    *,
    position: Position = -1,
    before_cap: bool = False,
) -> LogitDiff:
    """``logit(answer) - logit(wrong)`` at ``position``, one entry per prompt.

    Example:
        >>> suite = gs.tiny()
        >>> metric = gs.logit_diff(["are"], ["is"])
        >>> task = gs.Task("today the keys", "today the key", metric)
        >>> gap = gs.activation_patching(suite.model, task, "mlp_out", positions=[3]).gap
        >>> round(gap, 2)
        11.19
    """
    return LogitDiff(
        answer=answer_list("answer", answer),
        wrong=answer_list("wrong", wrong),
        position=position,
        before_cap=before_cap,
    )


@gate()
def probability(
    answer: Answers,
    wrong: Answers | None = None,
    *,
    position: Position = -1,
    before_cap: bool = False,
) -> Probability:
    """Probability of ``answer`` (minus that of ``wrong``) at ``position``.

    Example:
        >>> suite = gs.tiny()
        >>> metric = gs.probability(["are"])
        >>> task = gs.Task("today the keys", "today the key", metric)
        >>> gap = gs.activation_patching(suite.model, task, "mlp_out", positions=[3]).gap
        >>> round(gap, 2)
        0.19
    """
    return Probability(
        answer=answer_list("answer", answer),
        wrong=None if wrong is None else answer_list("wrong", wrong),
        position=position,
        before_cap=before_cap,
    )


@gate()
def margin(answer: Answers, *, position: Position = -1, before_cap: bool = False) -> Margin:
    """``logit(answer)`` minus the largest logit of all other tokens.

    Example:
        >>> suite = gs.tiny()
        >>> metric = gs.margin(["are"])
        >>> task = gs.Task("today the keys", "today the key", metric)
        >>> gap = gs.activation_patching(suite.model, task, "mlp_out", positions=[3]).gap
        >>> round(gap, 2)
        5.6
    """
    right = answer_list("answer", answer)
    return Margin(answer=right, position=position, before_cap=before_cap)


@gate()
def cross_entropy(
    answer: Answers, *, position: Position = -1, before_cap: bool = False
) -> CrossEntropy:
    """``log p(answer)``: minus the cross-entropy, higher is better.

    Example:
        >>> suite = gs.tiny()
        >>> metric = gs.cross_entropy(["are"])
        >>> task = gs.Task("today the keys", "today the key", metric)
        >>> gap = gs.activation_patching(suite.model, task, "mlp_out", positions=[3]).gap
        >>> round(gap, 2)
        5.62
    """
    right = answer_list("answer", answer)
    return CrossEntropy(answer=right, position=position, before_cap=before_cap)


@gate()
def kl_divergence(*, position: Position = -1, before_cap: bool = False) -> KLDivergence:
    """Minus the divergence of the run's next-token distribution from the clean run's.

    Example:
        >>> suite = gs.tiny()
        >>> metric = gs.kl_divergence()
        >>> task = gs.Task("today the keys", "today the key", metric)
        >>> gap = gs.activation_patching(suite.model, task, "mlp_out", positions=[3]).gap
        >>> round(gap, 2)
        1.08
    """
    return KLDivergence(position=position, before_cap=before_cap)


def _check_function(fn: object, call: str = "") -> None:
    """Refuses what cannot be called."""
    if not callable(fn):
        raise TaskError(
            f"{describe(fn)} is not a function", fix=f"{call}, of logits [prompt, d_vocab]"
        )


@gate(fn=_check_function)
def custom(
    fn: Callable[..., Any],
    *,
    name: str = "custom metric",
    position: Position = -1,
    before_cap: bool = False,
) -> Custom:
    """Any function of logits ``[prompt, d_vocab]`` and prompt numbers ``[prompt]``; higher is better.

    Example:
        >>> suite = gs.tiny()
        >>> metric = gs.custom(lambda logits, prompts: logits[:, 30] - logits[:, 40])
        >>> task = gs.Task("today the keys", "today the key", metric)
        >>> gap = gs.activation_patching(suite.model, task, "mlp_out", positions=[3]).gap
        >>> round(gap, 2)
        -1.87
    """
    return Custom(fn=fn, name=name, position=position, before_cap=before_cap)
