"""Runs every patch of an experiment, many of them in one forward pass, each pass starting late.

1. A patch that inserts what is there already has no effect and is not run.
2. The others are sorted by the first layer that they touch. One pass carries as many copies of the
   prompts, each with its own patch, as rows are allowed; more prompts than that are taken in parts.
3. Below the first patched layer every copy is the base run, so a pass starts at that layer from the base
   run's residual stream (``models/restart.py``), with the same numbers as from the start. It runs whole
   where somebody's hooks take part, those of spliced dictionaries among them.

Cost: ``patches * prompts / rows`` passes, of half the layers on average in a sweep over all of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int

from gemmascope_plugin.models.points import n_layers
from gemmascope_plugin.models.restart import Restart, can_restart
from gemmascope_plugin.patching.components import layer_of
from gemmascope_plugin.patching.experiment import Experiment
from gemmascope_plugin.patching.insert import inserting
from gemmascope_plugin.patching.nodes import Patch


@torch.no_grad()
def sweep(
    run: Experiment, *, restart: bool = True, progress: bool = False
) -> Float[torch.Tensor, "patch prompt"]:
    """The metric of each prompt under each patch alone, on the CPU.

    Args:
        run: The experiment.
        restart: Whether passes start at the first patched layer where they can.
        progress: Show a progress bar.
    """
    from tqdm.auto import tqdm

    patches = run.grid.patches
    # running a patch that changes nothing would only add rounding
    live = [i for i, patch in enumerate(patches) if run.changes(patch)]
    live.sort(key=lambda i: first_layer(patches[i]))
    metric = run.base_by_prompt.repeat(len(patches), 1)
    copies = max(1, run.rows // len(run.base))
    chunks = [live[i : i + copies] for i in range(0, len(live), copies)]
    parts = torch.arange(len(run.base)).split(run.rows)
    title = f"patching {run.grid.component}"
    total = len(parts) * len(chunks)
    with warnings.catch_warnings(), tqdm(total=total, desc=title, disable=not progress) as bar:
        # the bridge warns that an edited norm scale may differ from the unedited norm by rounding
        warnings.filterwarnings("ignore", message=".*hook edited hook_scale")
        for index in parts:
            passes = _passes(run, index, [[patches[i] for i in chunk] for chunk in chunks], restart)
            for chunk, values in zip(chunks, passes, strict=True):
                metric[torch.tensor(chunk)[:, None], index] = values.to(metric)
                bar.update()
    return metric


def first_layer(patch: Patch) -> int:
    """The first layer that a patch touches."""
    return min(layer_of(hook) for hook in patch.hooks)


def _passes(
    run: Experiment,
    index: Int[torch.Tensor, " part"],
    chunks: Sequence[Sequence[Patch]],
    restart: bool,
) -> Iterator[Float[torch.Tensor, "patch part"]]:
    """One pass per chunk of patches, over some of the prompts."""
    index = index.to(run.base.device)
    bound, base = run.bound.part(index), run.base[index]
    # sorted, so that the first patch of a chunk is the earliest
    last = n_layers(run.model)  # where the final norm begins
    starts = [min(first_layer(chunk[0]), last) for chunk in chunks]
    late = restart and any(start > 0 for start in starts) and can_restart(run.model)
    end = Restart(run.model, base, starts) if late else None
    for chunk, start in zip(chunks, starts, strict=True):
        hooks = inserting(chunk, {h: run.other[h][index] for p in chunk for h in p.hooks})
        if end is None:
            rows = base.repeat(len(chunk), 1)
            values = bound.measure(run.runner, rows, fwd_hooks=hooks)
        else:
            rows = end.stream(start, len(chunk))
            values = bound.measure(end, rows, fwd_hooks=hooks, start_at_layer=start)
        yield values.reshape(len(chunk), len(base))
