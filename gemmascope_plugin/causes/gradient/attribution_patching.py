"""Attribution patching: the first-order estimate of every patch from one backward pass.

1. Run clean and corrupted prompts and keep the activations at the nodes.
2. One backward pass through the base run gives ``dm/dz`` at every node.
3. Effect of node ``n``: ``sum (z_other - z_base) * dm/dz`` over its entries (Nanda 2023; Syed et al.,
   arXiv 2310.10348).

Other methods differ in the slope, each in a file of its own: integrated gradients average it along the
way (``integrated.py``), AtP* looks through saturated attention and cancellation (``atp_star.py``), RelP
propagates relevance (``relp.py``).  ``METHODS`` has them by name, with the options that each takes.

With dictionaries spliced in, slopes at the features are those of the real model, however many there are
(see :class:`gemmascope_plugin.HookedSAE`).

Cost: a few forward passes and one backward pass, whatever the number of nodes; more for other methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from gemmascope_plugin.causes.effects import Effects
from gemmascope_plugin.causes.experiment import experiment
from gemmascope_plugin.causes.gradient.atp_star import AtPStar
from gemmascope_plugin.causes.gradient.integrated import IntegratedGradients, IntegratedInputs
from gemmascope_plugin.causes.gradient.relp import RelP, RelpRules
from gemmascope_plugin.causes.gradient.slopes import (
    AtP,
    Estimate,
    ignore_bridge_norm_warning,
    parts_of,
)
from gemmascope_plugin.causes.grid import Choice, Features
from gemmascope_plugin.causes.memory import Limit
from gemmascope_plugin.causes.method import pick, table_of
from gemmascope_plugin.causes.replace import PatchReplacement
from gemmascope_plugin.causes.task import Task, check_task
from gemmascope_plugin.models.gate import gate
from gemmascope_plugin.models.protocol import HookedModel, check_model
from gemmascope_plugin.splice.hooked_sae import Saes, check_saes
from gemmascope_plugin.types import Direction

NodeMethodName = Literal["atp", "ig", "ig-inputs", "atp*", "relp"]
METHODS = table_of(AtP, IntegratedGradients, IntegratedInputs, AtPStar, RelP)
"""All methods by name."""
MAX_ROWS = 64
"""Prompt copies in one forward and backward pass by default."""


@gate(model=check_model, task=check_task, saes=check_saes)
def attribution_patching(
    model: HookedModel,
    task: Task,
    component: str,
    *,
    method: NodeMethodName = "atp",
    steps: int | None = None,
    rules: RelpRules | None = None,
    direction: Direction = "denoising",
    saes: Saes = None,
    features: Features | None = None,
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
        direction: ``denoising`` takes the gradient on the corrupted run, ``noising`` on the clean one.
        saes: Dictionaries, for ``feature`` and ``error``.
        features: Which features, as ``FeatureId(site, index)`` or, of a single dictionary, as indices;
            None for all that the replacement changes.
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

    Example:
        >>> suite = gs.tiny()
        >>> task = suite.task("agreement", n=8)
        >>> effects = gs.attribution_patching(suite.model, task, "z", method="ig", per_position=False)
        >>> effects.top(2).round(2)
           layer  head  effect  share
        0      2     3   18.15   0.89
        1      3     2    5.30   0.26
    """
    chosen = pick(METHODS, method, steps=steps, rules=rules)
    chosen.check(task, direction, replacement)
    choice = Choice(
        axes=axes,
        per_position=per_position,
        layers=layers,
        heads=heads,
        positions=positions,
        neurons=neurons,
        features=features,
    )
    with (
        ignore_bridge_norm_warning(),
        experiment(
            model,
            task,
            component,
            choice,
            direction=direction,
            saes=saes,
            replacement=replacement,
            seed=seed,
            limit=Limit(max_rows),
        ) as run,
    ):
        runs = [run] if chosen.by_recorded_parts else parts_of(run, run.rows)
        estimate = Estimate.joined([chosen.estimate(part, run.rows) for part in runs])
        each = estimate.by_prompt
        effects = run.effects(each.mean(1), chosen.title, by_prompt=each)
    details = chosen.details(estimate, effects.gap)
    options = {**choice.indices(), "replacement": replacement, "seed": seed}
    return replace(effects, metadata={**effects.metadata, **details, "options": options})
