"""What a dictionary costs the model: next-token loss with it, beside two ways of removing its site.

1. ``clean``: the model as it is. ``spliced``: only the reconstruction flows on. ``zeroed``: the output
   site is zero. ``mean_ablated``: it is its own mean over the corpus.
2. All four are read at the same tokens, and changed at the same tokens: those that are not excluded.
3. ``delta = spliced - clean`` is the delta LM loss of Gemma Scope (arXiv 2408.05147, section 4). Its
   share of ``zeroed - clean`` or ``mean_ablated - clean`` compares sites that matter more or less: 0 is
   a perfect dictionary, 1 one that is no better than the ablation.

Cost: a forward pass over the corpus and three more from the layer of the dictionary on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float

from gemmascope_plugin.features.stream import Corpus
from gemmascope_plugin.models import flatten_heads, restore_heads
from gemmascope_plugin.models.asked import NextTokenLosses
from gemmascope_plugin.models.finite import check_finite
from gemmascope_plugin.models.hooks import hooking
from gemmascope_plugin.models.points import lowest_layer
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.models.record import write
from gemmascope_plugin.splice import HookedSAE, splice


@dataclass(frozen=True, kw_only=True)
class Damage:
    """Mean next-token losses in nats; NaN where no loss can be read."""

    clean: float
    spliced: float
    zeroed: float
    mean_ablated: float

    @property
    def delta(self) -> float:
        """Rise of the loss with the dictionary in place of its site."""
        return self.spliced - self.clean

    @property
    def share_of_zero(self) -> float:
        """The rise as a share of the rise with zeros; NaN if zeros change nothing."""
        return _share(self.delta, self.zeroed - self.clean)

    @property
    def share_of_mean(self) -> float:
        """The rise as a share of the rise with the mean; NaN if the mean changes nothing."""
        return _share(self.delta, self.mean_ablated - self.clean)


@torch.no_grad()
def damage(
    model: HookedModel, hooked: HookedSAE, text: Corpus, mean: Float[torch.Tensor, " d_out"]
) -> Damage:
    """The four losses of a dictionary.

    Args:
        model: The bare model.
        hooked: The dictionary, with its error dropped.
        text: The corpus.
        mean: Mean of the output site over it.

    Raises:
        MissingHookError: The model lacks a hook of the dictionary.
        WidthMismatchError: The dictionary has another width than the model's tensor.
        ModelError: A loss that is not finite.
    """
    assert hooked.error == "drop", "the reconstruction alone must flow"
    layer = lowest_layer(hooked.hook_in, hooked.hook_out)
    sums, n = [0.0] * 4, 0
    for tokens in text.batches:
        mask = text.readable(tokens)
        read = NextTokenLosses(model, tokens, mask, layer)
        each = [read(model)]
        with splice(model, hooked) as run:
            each.append(read(run))
        for value in (torch.zeros_like(mean), mean):
            with hooking(model, fwd_hooks=[(hooked.hook_out, _replace(text.kept(tokens), value))]):
                each.append(read(model))
        for name, losses in zip(("clean", "spliced", "zeroed", "mean-ablated"), each, strict=True):
            check_finite(losses, f"The loss of the next token in the {name} pass", model)
        sums = [
            total + float(losses.double().sum()) for total, losses in zip(sums, each, strict=True)
        ]
        n += int(mask.sum())
    clean, spliced, zeroed, mean_ablated = (total / n if n else math.nan for total in sums)
    return Damage(clean=clean, spliced=spliced, zeroed=zeroed, mean_ablated=mean_ablated)


def _replace(
    keep: Bool[torch.Tensor, "batch pos"], value: Float[torch.Tensor, " d_out"]
) -> Callable[..., torch.Tensor]:
    """Puts ``value`` at the site wherever a token counts."""
    return write(lambda x: _put(x, keep.to(x.device), value))


def _put(
    x: torch.Tensor, keep: Bool[torch.Tensor, "batch pos"], value: Float[torch.Tensor, " d_out"]
) -> torch.Tensor:
    flat = flatten_heads(x)
    return restore_heads(torch.where(keep[..., None], value.to(flat.device, flat.dtype), flat), x)


def _share(rise: float, whole: float) -> float:
    return rise / whole if whole else math.nan
