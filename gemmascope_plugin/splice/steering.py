"""Steering: generation with one feature's decoder direction pushed, and a report of what it changed.

1. The prompt is continued once without the push. One forward pass over the whole text gives its logits
   and the activation at the site, once for any number of strengths.
2. Per strength the prompt is continued with the push, from the same seed, and one forward pass with the
   push reads the text of step 1. ``steering_report.py`` compares.
3. ``add``: ``y + strength * W_dec[feature]``, the edit ``Add``. ``orthogonal``: with ``P`` the projection
   onto ``W_dec[feature]``, ``(I - P) y + strength * P y``, the edit ``Project``: 0 removes the direction,
   1 changes nothing. Both at every token that is not excluded, generated ones included.

"Without the push" is the model with the dictionary spliced in, unedited: with the error kept, as it is
unless a :class:`HookedSAE` says otherwise, the bare model.

An answer's worth is ``sum_i log p(answer_i | prompt, answer_<i)`` in nats, minus that of ``wrong`` where
there is one: the prompt is read with the answer behind it, once as it is and once with the push, which
acts as it does while text is generated, so that answer tokens count as generated ones.

Cost: a generation and a forward pass, plus as many per strength, and four times the vocabulary per
position, in tiles; for an answer a forward pass each, with logits at its tokens only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, SupportsFloat, SupportsIndex, TypeGuard, overload

import torch

from gemmascope_plugin.errors import EmptySelectionError, check_choice
from gemmascope_plugin.models.asked import asked_positions
from gemmascope_plugin.models.chat import Words, stop_ids
from gemmascope_plugin.models.gate import gate
from gemmascope_plugin.models.prompts import PromptLike, check_room, read_prompts
from gemmascope_plugin.models.protocol import HookedModel, check_model
from gemmascope_plugin.models.tokens import answer_ids
from gemmascope_plugin.splice.hooked_sae import HookedSAE, Saes, as_list, check_saes
from gemmascope_plugin.splice.sampling import Sampling, SteeringError
from gemmascope_plugin.splice.spliced_model import SplicedModel
from gemmascope_plugin.splice.splicing import splice
from gemmascope_plugin.splice.steering_report import (
    METHODS,
    AnswerChange,
    Method,
    Steering,
    SteeringSweep,
)
from gemmascope_plugin.splice.steering_run import Baseline, measure, push
from gemmascope_plugin.splice.window import Positions

Exclude = str | int | Sequence[str | int] | None
Answer = str | Sequence[int]
"""Text as it stands behind the prompt, or its ids."""


@overload
def steer(
    model: HookedModel,
    sae: Saes,
    feature: SupportsIndex,
    strength: float,
    prompt: PromptLike,
    *,
    method: Method = ...,
    max_new_tokens: int = ...,
    temperature: float = ...,
    top_k: int | None = ...,
    top_p: float | None = ...,
    freq_penalty: float = ...,
    stop: Words = ...,
    seed: int = ...,
    positions: Positions = ...,
    exclude: Exclude = ...,
    answer: Answer | None = ...,
    wrong: Answer | None = ...,
) -> Steering: ...


@overload
def steer(
    model: HookedModel,
    sae: Saes,
    feature: SupportsIndex,
    strength: Iterable[float],
    prompt: PromptLike,
    *,
    method: Method = ...,
    max_new_tokens: int = ...,
    temperature: float = ...,
    top_k: int | None = ...,
    top_p: float | None = ...,
    freq_penalty: float = ...,
    stop: Words = ...,
    seed: int = ...,
    positions: Positions = ...,
    exclude: Exclude = ...,
    answer: Answer | None = ...,
    wrong: Answer | None = ...,
) -> SteeringSweep: ...


@gate(model=check_model, sae=check_saes)
@torch.no_grad()
def steer(
    model: HookedModel,
    sae: Saes,
    feature: SupportsIndex,
    strength: float | Iterable[float],
    prompt: PromptLike,
    *,
    method: Method = "add",
    max_new_tokens: int = 20,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    freq_penalty: float = 0.0,
    stop: Words = (),
    seed: int = 0,
    positions: Positions = None,
    exclude: Exclude = None,
    answer: Answer | None = None,
    wrong: Answer | None = None,
) -> Any:
    """Continues a prompt with and without a feature's direction pushed at its site.

    Args:
        model: Model with a tokenizer.
        sae: An SAE or transcoder. A :class:`HookedSAE` keeps its own options; its positions and those
            given here both have to hold.
        feature: Index of the feature.
        strength: A number; several for a sweep. With ``method="add"`` in units of the feature's
            activation, and may be negative; with ``"orthogonal"`` the factor of what points along it.
        prompt: What to continue: text, token ids or a conversation; or several of any lengths.
        method: ``"add"`` or ``"orthogonal"``.
        max_new_tokens: Longest continuation; the model may end it earlier.
        temperature: 0 for the most probable token at every step, else sampling.
        top_k: Sample from this many most probable tokens.
        top_p: Sample from the fewest tokens that have this probability together.
        freq_penalty: What a token's logit loses for every time it is in the text already.
        stop: Words or ids of tokens that end a continuation, beside the model's own.
        seed: Seed of the sampling, the same for every continuation.
        positions: Where to steer; None for everywhere. Positions are absolute, those of generated tokens
            follow the prompt's, negative ones count from its end; ``slice(n, None)`` reaches into what is
            generated.
        exclude: Special tokens that are not steered; None for those of the :class:`HookedSAE`, and for
            BOS, EOS and PAD with any other dictionary.
        answer: Text as it stands behind the prompt, of any number of tokens, or its ids; the report has
            its log-probability without and with steering.
        wrong: Text to compare it with.

    Returns:
        A :class:`Steering` for one strength, a :class:`SteeringSweep` for several; a list of them for
        several prompts, each continued as if it were alone.

    Raises:
        FeatureIndexError: No such feature.
        EmptySelectionError: An empty prompt, no strength, or positions of excluded tokens only.
        UnknownNameError: An unknown method.
        SteeringError: A strength that is not a finite number, a sampling option out of range or without
            effect, ``exclude`` beside a :class:`HookedSAE`, or more than one dictionary or layer.

    Example:
        >>> suite = gs.tiny()
        >>> sae = suite.load("res", 2)
        >>> feature = suite.feature(sae, "next_is_singular_verb")
        >>> gs.steer(suite.model, sae, feature, 16.0, "today the keys near the cabinet", max_new_tokens=3)
        Steering(blocks.2.hook_resid_post feature 280, add, strength 16, excluded bos, eos, pad)
          prompt: today the keys near the cabinet
          before: are quiet .
          after:  is clean .
          KL:     mean 1.03 nats, max 5.75 after 'cabinet' (position 6); push 0.968 of the
          activation; texts differ from position 7
    """
    check_choice("steering method", method, METHODS)
    strengths = _strengths(strength)
    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        freq_penalty=freq_penalty,
        stop=tuple(stop_ids(model, stop, with_own=False)),
        seed=seed,
    )
    options: dict[str, Any] = {} if exclude is None else {"exclude": exclude}
    rows = [row[None] for row in read_prompts(model, prompt).rows()]
    for tokens in rows:
        check_room(model, tokens.shape[1], sampling.max_new_tokens)
    results = []
    for tokens in rows:
        with splice(model, _one_dictionary(sae, exclude), **options) as spliced:
            baseline = measure(spliced, feature, tokens, method, positions, sampling)
            question = AnswerQuestion.of(model, baseline.tokens, answer, wrong)
            before = None if question is None else question.value(spliced, max_new_tokens)
        if isinstance(prompt, str):
            baseline = replace(baseline, prompt=prompt)
        runs = tuple(push(model, baseline, s) for s in strengths)
        if question is not None and before is not None:
            runs = tuple(_with_answer(model, baseline, run, question, before) for run in runs)
        results.append(SteeringSweep(runs) if _is_sweep(strength) else runs[0])
    return results if len(results) > 1 else results[0]


def _with_answer(
    model: HookedModel, baseline: Baseline, run: Steering, question: AnswerQuestion, before: float
) -> Steering:
    """The report of one strength, with what the answer is worth there."""
    with splice(model, baseline.hooked, edits=baseline.edit(run.strength)) as spliced:
        after = question.value(spliced, run.sampling.max_new_tokens)
    return replace(run, answer=question.change(model, before, after))


def _is_sweep(strength: object) -> TypeGuard[Iterable[float]]:
    """Several strengths; an array without an axis is one."""
    several = isinstance(strength, Iterable) and not isinstance(strength, str)
    return several and getattr(strength, "ndim", 1) > 0


def _strengths(strength: float | Iterable[float]) -> list[float]:
    """One strength or several as finite numbers."""
    listed: list[Any] = list(strength) if _is_sweep(strength) else [strength]
    if not listed:
        raise EmptySelectionError("No strength was given", fix="strength=[4.0, 8.0, 16.0]")
    bad = [s for s in listed if not isinstance(s, SupportsFloat) or not math.isfinite(float(s))]
    if bad:
        raise SteeringError(
            f"strength={bad[0]!r} is not a finite number",
            exists="a number, or a sequence of numbers",
            fix="strength=8.0, or strength=[4.0, 8.0, 16.0]",
        )
    return [float(s) for s in listed]


def _one_dictionary(sae: Saes, exclude: Exclude) -> Any:
    """The dictionary, refused if there are several or if it leaves no say to ``exclude``."""
    listed = as_list(sae)
    if len(listed) != 1:
        raise SteeringError(
            f"steer() takes one dictionary, got {len(listed)}", fix="one call per dictionary"
        )
    if isinstance(listed[0], HookedSAE) and exclude is not None:
        raise SteeringError(
            f"exclude={exclude!r} was given beside a HookedSAE, which has its own",
            exists=f"exclude={listed[0].exclude!r}",
            fix=f"HookedSAE(sae, exclude={exclude!r}), or leave exclude out here",
        )
    return listed[0]


@dataclass(frozen=True)
class AnswerQuestion:
    """An answer, and what it is compared with, behind one prompt."""

    answer: tuple[int, ...]
    wrong: tuple[int, ...] | None
    prompt: torch.Tensor

    @classmethod
    def of(
        cls, model: HookedModel, prompt: torch.Tensor, answer: Answer | None, wrong: Answer | None
    ) -> AnswerQuestion | None:
        """Token ids of both; None where no answer is asked about."""
        if answer is None:
            if wrong is not None:
                raise EmptySelectionError(
                    f"wrong={wrong!r} has no answer to be compared with", fix="answer="
                )
            return None
        end = int(prompt[0, -1])
        wrong_ids = None if wrong is None else tuple(answer_ids(model, wrong, end, "wrong"))
        return cls(tuple(answer_ids(model, answer, end, "answer")), wrong_ids, prompt)

    def value(self, spliced: SplicedModel, max_new_tokens: int) -> float:
        """The metric in a model that may be steered."""
        right = self._log_prob(spliced, self.answer, max_new_tokens)
        if self.wrong is None:
            return right
        return right - self._log_prob(spliced, self.wrong, max_new_tokens)

    def change(self, model: HookedModel, before: float, after: float) -> AnswerChange:
        """Both values, with the texts."""
        decode: Any = model.tokenizer.decode
        wrong = None if self.wrong is None else decode(list(self.wrong))
        return AnswerChange(decode(list(self.answer)), wrong, before, after)

    @torch.no_grad()
    def _log_prob(self, spliced: SplicedModel, ids: tuple[int, ...], n_new: int) -> float:
        n = self.prompt.shape[1]
        text = torch.cat([self.prompt, self.prompt.new_tensor([ids[:-1]])], 1)
        positions = list(range(n - 1, n - 1 + len(ids)))
        with (
            spliced.continuing(n, max(n_new, len(ids))),
            asked_positions(spliced, positions),
        ):
            logits = spliced(text)[0].float()
        token = torch.tensor(ids, device=logits.device)
        return float((logits.gather(1, token[:, None])[:, 0] - logits.logsumexp(-1)).sum())
