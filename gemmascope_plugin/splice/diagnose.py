"""Which tensor a dictionary was trained on, found by trying the others.

1. Candidates nearby: the other tensors of the same width in the layer; for a transcoder the norm's
   output without its gain, with it, with it twice, and the stream before the norm; the same site one
   layer up and down; the same tensor without special tokens, if they were counted.
2. Candidates far away: the same site in every other layer, on a few tokens; and, when the figures are
   outside their limits, the same tensor with special tokens.
3. A candidate explains the misfit when it fits itself, its FVU is at most ``BETTER`` times the
   dictionary's own, and its L0 is no further from the declared one. Neighbouring residual streams are
   alike, so a wrong layer may have a passable FVU: comparing finds it, a limit alone does not.

Cost: about eight candidates; each is one encode and one decode (``fit.py``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gemmascope_plugin.catalog.site_names import L0Kind
from gemmascope_plugin.models.points import n_layers, width_at
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.models.site_hooks import (
    Reading,
    before_gain,
    gained_layer,
    is_folded,
    norm_gain,
    reading,
)
from gemmascope_plugin.splice.fit import Candidate, Fit

L0_LIMITS: dict[L0Kind, tuple[float, float]] = {"measured": (0.65, 1.5), "target": (0.5, 2.0)}
"""Measured over declared L0 that passes. Text differs; a target was never measured at all."""
FVU_LIMIT = 0.8
"""FVU that passes. Right Gemma Scope dictionaries have 0.05 to 0.55, wrong tensors mostly over 1."""
BETTER = 0.85
"""FVU of a candidate over the dictionary's own, from which on the candidate is the likelier one."""
_SLACK = 0.05
"""By how much (in log) a likelier candidate's L0 may lie further from the declared one."""

