"""What a splice costs the model: its next-token loss clean, spliced, and with the site set to zero.

1. The loss is read at the tokens that are not excluded, for the token after each; padding is never a
   target.
2. ``spliced``: only the reconstruction flows. ``kept``: the error is added back while features,
   reconstruction and error are all computed and listened to, so that its distance from ``clean`` is a
   check of the splice. ``zeroed``: the output site is zero at the same tokens, the yardstick.

Cost: a forward pass over the text and three from the dictionary's layer on, and the vocabulary three
times: where the error is kept nothing moves, which is seen before the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int

from gemmascope_plugin.models.asked import NextTokenLosses
from gemmascope_plugin.models.finite import check_finite
from gemmascope_plugin.models.hooks import hooking
from gemmascope_plugin.models.points import lowest_layer
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.models.record import write
from gemmascope_plugin.models.tokens import kept_positions, special_ids
from gemmascope_plugin.splice.fit import Batches
from gemmascope_plugin.splice.hooked_sae import HookedSAE
from gemmascope_plugin.splice.splicing import splice


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Mean next-token losses in nats; NaN where nothing could be measured."""

    clean: float
    spliced: float
    kept: float
    zeroed: float


@torch.no_grad()
def losses(
    model: HookedModel,
    sae: Any,
    batches: Batches,
    *,
    exclude: Sequence[str | int],
    hook_out: str,
    can_splice: bool,
) -> Losses:
    """The four losses of a dictionary at its site.

    Args:
        model: The bare model.
        sae: The dictionary.
        batches: Token ids.
        exclude: Tokens left alone by dictionary and zeros, and not measured.
        hook_out: Where it writes.
        can_splice: False where its input does not exist in this model; ``spliced`` and ``kept`` are
            NaN then.

    Raises:
        MissingHookError: The model lacks a hook of the dictionary.
        WidthMismatchError: The dictionary has another width than the model's tensor.
        ModelError: A loss that is not finite.
    """
    excluded = special_ids(model, exclude)
    padding = special_ids(model, ("pad",)) if model.tokenizer is not None else frozenset()
    sums: dict[str, float] = {}
    n = 0
    for tokens in batches:
        keep = kept_positions(tokens, excluded)
        mask = keep[:, :-1] & kept_positions(tokens, padding)[:, 1:]
        for name, each in _passes(model, sae, tokens, keep, mask, exclude, hook_out, can_splice):
            check_finite(each, f"The loss of the next token in the {name} pass", model)
            sums[name] = sums.get(name, 0.0) + float(each.double().sum())
        n += int(mask.sum())
    names = ("clean", "spliced", "kept", "zeroed")
    return Losses(**{name: sums.get(name, math.nan) / n if n else math.nan for name in names})


def _passes(
    model: HookedModel,
    sae: Any,
    tokens: Int[torch.Tensor, "batch pos"],
    keep: Bool[torch.Tensor, "batch pos"],
    mask: Bool[torch.Tensor, "batch next"],
    exclude: Sequence[str | int],
    hook_out: str,
    can_splice: bool,
) -> Iterator[tuple[str, Float[torch.Tensor, " read"]]]:
    """The losses of a batch, pass by pass."""
    dropping = HookedSAE(sae, error="drop", exclude=exclude)
    hooks = (dropping.hook_in, hook_out) if can_splice else (hook_out,)
    read = NextTokenLosses(model, tokens, mask, lowest_layer(*hooks))
    yield "clean", read(model)
    if can_splice:
        with splice(model, dropping) as run:
            yield "spliced", read(run)
        # Somebody who listens makes the splice compute everything although nothing is edited.
        with splice(model, HookedSAE(sae, error="keep", exclude=exclude)) as run:
            listeners = [(name, lambda value, hook: None) for name in run.sub_hooks]
            with run.hooks(fwd_hooks=listeners):
                yield "kept", read(run)

    def zero(x: torch.Tensor) -> torch.Tensor:
        here = keep[(..., *[None] * (x.ndim - 2))]
        return torch.where(here.to(x.device), torch.zeros_like(x), x)

    with hooking(model, fwd_hooks=[(hook_out, write(zero))]):
        yield "zeroed", read(model)
