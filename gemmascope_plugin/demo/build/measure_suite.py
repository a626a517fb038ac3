"""Measures the bundled suite: is the model good at its tasks, are the dictionaries good at theirs?

Dictionaries are measured on held-out documents by ``features.measure``, special tokens left out;
``delta_loss_share`` is the rise of the next-token loss as a share of the rise with zeros at the site.

Cost: that of ``features.measure`` per dictionary.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int

from gemmascope_plugin.causes import Task
from gemmascope_plugin.causes.builtin import Split
from gemmascope_plugin.demo.tasks import TASK_NAMES, make_task
from gemmascope_plugin.measures import measure
from gemmascope_plugin.models.protocol import HookedModel

EXCLUDE = ("bos", "eos", "pad")


@torch.no_grad()
def task_score(model: HookedModel, task: Task) -> float:
    """Share of prompts whose most probable next token is right; for years, the greater years' mass."""
    bound = task.bind(model)
    logits = bound.answer_logits(model, bound.clean)
    right = bound.metric.right
    assert right is not None, "the tasks of the suite have answers"
    if task.name == "years":
        return float(right.pick(logits.softmax(-1), 0.0).sum(-1).mean())
    return float((logits.argmax(-1) == right.ids[:, 0]).float().mean())


def task_scores(model: HookedModel, *, split: Split = "held_out", n: int = 256) -> dict[str, float]:
    """Every task's score."""
    return {name: task_score(model, make_task(name, split=split, n=n)) for name in TASK_NAMES}


def dictionary_scores(
    model: HookedModel, sae: Any, tokens: Int[torch.Tensor, "document pos"]
) -> dict[str, float]:
    """L0, FVU, share of the ablation loss, dead share of one dictionary."""
    measures = measure(model, sae, tokens, batch=128, n_positions=0)
    return {
        "l0": measures.l0,
        "fvu": measures.fvu,
        "delta_loss_share": measures.losses.share_of_zero,
        "dead_share": measures.dead_share,
        "loss": measures.losses.clean,
        "loss_spliced": measures.losses.spliced,
        "loss_zeroed": measures.losses.zeroed,
    }
