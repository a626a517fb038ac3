"""Direct logit attribution: what each component adds to the logit difference, by itself, without others.

1. Run the prompts once and keep each activation at the answer position.
2. Freeze every norm at the scale it has in this run. The end of the residual stream is then a sum over
   components, and so is the logit difference **before** the final soft-cap (``contributions.py``).
3. Check the sum. ``metadata["residual"]`` is the largest gap of any prompt.

Where Gemma has a norm after attention, a head's share of what its layer writes is
``gain * r_h / s``. The head's result ``r_h`` itself, which ``stack_head_results`` of TransformerLens
gives, adds up to something else.

A direct effect says what is read off now. What a component does through later ones is not in it, and what
later ones would do without it (self-repair) neither; ``activation_patching`` has both.

The soft-cap is not linear. ``metadata["capped"]`` is the difference after it and
``metadata["cap_slope"]`` the ratio of the two, the cap's average slope between the two logits: a
contribution of 1 is about that much of the model's own logit difference.

Cost: one forward pass over the prompts, and per component a product with one vector per prompt.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, Literal, get_args

import torch

from gemmascope_plugin.causes.bound_task import BoundTask
from gemmascope_plugin.causes.effects import Effects
from gemmascope_plugin.causes.exact.contributions import (
    AnswerRun,
    Contribution,
    asked,
    component_hooks,
    components,
    heads,
)
from gemmascope_plugin.causes.exact.feature_contributions import site_hooks, split
from gemmascope_plugin.causes.metrics import LogitDiff
from gemmascope_plugin.causes.nodes import excluded, patchable, sites_in
from gemmascope_plugin.causes.task import Prompts, Task
from gemmascope_plugin.errors import UnknownNameError, check_choice
from gemmascope_plugin.models import token_strings
from gemmascope_plugin.models.anatomy import Anatomy
from gemmascope_plugin.models.gate import gate
from gemmascope_plugin.models.points import n_layers
from gemmascope_plugin.models.protocol import HookedModel, check_finite, check_model, weights_of
from gemmascope_plugin.splice.hooked_sae import Saes, check_saes

Parts = Literal["component", "head", "feature"]
Scale = Literal["own", "final"]
BATCH = 32
"""Prompts in one forward pass."""


@gate(model=check_model, saes=check_saes)
@torch.no_grad()
def direct_logit_attribution(
    model: HookedModel,
    prompts: Task | Prompts,
    *,
    by: Parts = "component",
    metric: LogitDiff | None = None,
    saes: Saes = None,
    batch_size: int = BATCH,
) -> Effects:
    """What each component adds to ``logit(answer) - logit(wrong)``, before the final soft-cap.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``.
        prompts: A task, whose clean prompts are run, or prompts of any lengths.
        by: ``component``: embedding, attention layers, MLPs. ``head``: attention by head. ``feature``:
            by head, and whatever the dictionaries decompose by feature, ``error`` and ``b_dec``: MLPs,
            heads (dictionaries at ``hook_z``, through ``W_O`` and the frozen norm), or, for a dictionary
            of the stream, everything written before it.
        metric: ``logit_diff(answer, wrong)``; the task's own if None. Of sets of answers the *mean* logit
            counts here, for the log-sum-exp of the metric is not a sum over components.
        saes: Dictionaries, for ``by="feature"``.
        batch_size: Prompts in one forward pass.

    Returns:
        Effects along ``component``, averaged over prompts; they sum to ``metadata["metric_clean"]``, the
        difference before the soft-cap, and ``share`` is each one's part of it. Features that are not
        active at the answer position are left out. Biases (``b_O``, ``b_U``) appear where they are not
        zero.

    Raises:
        TaskError: The metric is not a logit difference.
        UnknownNameError: An unknown ``by``, or dictionaries without ``by="feature"`` or the reverse.
        ModelError: Two dictionaries decompose the same part of the stream.

    Example:
        >>> suite = gs.tiny()
        >>> task = suite.task("agreement", n=8)
        >>> gs.direct_logit_attribution(suite.model, task, by="head").top(3).round(2)
          component  effect  share
        0      MLP3    7.57   0.70
        1      L2H3    2.40   0.22
        2      MLP2    1.85   0.17
    """
    check_choice("by", by, get_args(Parts))
    if saes is not None and by != "feature":
        raise UnknownNameError(f"Dictionaries have no part in by={by!r}", fix='by="feature"')
    bound = asked(model, prompts, metric)
    hooks, sums = component_hooks(n_layers(model)), _Sums()
    pieces: dict[str, torch.Tensor] = {}
    with patchable(model, "feature", saes) if by == "feature" else nullcontext() as spliced:
        for chunk in bound.parts(batch_size):
            more = [] if spliced is None else site_hooks(model, spliced)
            run = AnswerRun.of(model, chunk, [*hooks, *more])
            parts = components(run) if by == "component" else heads(run)
            if spliced is not None:
                parts = split(parts, run, spliced)
            _collect(pieces, parts, sums.n_prompts, len(bound))
            sums.add(run, sum((piece.value for piece in parts), torch.zeros_like(run.bias)))
        exclude = () if spliced is None else excluded(sites_in(spliced).values())
    each = torch.stack(list(pieces.values()))
    metadata = {**sums.metadata(model, bound), "component": by, "exclude": exclude}
    metadata |= {"method": "direct logit attribution", "form": "norms frozen"}
    labels = {"component": tuple(pieces)}
    return Effects(each.mean(-1), ("component",), labels, metadata, each)


@gate(model=check_model)
@torch.no_grad()
def accumulated_logit_diff(
    model: HookedModel,
    prompts: Task | Prompts,
    *,
    metric: LogitDiff | None = None,
    scale: Scale = "own",
    batch_size: int = BATCH,
) -> Effects:
    """The logit difference of the residual stream after each half layer, before the final soft-cap.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``.
        prompts: A task, whose clean prompts are run, or prompts of any lengths.
        metric: ``logit_diff(answer, wrong)``; the task's own if None. Sets count with their mean.
        scale: ``own`` normalises each stream by itself, as the logit lens does. ``final`` uses the scale
            of the end of the stream, so that what lies between two entries is the direct contribution of
            the components between them.
        batch_size: Prompts in one forward pass.

    Returns:
        Effects along ``layer`` and ``stream``: ``pre``, ``mid`` (after attention), ``post``.

    Raises:
        TaskError: The metric is not a logit difference.
        UnknownNameError: An unknown ``scale``.
    """
    check_choice("scale", scale, get_args(Scale))
    bound = asked(model, prompts, metric)
    layers, points = tuple(range(n_layers(model))), ("pre", "mid", "post")
    names = [f"blocks.{layer}.hook_resid_{point}" for layer in layers for point in points]
    sums, curves = _Sums(), []
    for part in bound.parts(batch_size):
        run = AnswerRun.of(model, part, names)
        ln = run.anatomy.ln_final
        streams = (run.at[name] for name in names)
        normed = [ln(x) if scale == "own" else ln.frozen(run.end, x) for x in streams]
        values = torch.stack([(x * run.question).sum(-1) + run.bias for x in normed])
        curves.append(values.cpu())
        sums.add(run, values[-1])
    each = torch.cat(curves, -1).unflatten(0, (len(layers), len(points)))
    method = "logit lens" if scale == "own" else "final norm frozen"
    metadata = sums.metadata(model, bound) | {"component": "stream", "method": method}
    metadata |= {"form": "accumulated", "exclude": ()}
    labels = {"layer": layers, "stream": points}
    return Effects(each.mean(-1), ("layer", "stream"), labels, metadata, each)


class _Sums:
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


def _collect(
    pieces: dict[str, torch.Tensor], parts: Iterable[Contribution], start: int, n: int
) -> None:
    """Puts contributions in their prompts' places; those of a feature with several outputs add up."""
    for piece in parts:
        value = piece.value.cpu()
        place = pieces.setdefault(piece.label, value.new_zeros(n))
        place[start : start + len(value)] += value