_SITES = ("hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "attn.hook_z")
_HOOK = re.compile(r"blocks\.(\d+)\.(.+)")


@dataclass(frozen=True, kw_only=True)
class Declared:
    """What a dictionary says about its sparsity."""

    l0: float | None
    l0_is: L0Kind = "measured"

    def distance(self, fit: Fit) -> float:
        """``|log(measured / declared)|``; 0 when nothing is declared."""
        if not self.l0:
            return 0.0
        return abs(math.log(fit.l0 / self.l0)) if fit.l0 else math.inf

    def agrees(self, fit: Fit) -> bool:
        """Whether L0 and FVU are within their limits."""
        low, high = L0_LIMITS[self.l0_is]
        l0_fits = not self.l0 or low <= fit.l0 / self.l0 <= high
        return l0_fits and not fit.fvu > FVU_LIMIT

    def explains(self, other: Fit, own: Fit) -> bool:
        """Whether ``other`` is likelier than the dictionary's own tensor."""
        closer = self.distance(other) <= self.distance(own) + _SLACK
        return self.agrees(other) and closer and other.fvu <= BETTER * own.fvu

    def best(self, others: Sequence[Fit], own: Fit) -> Fit | None:
        """The likeliest of the candidates that explain a misfit."""
        found = [fit for fit in others if self.explains(fit, own)]
        return min(found, key=lambda fit: fit.fvu + self.distance(fit), default=None)


def own_reading(model: HookedModel, hook_in: str) -> tuple[Reading, bool]:
    """How to read what the dictionary names, and whether a splice can read it, too.

    Two tensors cannot be spliced and are measured all the same, so that the report can say why. With
    folded norms the norm's output with gain is gone; what folding makes of it, the output without
    gain, takes its place. ``hook_mlp_in``, which SAELens names for Gemma Scope 2's transcoders, fires
    only while a flag is on; it is the stream before the norm.

    Raises:
        MissingHookError: The model has no such hook.
    """
    layer, site = _parse(hook_in)
    if layer is not None and layer < n_layers(model):
        if gained_layer(hook_in) is not None and is_folded(model, layer):
            return Reading(hook_in, before_gain(model, layer)), False
        if site == "hook_mlp_in" and not getattr(model.cfg, "use_hook_mlp_in", False):
            return Reading(hook_in, f"blocks.{layer}.hook_resid_mid"), False
    return reading(model, hook_in), True


def nearby(
    model: HookedModel, sae: Any, own: Candidate, special: frozenset[int]
) -> list[Candidate]:
    """The candidates that are always tried.

    Args:
        model: The bare model.
        sae: The dictionary.
        own: The dictionary's own tensors.
        special: Ids of BOS, EOS and PAD.
    """
    found = list(_same_layer(model, sae, own)) + list(_layers(model, own, near=True))
    if special - own.excluded:
        without = replace(own, excluded=special | own.excluded, cause="BOS included")
        found.append(replace(without, what=f"{own.read.name} without special tokens"))
    return found


def far(model: HookedModel, own: Candidate) -> list[Candidate]:
    """The same site in the layers that :func:`nearby` leaves out, for a quick scan."""
    return list(_layers(model, own, near=False))


def with_special(own: Candidate) -> list[Candidate]:
    """The same tensor with every token, if some are left out."""
    if not own.excluded:
        return []
    what = f"{own.read.name} with every token"
    return [replace(own, excluded=frozenset(), cause="BOS left out", what=what)]


def _same_layer(model: HookedModel, sae: Any, own: Candidate) -> Iterator[Candidate]:
    layer, site = _parse(own.read.name)
    if layer is None:
        return
    if own.read.name != own.write.name:
        yield from _norm_outputs(model, own, layer)
        return
    sites = [*_SITES, *(["hook_resid_pre"] if layer == 0 else [])]
    for other in sites:
        name = f"blocks.{layer}.{other}"
        if other != site and width_at(model, name) == sae.W_enc.shape[0]:
            read = reading(model, name)
            yield replace(own, read=read, write=read, cause="wrong site", what=name)


def _norm_outputs(model: HookedModel, own: Candidate, layer: int) -> Iterator[Candidate]:
    """What a transcoder may read instead, and what it may write."""
    plain = f"blocks.{layer}.ln2.hook_normalized"
    gained = f"blocks.{layer}.mlp.hook_in"
    ours = 1 if own.read.gain is not None or gained_layer(own.read.name) is not None else 0
    known = own.read.name == plain or ours
    options = [(0, Reading(plain, before_gain(model, layer)), f"{plain} (without gain)")]
    if not is_folded(model, layer):
        gain = norm_gain(model, layer)
        options.append((1, Reading(gained, plain, gain), f"{gained} (with gain)"))
        options.append((2, Reading(gained, plain, gain * gain), f"{gained} (with gain twice)"))
    for times, read, what in options:
        if not known:
            yield replace(own, read=read, cause="wrong site", what=what)
        elif times != ours:
            cause = "gain missing" if times > ours else "gain doubled"
            yield replace(own, read=read, cause=cause, what=what)
    stream, output = f"blocks.{layer}.hook_resid_mid", f"blocks.{layer}.hook_mlp_out"
    if own.read.name != stream:
        yield replace(own, read=reading(model, stream), cause="wrong site", what=stream)
    if own.write.name != output:
        what = f"{own.read.name}, written to {output}"
        yield replace(own, write=reading(model, output), cause="wrong site", what=what)


def _layers(model: HookedModel, own: Candidate, *, near: bool) -> Iterator[Candidate]:
    """The same site in other layers; input and output move together."""
    layer, site = _parse(own.read.name)
    written, out_site = _parse(own.write.name)
    if layer is None or written is None:
        return
    for other in range(n_layers(model)):
        moved = other + written - layer
        if other == layer or (abs(other - layer) == 1) != near or not 0 <= moved < n_layers(model):
            continue
        read, _ = own_reading(model, f"blocks.{other}.{site}")
        write = reading(model, f"blocks.{moved}.{out_site}")
        yield replace(own, read=read, write=write, cause="wrong layer", what=read.name)


def _parse(name: str) -> tuple[int | None, str]:
    """Layer and the rest of a hook name; no layer outside the blocks."""
    match = _HOOK.fullmatch(name)
    return (int(match[1]), match[2]) if match else (None, name)
