"""What each component adds to a logit difference at the answer position, with every norm frozen.

With ``u = W_U[:, right] - W_U[:, wrong]``, ``x`` the end of the residual stream and ``s`` its scale, the
logit difference before the final soft-cap is ``<x, n>`` with the *readout* ``n = gain_final * u / s``.

1. ``x`` is a sum: the embedding, what attention writes, what MLPs write. Each adds ``<write, n>``.
2. Attention writes ``gain * a / s_a`` with ``a = sum_h z_h W_O[h] + b_O`` where a norm follows it. Its
   scale ``s_a`` is that of the run, so head ``h`` adds ``<z_h, W_O[h] (gain * n / s_a)>``: the readout is
   pulled back through norm and ``W_O`` once, instead of pushing every head forward.
3. Sets of answers: ``u`` is the difference of the mean unembeddings, the question that is linear.

Cost: one forward pass; of each activation only the answer position is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Float

from gemmascope_plugin.causes.bound_task import BoundTask
from gemmascope_plugin.causes.metric import TokenSets
from gemmascope_plugin.causes.metrics import LogitDiff
from gemmascope_plugin.causes.task import Prompts, Task
from gemmascope_plugin.errors import TaskError
from gemmascope_plugin.models.anatomy import Anatomy
from gemmascope_plugin.models.prompts import padded
from gemmascope_plugin.models.protocol import HookedModel, check_all, check_finite, weights_of, wide
from gemmascope_plugin.models.readout import Readout
from gemmascope_plugin.models.record import keep
from gemmascope_plugin.models.tokens import token_strings

BATCH = 32
"""Prompts in one forward pass."""

PerPrompt = Float[torch.Tensor, " prompt"]


class Contribution(NamedTuple):
    """What one part of the stream adds to the logit difference."""

    label: str
    hook: str
    """Where it is written."""
    stream_time: int
    """When, in half layers: -1 for the embedding, ``2 L`` for attention, ``2 L + 1`` for the MLP."""
    value: PerPrompt
    of_dictionary: bool = False


def bind_logit_diff(
    model: HookedModel, prompts: Task | Prompts, metric: LogitDiff | None
) -> BoundTask:
    """Prompts and a logit difference before the soft-cap, in the ids of the model."""
    if isinstance(prompts, Task):
        task = prompts if metric is None else replace(prompts, metric=metric)
        _check(task.metric)
        bound = task.bind(model)
    else:
        _check(metric)
        assert metric is not None
        tokens, lengths = padded(model, prompts)
        at = metric.positions(lengths)
        before = [row[: int(end) + 1] for row, end in zip(tokens, at, strict=True)]
        bound = replace(metric.bind(model, len(tokens), before), at=at)
        bound = BoundTask(tokens, tokens, lengths, bound, "prompts")
    linear = replace(bound.metric.metric, before_cap=True)
    return replace(bound, metric=replace(bound.metric, metric=linear))


def _check(metric: object) -> None:
    if isinstance(metric, LogitDiff):
        return
    problem = "No metric was given" if metric is None else f"The metric is {metric!r}"
    raise TaskError(
        f"{problem}, and only a difference of logits is a sum over components",
        fix="metric=logit_diff(answer, wrong)",
    )


@dataclass(frozen=True, eq=False)
class AnswerRun:
    """One run of the model, at the answer position of each prompt."""

    anatomy: Anatomy
    bound: BoundTask
    at: dict[str, torch.Tensor]
    """Activations ``[prompt, ...]`` by hook name."""
    logits: Readout
    """Before the final soft-cap."""

    @classmethod
    @torch.no_grad()
    def of(cls, model: HookedModel, bound: BoundTask, hooks: Sequence[str]) -> AnswerRun:
        """Runs the clean prompts and keeps what is at ``hooks`` and at the end of the stream."""
        at: dict[str, torch.Tensor] = {}
        positions = bound.metric.at
        assert positions is not None

        def answer(x: torch.Tensor) -> torch.Tensor:
            return wide(x[torch.arange(len(x), device=x.device), positions.to(x.device)])

        anatomy = Anatomy(model)
        names = dict.fromkeys([*hooks, _last(anatomy)])
        reads = [(name, keep(at, name, answer)) for name in names]
        logits = bound.readout(model, bound.clean, fwd_hooks=reads)
        check_all(at, "the run of the prompts, at their answers", model)
        return cls(anatomy, bound, at, logits)

    @property
    def end(self) -> Float[torch.Tensor, "prompt d_model"]:
        """The end of the residual stream."""
        return self.at[_last(self.anatomy)]

    @cached_property
    def question(self) -> Float[torch.Tensor, "prompt d_model"]:
        """``u``."""
        right, wrong = self._sets
        rows = self.anatomy.W_U.T
        return _mean(wide(rows[right.ids]), right) - _mean(wide(rows[wrong.ids]), wrong)

    @cached_property
    def readout(self) -> Float[torch.Tensor, "prompt d_model"]:
        """``n``."""
        return self.anatomy.ln_final.frozen(self.end, self.question)

    def readout_before_post_norm(self, layer: int) -> Float[torch.Tensor, "prompt d_model"]:
        """The readout of ``a``, the sum over the heads of a layer."""
        post = self.anatomy.norm(layer, "ln1_post")
        if post is None:
            return self.readout
        return post.frozen(self.head_sum(layer, self.at[z_hook(layer)]), self.readout)

    def head_sum(
        self, layer: int, z: Float[torch.Tensor, "prompt head d_head"]
    ) -> Float[torch.Tensor, "prompt d_model"]:
        """``a``."""
        return self.anatomy.head_sum(layer, z)

    def readout_of_z(self, layer: int) -> Float[torch.Tensor, "prompt head d_head"]:
        """The readout of ``z``."""
        W_O = self.anatomy.W_O(layer)
        return torch.einsum("hdm,pm->phd", W_O, self.readout_before_post_norm(layer))

    @cached_property
    def difference(self) -> PerPrompt:
        """Mean over right answers minus mean over wrong ones, before the final soft-cap."""
        return self._difference(self.logits.pick)

    def _difference(self, logits: Callable[[torch.Tensor], torch.Tensor]) -> PerPrompt:
        """Of the logits of the answers' ids."""
        right, wrong = (
            _mean(sets.filled(logits(sets.ids), 0.0)[..., None], sets)[..., 0]
            for sets in self._sets
        )
        return right - wrong

    @cached_property
    def bias(self) -> PerPrompt:
        """What the bias of the unembedding adds."""
        b_U = getattr(self.anatomy.model, "b_U", None)
        if b_U is None:
            return torch.zeros_like(self.end[:, 0])
        return self._difference(lambda ids: wide(b_U.detach()[ids]))

    @property
    def capped(self) -> PerPrompt:
        """The difference after the final soft-cap."""
        cap = self.anatomy.soft_cap
        if cap is None:
            return self.difference
        return self._difference(lambda ids: cap * (self.logits.pick(ids) / cap).tanh())

    @property
    def _sets(self) -> tuple[TokenSets, TokenSets]:
        right, wrong = self.bound.metric.right, self.bound.metric.wrong
        assert right is not None and wrong is not None
        return right, wrong


