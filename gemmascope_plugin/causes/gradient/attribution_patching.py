"""Attribution patching: the first-order estimate of every patch from one backward pass.

1. Run clean and corrupted prompts and keep the activations at the nodes.
2. One backward pass through the base run gives ``dm/dz`` at every node.
3. Effect of node ``n``: ``sum (z_other - z_base) * dm/dz`` over its entries (Nanda 2023; Syed et al.,
   arXiv 2310.10348).

Other methods differ in the slope: integrated gradients average it along the way (``integrated.py``), AtP*
looks through saturated attention and cancellation (``atp_star.py``), RelP propagates relevance
(``relp.py``).  With dictionaries spliced in, slopes at the features are those of the real model, however
many there are (see :class:`gemmascope_plugin.HookedSAE`).

Cost: a few forward passes and one backward pass, whatever the number of nodes; more for other methods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from gemmascope_plugin.causes.check_task import check_task
from gemmascope_plugin.causes.effects import Effects
from gemmascope_plugin.causes.experiment import Experiment, experiment
from gemmascope_plugin.causes.gradient.atp_star import atp_star
from gemmascope_plugin.causes.gradient.integrated import integrated_activations, integrated_inputs
from gemmascope_plugin.causes.gradient.relp import relp
from gemmascope_plugin.causes.gradient.relp_rules import RelpRules
from gemmascope_plugin.causes.gradient.slopes import Estimate, at_base, norms_by_hand, parts_of
from gemmascope_plugin.causes.memory import Limit
from gemmascope_plugin.causes.metrics import KLDivergence
from gemmascope_plugin.causes.replace import PatchReplacement
from gemmascope_plugin.causes.task import Task
from gemmascope_plugin.errors import TaskError, check_choice
from gemmascope_plugin.graphs.conservation import checked_share
from gemmascope_plugin.graphs.node import FeatureId
from gemmascope_plugin.models.check_model import check_model
from gemmascope_plugin.models.gate import gate
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.splice.check_saes import check_saes
from gemmascope_plugin.types import Direction

Method = Literal["atp", "ig", "ig-inputs", "atp*", "relp"]
"""Attribution patching; integrated gradients at the nodes or at the embedding; AtP*; RelP."""
NAMES = {
    "atp": "attribution",
    "ig": "integrated gradients",
    "ig-inputs": "integrated gradients of inputs",
    "atp*": "AtP*",
    "relp": "RelP",
}
"""Methods in words, for titles."""
STEPS = 10
"""Midpoints by default."""
MAX_ROWS = 64
"""Prompt copies in one forward and backward pass by default."""


@gate(model=check_model, task=check_task, saes=check_saes)
def attribution_patching(
    model: HookedModel,
    task: Task,
    component: str,
    *,
    method: Method = "atp",
    steps: int | None = None,
    rules: RelpRules | None = None,
    mode: Direction = "denoising",
    saes: Any = None,
    features: Sequence[FeatureId] | None = None,
    per_position: bool = True,
    axes: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    neurons: Sequence[int] | None = None,
    replacement: PatchReplacement = "other",
    seed: int | None = None,
    max_rows: int = MAX_ROWS,
) -> Effects:
    """First-order estimate of :func:`gemmascope_plugin.activation_patching`, same axes and sign.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``.
        task: Clean and corrupted prompts and a metric.
        component: As for :func:`gemmascope_plugin.activation_patching`, as all that is not said here.
        method: ``atp``, ``ig`` (activations), ``ig-inputs`` (embedding), ``atp*`` (**magnitudes only**,
            for ranking) or ``relp``.
        steps: Midpoints, for ``ig`` and ``ig-inputs`` alone; 10 by default.
        rules: For ``relp`` alone; None for ``RelpRules()``, those of the paper.
        mode: ``denoising`` takes the gradient on the corrupted run, ``noising`` on the clean one.
        saes: Dictionaries, for ``feature`` and ``error``.
        features: Which features; None for all that the replacement changes.
        per_position: Whether components without heads have the axis ``pos``.
        axes: One patch per coordinate along these.
        layers: Only these.
        heads: Only these; key-value heads for ``k`` and ``v``.
        positions: Only these.
        neurons: Only these.
        replacement: What would be inserted.
        seed: Of ``replacement="resample"`` alone; 0 by default.
        max_rows: Rows in one forward and backward pass: prompts, times steps or dropped layers.

    Returns:
        Effects; ``metadata["method"]`` says that they are estimates. Integrated gradients say in
        ``metadata["residual"]``, by hook and as a share of the gap, how far they are from summing to the
        change of the metric, and in ``metadata["residual_max"]`` the largest of these.

    Raises:
        TaskError: Prompts that cannot be compared, a metric that does not tell them apart, or one
            whose gradient says nothing; an option that plays no part.
        UnknownNameError: An unknown component or method, or features without dictionaries.
        ModelError: ``relp`` without gated MLPs, ``atp*`` on one layer.
    """
    check_choice("method", method, NAMES)
    _refuse_unused(method, steps, rules)
    n_steps = STEPS if steps is None else steps
    _refuse(task, method, mode, replacement)
    options = {
        "layers": layers,
        "heads": heads,
        "positions": positions,
        "neurons": neurons,
        "replacement": replacement,
        "seed": seed,
    }
    with (
        norms_by_hand(),
        experiment(
            model,
            task,
            component,
            mode=mode,
            saes=saes,
            features=features,
            per_position=per_position,
            axes=axes,
            limit=Limit(max_rows),
            **options,
        ) as run,
    ):
        chosen = rules or RelpRules()
        # integrated gradients go by the parts that the experiment has recorded
        some = [run] if method in ("ig", "ig-inputs") else parts_of(run, run.rows)
        parts = [_estimate(part, model, method, n_steps, chosen, run.rows) for part in some]
        estimate = Estimate.joined(parts)
        each = estimate.by_prompt
        effects = run.effects(each.mean(1), NAMES[method], by_prompt=each)
    more = _metadata(effects, estimate, method, n_steps, chosen)
    return replace(effects, metadata={**effects.metadata, **more, "options": options})


def _estimate(
    run: Experiment,
    model: HookedModel,
    method: Method,
    steps: int,
    rules: RelpRules,
    max_rows: int,
) -> Estimate:
    if method == "ig":
        return integrated_activations(run, steps, max_rows)
    if method == "ig-inputs":
        return integrated_inputs(run, steps, max_rows)
    if method == "atp*":
        return atp_star(run, model, max_rows)
    if method == "relp":
        return relp(run, model, rules)
    return at_base(run)


def _metadata(
    effects: Effects, estimate: Estimate, method: Method, steps: int, rules: RelpRules
) -> Mapping[str, Any]:
    """What the methods say of themselves."""
    if method == "atp*":
        return {"sign": "magnitude: no direction", "magnitudes": True}
    if method == "relp":
        return {"pattern_rule": rules.pattern, "cap_rule": rules.caps}
    if method == "atp":
        return {}
    residual = {name: float(x.mean()) / effects.gap for name, x in estimate.drift.items()}
    return {
        "steps": steps,
        "residual": residual,
        "residual_max": checked_share(max(abs(share) for share in residual.values())),
    }


def _refuse_unused(method: Method, steps: int | None, rules: RelpRules | None) -> None:
    """Options that would change nothing are mistakes.

    Raises:
        TaskError: With the option.
    """
    if steps is not None and not method.startswith("ig"):
        raise TaskError(
            f"steps plays no part in method={method!r}, which follows no line",
            fix='method="ig", or without steps=',
        )
    if rules is not None and method != "relp":
        raise TaskError(
            f"rules plays no part in method={method!r}", fix='method="relp", or without rules='
        )


def _refuse(task: Task, method: Method, mode: str, replacement: str) -> None:
    """Refuses what would give zeros or nonsense.

    Raises:
        TaskError: With what to do instead.
    """
    if method == "ig-inputs" and replacement != "other":
        raise TaskError(
            f"ig-inputs moves the embedding towards the other prompt, and replacement={replacement!r} "
            "is something else",
            fix='method="ig", or replacement="other"',
        )
    # A divergence from the clean run is smallest there: its gradient is zero.
    at_minimum = mode == "noising" and isinstance(task.asked, KLDivergence)
    if at_minimum and not method.startswith("ig"):
        raise TaskError(
            f"The gradient of {task.asked.name} is zero on the clean run, where noising takes it: "
            f"method={method!r} would give 0 to every node",
            fix='method="ig", mode="denoising", or metric=logit_diff(answer, wrong)',
        )
