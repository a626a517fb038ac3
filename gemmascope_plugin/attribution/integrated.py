"""Integrated gradients: the slope averaged along the way from the base run to the other run.

Midpoints ``alpha_k = (k + 1/2) / n``, ``k = 0 .. n - 1``; their error falls as ``1 / n^2``, that of a
left Riemann sum as ``1 / n``.

* ``ig`` (activations; Marks et al., arXiv 2403.19647): one hook at a time, ``a`` its activation in the
  base run and ``a'`` what would be inserted:

      effect = (a' - a) * (1/n) sum_k dm/da  at  a + alpha_k (a' - a),

  everything downstream recomputed.  All nodes at a hook move together.
* ``ig-inputs`` (Hanna et al., arXiv 2403.17806): only the embedding moves, ``e + alpha_k (e' - e)``; the
  slopes at every node are averaged over these runs.

**Conservation.**  The effects of all entries of one hook sum to ``m(a -> a') - m(base)`` as ``n`` grows;
with ``ig-inputs`` this holds at the embedding only.  What is missing is reported as a share of the gap
between clean and corrupted metric.

Cost: ``n`` forward and backward passes over the prompts, for ``ig`` per hook (layer) and backward down to
that layer only, and one forward pass per hook for the residual.  Steps ride on the batch axis.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float

from gemmascope_plugin.attribution.slopes import (
    Estimate,
    by_patch,
    differences,
    put,
    slopes,
    total,
)
from gemmascope_plugin.models.gradients import frozen
from gemmascope_plugin.models.precision import wide
from gemmascope_plugin.patching.experiment import Experiment
from gemmascope_plugin.patching.nodes import read

_EMBED = "hook_embed"


def integrated_activations(run: Experiment, steps: int, max_rows: int) -> Estimate:
    """``ig``: each hook's activation is moved, one hook at a time.

    Args:
        run: The experiment.
        steps: Midpoints.
        max_rows: Rows in one forward pass.
    """
    products, drift = {}, {}
    for name, delta in differences(run).items():
        slope = torch.zeros_like(delta)
        for alphas in _chunks(steps, max_rows // len(run.base)):
            slope += _slopes_on_the_way(run, name, _way(run.here[name], delta, alphas))
        product = slope / steps * delta
        products[name] = product[None]
        drift[name] = _sums(product) - _change(run, name)
    return Estimate(by_patch(run.grid, products)[0], drift)


def integrated_inputs(run: Experiment, steps: int, max_rows: int) -> Estimate:
    """``ig-inputs``: the embedding is moved, and nothing else is held.

    Args:
        run: The experiment.
        steps: Midpoints.
        max_rows: Rows in one forward pass.
    """
    denoising = run.metadata["mode"] == "denoising"
    away = run.bound.clean if denoising else run.bound.corrupt
    here, other = (read(run.runner, tokens, [_EMBED])[_EMBED] for tokens in (run.base, away))
    names = list(dict.fromkeys([*run.grid.hooks, _EMBED]))
    mean: dict[str, torch.Tensor] = {}
    for alphas in _chunks(steps, max_rows // len(run.base)):
        insert = (_EMBED, put(_way(here, other - here, alphas)))
        for name, slope in slopes(run, names, copies=len(alphas), fwd_hooks=[insert]).items():
            mean[name] = mean.get(name, 0) + wide(slope).sum(0) / steps
    products = {name: (mean[name] * delta)[None] for name, delta in differences(run).items()}
    with torch.no_grad():
        change = run.bound.measure(run.runner, away).cpu() - run.base_by_prompt
    drift = {_EMBED: _sums(mean[_EMBED] * (wide(other) - wide(here))) - change}
    return Estimate(by_patch(run.grid, products)[0], drift)


def _chunks(steps: int, size: int) -> Iterator[list[float]]:
    """Midpoints, as many at a time as fit."""
    alphas = [(k + 0.5) / steps for k in range(steps)]
    for start in range(0, steps, max(1, size)):
        yield alphas[start : start + max(1, size)]


def _way(
    here: Float[torch.Tensor, "prompt ..."],
    delta: Float[torch.Tensor, "prompt ..."],
    alphas: list[float],
) -> Float[torch.Tensor, "row ..."]:
    """Points on the way, copy after copy, in the model's own type."""
    return torch.cat([(here + alpha * delta).to(here.dtype) for alpha in alphas])


def _slopes_on_the_way(
    run: Experiment, name: str, points: Float[torch.Tensor, "row ..."]
) -> Float[torch.Tensor, "prompt ..."]:
    """Gradients at one hook that is given these values, summed over copies.

    The graph starts at that hook: nothing below it is differentiated.
    """
    start = points.requires_grad_(True)
    copies = len(points) // len(run.base)
    model = getattr(run.runner, "model", run.runner)
    with torch.enable_grad(), frozen(model.parameters()):
        value = total(run, copies, [(name, put(start))])
        (grad,) = torch.autograd.grad(value, start)
    return wide(grad).unflatten(0, (copies, -1)).sum(0)


@torch.no_grad()
def _change(run: Experiment, name: str) -> Float[torch.Tensor, " prompt"]:
    """How the metric changes if everything at a hook is replaced."""
    insert = (name, put(run.other[name]))
    return run.bound.measure(run.runner, run.base, fwd_hooks=[insert]).cpu() - run.base_by_prompt


def _sums(product: Float[torch.Tensor, "prompt ..."]) -> Float[torch.Tensor, " prompt"]:
    return product.flatten(1).sum(1).cpu()
