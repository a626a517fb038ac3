"""Exact activation patching: replace, recompute everything downstream, read the metric.

1. Run clean and corrupted prompts once and keep the activations at the patched hooks.
2. The base run is the corrupted one (denoising, clean values are inserted) or the clean one (noising);
   zeros, means or another prompt's values can be inserted in place of the other run's
   (Heimersheim & Nanda, arXiv 2404.15255, for the method).
3. Every patch is run alone, many of them side by side in one forward pass (``patch_sweep.py``).

Cost: four forward passes, and ``patches * prompts / rows`` passes that start at the patched layer.
"""

from __future__ import annotations

from collections.abc import Sequence

from gemmascope_plugin.causes.effects import Effects
from gemmascope_plugin.causes.exact.patch_sweep import sweep
from gemmascope_plugin.causes.experiment import experiment
from gemmascope_plugin.causes.grid import Choice
from gemmascope_plugin.causes.memory import Limit
from gemmascope_plugin.causes.replace import PatchReplacement
from gemmascope_plugin.causes.task import Task, check_task
from gemmascope_plugin.graphs.node import FeatureId
from gemmascope_plugin.models.gate import gate
from gemmascope_plugin.models.protocol import HookedModel, check_model
from gemmascope_plugin.splice.hooked_sae import Saes, check_saes
from gemmascope_plugin.types import Direction

MAX_ROWS = 512
"""Rows of prompts in one forward pass by default."""


@gate(model=check_model, task=check_task, saes=check_saes)
def activation_patching(
    model: HookedModel,
    task: Task,
    component: str,
    *,
    direction: Direction = "denoising",
    axes: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    neurons: Sequence[int] | None = None,
    per_position: bool = True,
    saes: Saes = None,
    features: Sequence[FeatureId | int] | None = None,
    replacement: PatchReplacement = "other",
    seed: int | None = None,
    max_rows: int = MAX_ROWS,
    memory_budget: int | str | None = None,
    progress: bool = False,
) -> Effects:
    """The exact effect on the metric of patching each node alone.

    A prompt that is shorter than others has no token at later positions: patches there leave it as it is.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``.
        task: Clean and corrupted prompts and a metric.
        component: ``resid_pre``, ``resid_mid``, ``resid_post``, ``attn_out``, ``mlp_out`` (layer by
            position); ``z``, ``q``, ``pattern`` (layer by head), ``k``, ``v`` (layer by key-value
            head); ``neuron`` (layer by neuron); ``ln1_scale``, ``ln1_post_scale``, ``ln2_scale``,
            ``ln2_post_scale`` (layer by position), ``ln_final_scale`` (position); ``feature``,
            and ``error`` for the whole reconstruction error of each dictionary, which is else kept.
        direction: ``denoising`` puts clean values into the corrupted run, ``noising`` the reverse.
        axes: One patch per coordinate along these, such as ``("layer", "head", "pos")``; along the
            others a patch covers everything at once. None for the axes in brackets above.
        layers: Only these layers.
        heads: Only these heads; key-value heads for ``k`` and ``v``.
        positions: Only these positions, from the start of each prompt; queries for ``pattern``.
        neurons: Only these neurons.
        per_position: Whether components without heads have the axis ``pos``, where ``axes`` does not
            say.
        saes: Dictionaries, for ``feature`` and ``error``.
        features: Which features, as ``FeatureId(site, index)`` or, of a single dictionary, as indices;
            None for all whose activation the replacement changes.
        replacement: ``other``, the other run's activation; ``zero``; ``mean``, the other run's mean at
            each position over prompts; ``overall_mean``, over positions as well; ``resample``, the
            other run's activation of another prompt of the same length.
        seed: For ``resample`` alone; 0 by default.
        max_rows: Most prompts, copies counted, in one forward pass.
        memory_budget: Bytes, or e.g. ``"2 GB"``, for activations (``memory.py`` says what is counted).
        progress: Show a progress bar.

    Returns:
        Effects with ``values[axes] = metric(patched) - metric(base)``, averaged over prompts, and the
        same of each prompt.

    Raises:
        TaskError: Prompts that cannot be compared, a metric that does not tell them apart, or a
            replacement that the component or the prompts do not allow.
        UnknownNameError: An unknown component, direction, replacement, axis, layer, head, position or
            neuron, or features without dictionaries.
        EmptySelectionError: An empty list of axes or coordinates.
        GemmaScopeError: A memory budget too small for one prompt.

    Example:
        >>> suite = gs.tiny()
        >>> task = suite.task("agreement", n=8)
        >>> effects = gs.activation_patching(suite.model, task, "resid_pre")
        >>> effects
        Effects(resid_pre, exact patching, denoising, 4 layer x 7 pos, first prompt 'were' (13)
          against 'was' (24), metric clean 9.480, corrupt -10.958, excluded tokens none)
        >>> effects.top(2).round(2)
           layer  pos  effect  share
        0      0    3   20.44    1.0
        1      2    3   20.43    1.0
    """
    choice = Choice(
        axes=axes,
        per_position=per_position,
        layers=layers,
        heads=heads,
        positions=positions,
        neurons=neurons,
        features=features,
    )
    with experiment(
        model,
        task,
        component,
        choice,
        direction=direction,
        saes=saes,
        replacement=replacement,
        seed=seed,
        limit=Limit(max_rows, memory_budget),
    ) as run:
        changes = sweep(run, progress=progress) - run.base_by_prompt
        return run.effects(changes.mean(1), "exact patching", by_prompt=changes)
