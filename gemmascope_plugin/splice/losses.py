"""What a splice costs the model: next-token loss with the dictionary, beside ways of removing its site.

1. ``clean``: the model as it is. ``spliced``: only the reconstruction flows on. ``zeroed``: the output
   site is zero. ``mean_ablated``: it is its own mean over the text. ``error_kept``: the error is added
   back while features, reconstruction and error are all computed and listened to, so that its distance
   from ``clean`` is a check of the splice.
2. All are read at the same tokens, and changed at the same tokens: those that are not excluded. The
   loss is
   that of the token after each; padding is never a target.
3. ``delta = spliced - clean`` is the delta LM loss of Gemma Scope (arXiv 2408.05147, section 4). Its
   share of ``zeroed - clean`` or ``mean_ablated - clean`` compares sites that matter more or less: 0 is
   a perfect dictionary, 1 is one that is no better than the ablation.

Cost: a forward pass over the text and one from the dictionary's layer on per other loss, and the
vocabulary once for each; where a pass moves nothing, as with the error kept, that is seen before the
vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int

from gemmascope_plugin.models import flatten_heads, restore_heads
from gemmascope_plugin.models.finite import check_finite
from gemmascope_plugin.models.hooks import hooking
from gemmascope_plugin.models.next_token_losses import NextTokenLosses
from gemmascope_plugin.models.points import lowest_layer
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.models.record import write
from gemmascope_plugin.models.tokens import kept_positions, special_ids
from gemmascope_plugin.splice.fit import Batches
from gemmascope_plugin.splice.hooked_sae import HookedSAE
from gemmascope_plugin.splice.splicing import splice
from gemmascope_plugin.types import SAE, HookFn

Tokens = Int[torch.Tensor, "batch pos"]
Losses = Float[torch.Tensor, " read"]


@dataclass(frozen=True, kw_only=True)
class SpliceLoss:
    """Mean next-token losses in nats; NaN where none was or could be measured."""

    clean: float = math.nan
    spliced: float = math.nan
    zeroed: float = math.nan
    mean_ablated: float = math.nan
    error_kept: float = math.nan

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
def mean_losses(
    model: HookedModel,
    batches: Iterable[tuple[Int[torch.Tensor, "_ _"], Bool[torch.Tensor, "_ _"]]],
    layer: int,
    passes: Callable[[NextTokenLosses, Tokens], Iterator[tuple[str, Losses]]],
) -> dict[str, float]:
    """Means by name of what ``passes`` yields for each batch, read where its mask says.

    ``layer`` is the lowest in which the passes differ. A loss that is not finite is an error.
    """
    sums: dict[str, float] = {}
    n = 0
    for tokens, mask in batches:
        for name, losses in passes(NextTokenLosses(model, tokens, mask, layer), tokens):
            check_finite(losses, f"The loss of the next token in the {name} pass", model)
            sums[name] = sums.get(name, 0.0) + float(losses.double().sum())
        n += int(mask.sum())
    return {name: total / n if n else math.nan for name, total in sums.items()}


def losses_of(
    model: HookedModel,
    sae: SAE,
    batches: Batches,
    *,
    exclude: Sequence[str | int],
    hook_out: str,
    can_splice: bool,
) -> SpliceLoss:
    """The losses of a dictionary at its site, all but that of the mean.

    With ``can_splice=False``, where its input does not exist in this model, those of the splice are NaN.
    """
    dropping = HookedSAE(sae, error="drop", exclude=exclude)
    excluded = special_ids(model, exclude)
    padding = special_ids(model, ("pad",)) if model.tokenizer is not None else frozenset()

    def passes(read: NextTokenLosses, tokens: Tokens) -> Iterator[tuple[str, Losses]]:
        yield "clean", read(model)
        if can_splice:
            with splice(model, dropping) as run:
                yield "spliced", read(run)
            # Somebody who listens makes the splice compute everything although nothing is edited.
            with splice(model, HookedSAE(sae, error="keep", exclude=exclude)) as run:
                listeners = [(name, lambda value, hook: None) for name in run.sub_hooks]
                with run.hooks(fwd_hooks=listeners):
                    yield "kept", read(run)
        zero = putting(kept_positions(tokens, excluded), torch.zeros(()))
        with hooking(model, fwd_hooks=[(hook_out, zero)]):
            yield "zeroed", read(model)

    masked = [
        (t, kept_positions(t, excluded)[:, :-1] & kept_positions(t, padding)[:, 1:])
        for t in batches
    ]
    hooks = (dropping.hook_in, hook_out) if can_splice else (hook_out,)
    means = mean_losses(model, masked, lowest_layer(*hooks), passes)
    return SpliceLoss(error_kept=means.pop("kept", math.nan), **means)


def putting(keep: Bool[torch.Tensor, "batch pos"], value: Float[torch.Tensor, "*d_out"]) -> HookFn:
    """A hook that puts ``value`` at the site wherever a token counts."""

    def replaced(x: torch.Tensor) -> torch.Tensor:
        flat = flatten_heads(x)
        here = keep.to(x.device)[..., None]
        return restore_heads(torch.where(here, value.to(flat.device, flat.dtype), flat), x)

    return write(replaced)


def _share(rise: float, whole: float) -> float:
    return rise / whole if whole else math.nan
