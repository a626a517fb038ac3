"""How well a dictionary fits tensors of a model, and what putting it there costs the model.

``measure``: mean active features and unexplained variance.

1. One forward pass per batch of documents reads every tensor that any candidate needs, and ends at the
   last of them.
2. Each candidate, a pair of tensors (read, written) and a choice of tokens, is encoded, decoded and
   summed up, a few thousand tokens at a time.
3. ``l0`` is the mean number of active features per token; ``fvu`` the squared error over the squared
   distance from the mean of the same tokens (arXiv 2408.05147, section 4).

``losses_of``: next-token loss with the dictionary, beside ways of removing its site.

4. ``clean``: the model as it is. ``spliced``: only the reconstruction flows on. ``zeroed``: the output
   site is zero. ``mean_ablated``: it is its own mean over the text. ``error_kept``: the error is added
   back while features, reconstruction and error are all computed and listened to, so that its distance
   from ``clean`` is a check of the splice.
5. All are read at the same tokens, and changed at the same tokens: those that are not excluded. The
   loss is that of the token after each; padding is never a target.
6. ``delta = spliced - clean`` is the delta LM loss of Gemma Scope (arXiv 2408.05147, section 4). Its
   share of ``zeroed - clean`` or ``mean_ablated - clean`` compares sites that matter more or less: 0 is
   a perfect dictionary, 1 is one that is no better than the ablation.

Cost: one forward pass per batch, and per candidate one encode and one decode; at most 256 MB of
activations at a time. For losses a forward pass over the text and one from the dictionary's layer on per
other loss, and the vocabulary once for each; where a pass moves nothing, as with the error kept, that is
seen before the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int

import gemmascope_plugin.saes as saes
from gemmascope_plugin.errors import WidthMismatchError
from gemmascope_plugin.models import flatten_heads, restore_heads
from gemmascope_plugin.models.asked import NextTokenLosses
from gemmascope_plugin.models.points import Reading, lowest_layer
from gemmascope_plugin.models.protocol import HookedModel, check_finite
from gemmascope_plugin.models.record import hooking, record, write
from gemmascope_plugin.models.tokens import kept_positions, special_ids
from gemmascope_plugin.saes import Coder
from gemmascope_plugin.splice.hooked_sae import HookedSAE
from gemmascope_plugin.splice.splicing import splice
from gemmascope_plugin.types import SAE, HookFn

_VALUES = 1 << 26
"""Activations that are held at a time."""

Batches = Sequence[Int[torch.Tensor, "_ _"]]
"""Token ids, documents of one length together."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A pair of tensors and a choice of tokens under which a dictionary may fit."""

    read: Reading
    write: Reading
    excluded: frozenset[int]
    """Token ids that are left out."""
    cause: str = ""
    """What is wrong if this candidate fits and what the dictionary names does not."""
    label: str = ""
    """What it is, for tables and sentences."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What was measured under a candidate."""

    candidate: Candidate
    l0: float
    fvu: float
    """NaN when the tokens do not vary."""
    n_tokens: int


class _Sums:
    """Running sums of one candidate, in float64."""

    def __init__(self, d_out: int, device: torch.device) -> None:
        self.n = 0
        self.active = 0
        self.error = 0.0
        self.squares = 0.0
        self.total = torch.zeros(d_out, dtype=torch.float64, device=device)

    def add(
        self,
        coder: Coder,
        x: Float[torch.Tensor, "token d_in"],
        y: Float[torch.Tensor, "token d_out"],
    ) -> None:
        acts = coder.activate(coder.pre_activations(x), x)
        target = y.double()
        self.n += len(x)
        self.active += int((acts > 0).sum())
        self.error += float((target - saes.reconstruct(coder, acts, x)).pow(2).sum())
        self.squares += float(target.pow(2).sum())
        self.total += target.sum(0)

    def fit(self, candidate: Candidate) -> Fit:
        n = max(self.n, 1)
        variance = self.squares - float(self.total.pow(2).sum()) / n
        varies = variance > 1e-12 * max(self.squares, 1e-30)
        fvu = self.error / variance if varies else math.nan
        return Fit(candidate=candidate, l0=self.active / n, fvu=fvu, n_tokens=self.n)


@torch.no_grad()
def measure(
    model: HookedModel, sae: SAE, batches: Batches, candidates: Sequence[Candidate]
) -> list[Fit]:
    """Measures every candidate on the same text; one fit per candidate, in their order."""
    hooks = sorted({reading.hook for c in candidates for reading in (c.read, c.write)})
    sums = [_Sums(sae.W_dec.shape[1], sae.W_dec.device) for _ in candidates]
    for tokens in batches:
        cache = record(model, tokens, hooks)
        flat = {name: flatten_heads(cache[name]) for name in hooks}
        for candidate, total in zip(candidates, sums, strict=True):
            keep = kept_positions(tokens, candidate.excluded)
            _add(total, sae, candidate, flat, keep)
    return [total.fit(candidate) for candidate, total in zip(candidates, sums, strict=True)]


def _add(
    sums: _Sums,
    sae: SAE,
    candidate: Candidate,
    cache: dict[str, torch.Tensor],
    keep: Bool[torch.Tensor, "batch pos"],
) -> None:
    device = sae.W_dec.device
    x = candidate.read(cache[candidate.read.hook])[keep].to(device)
    y = candidate.write(cache[candidate.write.hook])[keep].to(device)
    _check_width(candidate.read.name, x, sae.W_enc.shape[0], sae)
    _check_width(candidate.write.name, y, sae.W_dec.shape[1], sae)
    coder = saes.coder_of(sae)
    chunk = max(1, _VALUES // sae.W_enc.shape[1])
    for x_part, y_part in zip(x.split(chunk), y.split(chunk), strict=True):
        sums.add(coder, x_part, y_part)


def _check_width(name: str, x: torch.Tensor, width: int, sae: SAE) -> None:
    if x.shape[-1] != width:
        raise WidthMismatchError(
            f"The dictionary has width {width}, the model's {name} has {x.shape[-1]}",
            fix=f"the model {sae.cfg.metadata.model_name or 'that it was trained on'}",
        )


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