class Totals:
    """Totals over prompts that the result states."""

    def __init__(self) -> None:
        self.n_prompts = 0
        self.before = self.after = self.residual = 0.0

    def add(self, run: AnswerRun, total: torch.Tensor) -> None:
        """Counts the prompts of a run, whose contributions sum to ``total``."""
        before = run.difference
        self.n_prompts += len(before)
        self.before += float(before.sum())
        self.after += float(run.capped.sum())
        # a NaN would get lost in max()
        gap = check_finite(
            (total - before).abs().max(), "The sum of contributions", run.anatomy.model
        )
        self.residual = max(self.residual, float(gap))

    def metadata(self, model: HookedModel, bound: BoundTask) -> dict[str, Any]:
        """What is the same for every form of the result."""
        sets = [entries for entries in (bound.metric.right, bound.metric.wrong) if entries]
        single = all(entries.ids.shape[1] == 1 for entries in sets)
        return {
            "task": bound.name,
            "metric": "logit difference" if single else "difference of mean logits",
            "answers": bound.answers(model),
            "logits": "before the final soft-cap",
            "sign": "positive = raises the logit difference",
            "n_prompts": len(bound),
            "weights": weights_of(model),
            "tokens": token_strings(model, bound.clean[0]),
            "metric_clean": self.before / len(bound),
            # nothing adds nothing: ``share`` is the part of the whole
            "metric_corrupt": 0.0,
            "residual": self.residual,
            "soft_cap": Anatomy(model).soft_cap,
            "capped": self.after / len(bound),
            "cap_slope": self.after / self.before if self.before else float("nan"),
        }


