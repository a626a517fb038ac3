"""AtP*: attribution patching with the attention fixes and GradDrop (Kramar et al., arXiv 2403.00745).

1. ``q`` and ``k``: differences are taken in the attention pattern, see ``attention_fix.py``; all other
   components: ``<z' - z, dm/dz>`` as in attribution patching.
2. Slopes are those of GradDrop, see ``grad_drop.py``.

**What is returned are magnitudes**: how much a node may matter, not in which direction.  They are for
ranking; ``verify_top`` puts exact, signed effects in the place of the largest.

Cost: that of GradDrop, a forward and a backward pass per layer, and three forward passes for the fixes.
"""

from __future__ import annotations

import torch

from gemmascope_plugin.causes.experiment import Experiment
from gemmascope_plugin.causes.gradient.attention_fix import attention_fixes, pattern_hook
from gemmascope_plugin.causes.gradient.grad_drop import ToProducts, grad_drop
from gemmascope_plugin.causes.gradient.slopes import Estimate, Products, differences
from gemmascope_plugin.models.anatomy import Anatomy
from gemmascope_plugin.models.protocol import HookedModel


def atp_star(run: Experiment, model: HookedModel, max_rows: int) -> Estimate:
    """Magnitude of every patch's effect.

    Args:
        run: The experiment.
        model: Its model.
        max_rows: Rows in one forward pass.

    Raises:
        ModelError: The model has one layer.
    """
    fixed = run.grid.component in ("q", "k")
    names = [pattern_hook(name) for name in run.grid.hooks] if fixed else run.grid.hooks
    products = _through_pattern(run, model) if fixed else _direct(run)
    return Estimate(grad_drop(run, model, names, products, max_rows))


def _direct(run: Experiment) -> ToProducts:
    deltas = differences(run)

    def products(slopes: dict[str, torch.Tensor]) -> Products:
        return {name: slopes[name] * delta for name, delta in deltas.items()}

    return products


def _through_pattern(run: Experiment, model: HookedModel) -> ToProducts:
    fixes = attention_fixes(run, Anatomy(model))

    def products(slopes: dict[str, torch.Tensor]) -> Products:
        return {name: fix.effects(slopes[pattern_hook(name)]) for name, fix in fixes.items()}

    return products
