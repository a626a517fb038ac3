"""Measures the bundled suite: is the model good at its tasks, are the dictionaries good at theirs?

Dictionaries are measured on held-out documents, special tokens left out (arXiv 2408.05147, section 4):

* ``l0``: mean number of active features per token.
* ``fvu``: squared error over squared distance from the mean of these tokens.
* ``delta_loss_share``: rise of the next-token loss when the dictionary is spliced in without its error,
  as a share of the rise when the site is set to zero at the same tokens.
* ``dead_share``: features that never fire on these tokens.

Cost: about three forward passes over the documents per dictionary.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int

import gemmascope_plugin.saes as saes
from gemmascope_plugin.demo.tasks import TASK_NAMES, Split, make_task
from gemmascope_plugin.models import special_ids
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.models.tokens import kept_positions
from gemmascope_plugin.patching import Task
from gemmascope_plugin.splice import splice
from gemmascope_plugin.training import collect_activations

EXCLUDE = ("bos", "eos", "pad")


@torch.no_grad()
def task_score(model: HookedModel, task: Task) -> float:
    """Share of prompts whose most probable next token is right; for years, the greater years' mass."""
    bound = task.bind(model)
    logits = model(bound.clean)[:, task.metric.position]
    answers = bound.metric.answers
    if task.name == "years":
        mass = logits.softmax(-1).gather(-1, answers.right).masked_fill(~answers.right_mask, 0)
        return float(mass.sum(-1).mean())
    return float((logits.argmax(-1) == answers.right[:, 0]).float().mean())


def task_scores(model: HookedModel, *, split: Split = "held-out", n: int = 256) -> dict[str, float]:
    """Every task's score."""
    return {name: task_score(model, make_task(name, split=split, n=n)) for name in TASK_NAMES}


@torch.no_grad()
def dictionary_scores(
    model: HookedModel, sae: Any, tokens: Int[torch.Tensor, "document pos"]
) -> dict[str, float]:
    """L0, FVU, share of the ablation loss, dead share of one dictionary."""
    hook_in = sae.cfg.metadata.hook_name
    hook_out = sae.cfg.metadata.hook_name_out or hook_in
    tensors = collect_activations(model, tokens, list({hook_in, hook_out}))
    acts = saes.encode(sae, tensors[hook_in])
    target = tensors[hook_out]
    error = (target - saes.decode(sae, acts, tensors[hook_in])).pow(2).sum()
    keep = kept_positions(tokens, special_ids(model, EXCLUDE))
    clean = _loss(model, tokens, keep)
    with splice(model, sae, error="drop") as spliced:
        dropped = _loss(spliced, tokens, keep)
    zeroed = _loss_with_zeros(model, tokens, keep, hook_out)
    return {
        "l0": float((acts > 0).sum(-1).float().mean()),
        "fvu": float(error / (target - target.mean(0)).pow(2).sum()),
        "delta_loss_share": (dropped - clean) / (zeroed - clean),
        "dead_share": float((~(acts > 0).any(0)).float().mean()),
        "loss": clean,
        "loss_spliced": dropped,
        "loss_zeroed": zeroed,
    }


def _loss(
    runner: Any, tokens: Int[torch.Tensor, "document pos"], keep: Bool[torch.Tensor, "document pos"]
) -> float:
    """Mean next-token loss in nats, read at the kept tokens, over documents in chunks."""
    losses = [
        _token_losses(runner(chunk), chunk)[mask[:, :-1]]
        for chunk, mask in zip(tokens.split(128), keep.split(128), strict=True)
    ]
    return float(torch.cat(losses).mean())


def _token_losses(
    logits: Float[torch.Tensor, "document pos d_vocab"],
    tokens: Int[torch.Tensor, "document pos"],
) -> Float[torch.Tensor, "document next"]:
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none"
    )


def _loss_with_zeros(
    model: HookedModel,
    tokens: Int[torch.Tensor, "document pos"],
    keep: Bool[torch.Tensor, "document pos"],
    hook_name: str,
) -> float:
    """The loss with the site set to zero at the kept tokens."""
    masks = iter(keep.split(128))

    def zero(x: torch.Tensor, hook: Any) -> torch.Tensor:
        mask = next(masks)[(..., *[None] * (x.ndim - 2))]
        return torch.where(mask, torch.zeros_like(x), x)

    with model.hooks(fwd_hooks=[(hook_name, zero)]):
        return _loss(model, tokens, keep)