def component_hooks(n_layers: int) -> list[str]:
    """What :func:`components` and :func:`heads` read."""
    names = [
        (z_hook(layer), f"blocks.{layer}.hook_attn_out", f"blocks.{layer}.hook_mlp_out")
        for layer in range(n_layers)
    ]
    return ["hook_embed", *(name for layer in names for name in layer)]


def components(run: AnswerRun) -> list[Contribution]:
    """Embedding, attention layers, MLPs, and the bias of the unembedding where it adds anything."""
    return _parts(run, _attention)


def heads(run: AnswerRun) -> list[Contribution]:
    """The same with every head by itself."""
    return _parts(run, _heads)


def _parts(
    run: AnswerRun, attention: Callable[[AnswerRun, int], list[Contribution]]
) -> list[Contribution]:
    def component(label: str, hook: str, when: int) -> Contribution:
        return Contribution(label, hook, when, (run.at[hook] * run.readout).sum(-1))

    parts = [component("embed", "hook_embed", -1)]
    for layer in range(run.anatomy.n_layers):
        parts += attention(run, layer)
        parts.append(component(f"MLP{layer}", f"blocks.{layer}.hook_mlp_out", 2 * layer + 1))
    if bool(run.bias.any()):
        parts.append(Contribution("b_U", "unembed.hook_out", 2 * run.anatomy.n_layers, run.bias))
    return parts


def _attention(run: AnswerRun, layer: int) -> list[Contribution]:
    hook = f"blocks.{layer}.hook_attn_out"
    value = (run.at[hook] * run.readout).sum(-1)
    return [Contribution(f"ATTN{layer}", hook, 2 * layer, value)]


def _heads(run: AnswerRun, layer: int) -> list[Contribution]:
    hook = z_hook(layer)
    values = (run.at[hook] * run.readout_of_z(layer)).sum(-1).unbind(-1)
    parts = [Contribution(f"L{layer}H{h}", hook, 2 * layer, v) for h, v in enumerate(values)]
    bias = run.head_sum(layer, torch.zeros_like(run.at[hook]))
    if bool(bias.any()):
        value = (bias * run.readout_before_post_norm(layer)).sum(-1)
        parts.append(Contribution(f"b_O{layer}", f"blocks.{layer}.attn.b_O", 2 * layer, value))
    return parts


def z_hook(layer: int) -> str:
    """The hook of what heads write, before ``W_O``."""
    return f"blocks.{layer}.attn.hook_z"


def _last(anatomy: Anatomy) -> str:
    return f"blocks.{anatomy.n_layers - 1}.hook_resid_post"


def _mean(
    x: Float[torch.Tensor, "prompt choice d"], sets: TokenSets
) -> Float[torch.Tensor, "prompt d"]:
    """Mean over each prompt's own set."""
    mask = sets.mask[..., None].to(x.device)
    return (x * mask).sum(1) / mask.sum(1)
