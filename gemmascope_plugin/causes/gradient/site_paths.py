"""Direct paths between sites: gradients that stop at every site between (Marks et al., arXiv 2403.19647).

**Which sites are joined.** From ``u`` to ``d`` if ``u`` is written before ``d`` and the stream between
them is not a site: an upstream residual dictionary screens all that lies below it.

**What is stopped.** The path from ``u`` to ``d`` may pass through anything but another site; every site
between them, features and errors alike, keeps its clean value. With dictionaries everywhere this means:

* stream to the next layer's stream: the stream alone, as that layer's attention and MLP are sites;
* attention to the stream of its layer: the norm after attention and the stream, not the MLP;
* attention to the MLP of its layer: through the MLP's input norm and, where the dictionary reads the
  MLP's *output*, through the MLP itself;
* stream to the next layer's attention: through that layer's queries, keys, values and pattern.

Attention or an MLP that is **no site**, in whichever layer, is passed through with its full gradient.

How: the sites below a target, back to the last stream, become leaves with their clean values in one
forward pass that begins there and ends at the target. The gradients of something that is read at the
target, at these leaves, are all direct paths at once. Copies of the prompts ask for several things.

Cost: per copy the layers between, forward and backward; one or two where every stream is a site.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float

from gemmascope_plugin.causes.gradient.site_runs import Hooks, PartRun, SiteRun, start_of
from gemmascope_plugin.causes.gradient.task_site import TaskSite
from gemmascope_plugin.models import flatten_heads
from gemmascope_plugin.models.protocol import wide
from gemmascope_plugin.models.record import hooking, keep, put

Probe = Callable[[torch.Tensor | None, torch.Tensor], torch.Tensor]
"""What is asked at a target: one number per row, from what its dictionary encodes and its tensor, both
``[row, pos, width]`` with heads flattened."""


def sources_of(sites: Sequence[TaskSite], target: TaskSite) -> list[TaskSite]:
    """The sites with direct paths to a target, in forward order."""
    before = [site for site in sites if site.place < target.place]
    streams = [i for i, site in enumerate(before) if site.is_stream]
    return before[streams[-1] :] if streams else before


def direct_slopes(
    part: PartRun, target: TaskSite, probe: Probe, copies: int
) -> dict[str, Float[torch.Tensor, "copy prompt pos _"]]:
    """Gradients of what is asked at a target, at each site with a direct path to it.

    Copy ``j`` of the prompts may ask for something of its own. By the hook of the source, heads
    flattened; empty if there is none.
    """
    runs = {run.site.hook: run for run in part.sites}
    sources = sources_of([run.site for run in part.sites], target)
    if not sources:
        return {}
    with torch.enable_grad():
        leaves = {site.hook: _leaf(runs[site.hook], copies) for site in sources}
        value = probe(*_passed(part, target, sources, leaves, copies)).sum()
        grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    slopes = {}
    for (hook, leaf), grad in zip(leaves.items(), grads, strict=True):
        whole = torch.zeros_like(leaf) if grad is None else grad
        slopes[hook] = wide(flatten_heads(whole)).unflatten(0, (copies, -1)).detach()
    return slopes


def _leaf(run: SiteRun, copies: int) -> Float[torch.Tensor, "row pos ..."]:
    y = run.clean.y
    return y.repeat(copies, *[1] * (y.ndim - 1)).requires_grad_(True)


def _passed(
    part: PartRun,
    target: TaskSite,
    sources: Sequence[TaskSite],
    leaves: dict[str, torch.Tensor],
    copies: int,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """What the target's dictionary encodes, and its tensor, in a pass over the layers between."""
    acts: dict[str, torch.Tensor] = {}
    hooks: Hooks = [(site.hook, put(leaves[site.hook])) for site in sources if not site.is_stream]
    hooks.append((target.hook, keep(acts, target.hook, None)))
    if target.reads is not None and target.reads.hook != target.hook:
        hooks.append((target.reads.hook, keep(acts, target.reads.hook, None)))
    first = sources[0]
    if first.is_stream:
        start, stream = start_of(first), leaves[first.hook]
    else:
        start, stream = first.layer, part.end.stream(first.layer, copies)
    with hooking(part.end, fwd_hooks=hooks):
        part.end.blocks(stream, start, target.layer + 1)
    y = flatten_heads(acts[target.hook])
    if target.reads is None:
        return None, y
    return flatten_heads(target.reads(acts[target.reads.hook])), y
