"""How well a dictionary fits tensors of a model: mean active features and unexplained variance.

1. One forward pass per batch of documents reads every tensor that any candidate needs, and ends at the
   last of them.
2. Each candidate, a pair of tensors (read, written) and a choice of tokens, is encoded, decoded and
   summed up, a few thousand tokens at a time.
3. ``l0`` is the mean number of active features per token; ``fvu`` the squared error over the squared
   distance from the mean of the same tokens (arXiv 2408.05147, section 4).

Cost: one forward pass per batch, and per candidate one encode and one decode; at most 256 MB of
activations at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int

import gemmascope_plugin.saes as saes
from gemmascope_plugin.errors import WidthMismatchError
from gemmascope_plugin.models import flatten_heads
from gemmascope_plugin.models.points import Reading
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.models.record import record
from gemmascope_plugin.models.tokens import kept_positions
from gemmascope_plugin.saes import Coder
from gemmascope_plugin.types import SAE

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
