"""Which tensor a dictionary was trained on, found by trying the others, and what is wrong, in sentences.

1. Candidates nearby: the other tensors of the same width in the layer; for a transcoder the norm's
   output without its gain, with it, with it twice, and the stream before the norm; the same site one
   layer up and down; the same tensor without special tokens, if they were counted.
2. Candidates far away: the same site in every other layer, on a few tokens; and, when the figures are
   outside their limits, the same tensor with special tokens.
3. A candidate explains the misfit when it fits itself, its FVU is at most ``BETTER`` times the
   dictionary's own, and its L0 is no further from the declared one. Neighbouring residual streams are
   alike, so a wrong layer may have a passable FVU: comparing finds it, a limit alone does not.
4. Folded norms come first: the tensor that the dictionary reads does not exist in that model. Else the
   likeliest candidate names the cause; else, if nothing that was tried fits, it is another model, a
   damaged file or text that is not text. Notes on few tokens, on losses that do not go with the
   figures, and on missing declarations do not change the verdict.

Cost: about eight candidates; each is one encode and one decode (``fit.py``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from gemmascope_plugin.catalog.site_names import L0Kind
from gemmascope_plugin.models.points import (
    Reading,
    before_gain,
    gained_layer,
    is_folded,
    n_layers,
    norm_gain,
    reading,
    width_at,
)
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.splice.fit import Candidate, Fit, SpliceLoss
from gemmascope_plugin.types import SAE

L0_LIMITS: dict[L0Kind, tuple[float, float]] = {"measured": (0.65, 1.5), "target": (0.5, 2.0)}
"""Measured over declared L0 that passes. Text differs; a target was never measured at all."""
FVU_LIMIT = 0.8
"""FVU that passes. Right Gemma Scope dictionaries have 0.05 to 0.55, wrong tensors mostly over 1."""
BETTER = 0.85
"""FVU of a candidate over the dictionary's own, from which on the candidate is the likelier one."""
_SLACK = 0.05
"""By how much (in log) a likelier candidate's L0 may lie further from the declared one."""

FEW_TOKENS = 200
"""Below this, L0 and FVU of one text say little about another."""
_ERROR_KEPT = 1e-3
"""Nats by which a splice that keeps the error may change the loss."""
_ADVICE = {
    "wrong site": "The dictionary seems to be trained on that tensor: set metadata.hook_name (for a "
    "transcoder also hook_name_out), or load it with gemmascope_plugin.load().",
    "wrong layer": "The dictionary seems to belong to that layer: set metadata.hook_name (for a "
    "transcoder also hook_name_out), or load the dictionary of this layer.",
    "gain missing": "The encoder expects the gain of the norm before the MLP in what it reads, as "
    "Gemma Scope 2's transcoders do.",
    "gain doubled": "The gain of the norm before the MLP is in the encoder already, or was never in "
    "the training data (as in Gemma Scope 1's transcoders); here it is applied once more.",
    "BOS included": "The special tokens spoil the figures. Gemma Scope was trained without them: keep "
    "exclude=('bos', 'eos', 'pad').",
    "BOS left out": "The dictionary seems to be trained on special tokens as well: exclude=().",
}

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

    def explains(self, rival: Fit, fit: Fit) -> bool:
        """Whether ``rival`` is likelier than the dictionary's own tensor."""
        closer = self.distance(rival) <= self.distance(fit) + _SLACK
        return self.agrees(rival) and closer and rival.fvu <= BETTER * fit.fvu

    def best(self, rivals: Sequence[Fit], fit: Fit) -> Fit | None:
        """The likeliest of the candidates that explain a misfit."""
        likelier = [rival for rival in rivals if self.explains(rival, fit)]
        return min(likelier, key=lambda f: f.fvu + self.distance(f), default=None)


def reading_of(model: HookedModel, hook_in: str) -> tuple[Reading, bool]:
    """How to read what the dictionary names, and whether a splice can read it, too.

    Two tensors cannot be spliced and are measured all the same, so that the report can say why. With
    folded norms the norm's output with gain is gone; what folding makes of it, the output without
    gain, takes its place. ``hook_mlp_in``, which SAELens names for Gemma Scope 2's transcoders, fires
    only while a flag is on; it is the stream before the norm.
    """
    layer, site = _parse(hook_in)
    if layer is not None and layer < n_layers(model):
        if gained_layer(hook_in) is not None and is_folded(model, layer):
            return Reading(hook_in, before_gain(model, layer)), False
        if site == "hook_mlp_in" and not getattr(model.cfg, "use_hook_mlp_in", False):
            return Reading(hook_in, f"blocks.{layer}.hook_resid_mid"), False
    return reading(model, hook_in), True


def nearby(
    model: HookedModel, sae: SAE, named: Candidate, special: frozenset[int]
) -> list[Candidate]:
    """The candidates that are always tried; ``special`` are the ids of BOS, EOS and PAD."""
    candidates = list(_same_layer(model, sae, named)) + list(_layers(model, named, near=True))
    if special - named.excluded:
        without = replace(named, excluded=special | named.excluded, cause="BOS included")
        candidates.append(replace(without, label=f"{named.read.name} without special tokens"))
    return candidates


def far(model: HookedModel, named: Candidate) -> list[Candidate]:
    """The same site in the layers that :func:`nearby` leaves out, for a quick scan."""
    return list(_layers(model, named, near=False))


def with_special(named: Candidate) -> list[Candidate]:
    """The same tensor with every token, if some are left out."""
    if not named.excluded:
        return []
    label = f"{named.read.name} with every token"
    return [replace(named, excluded=frozenset(), cause="BOS left out", label=label)]


def _same_layer(model: HookedModel, sae: SAE, named: Candidate) -> Iterator[Candidate]:
    layer, site = _parse(named.read.name)
    if layer is None:
        return
    if named.read.name != named.write.name:
        yield from _norm_outputs(model, named, layer)
        return
    sites = [*_SITES, *(["hook_resid_pre"] if layer == 0 else [])]
    for neighbour in sites:
        name = f"blocks.{layer}.{neighbour}"
        if neighbour != site and width_at(model, name) == sae.W_enc.shape[0]:
            read = reading(model, name)
            yield replace(named, read=read, write=read, cause="wrong site", label=name)


def _norm_outputs(model: HookedModel, named: Candidate, layer: int) -> Iterator[Candidate]:
    """What a transcoder may read instead, and what it may write."""
    plain = f"blocks.{layer}.ln2.hook_normalized"
    gained = f"blocks.{layer}.mlp.hook_in"
    gains = 1 if named.read.gain is not None or gained_layer(named.read.name) is not None else 0
    reads_norm = named.read.name == plain or gains
    options = [(0, Reading(plain, before_gain(model, layer)), f"{plain} (without gain)")]
    if not is_folded(model, layer):
        gain = norm_gain(model, layer)
        options.append((1, Reading(gained, plain, gain), f"{gained} (with gain)"))
        options.append((2, Reading(gained, plain, gain * gain), f"{gained} (with gain twice)"))
    for times, read, label in options:
        if not reads_norm:
            yield replace(named, read=read, cause="wrong site", label=label)
        elif times != gains:
            cause = "gain missing" if times > gains else "gain doubled"
            yield replace(named, read=read, cause=cause, label=label)
    stream, output = f"blocks.{layer}.hook_resid_mid", f"blocks.{layer}.hook_mlp_out"
    if named.read.name != stream:
        yield replace(named, read=reading(model, stream), cause="wrong site", label=stream)
    if named.write.name != output:
        label = f"{named.read.name}, written to {output}"
        yield replace(named, write=reading(model, output), cause="wrong site", label=label)


def _layers(model: HookedModel, named: Candidate, *, near: bool) -> Iterator[Candidate]:
    """The same site in other layers; input and output move together."""
    layer, site = _parse(named.read.name)
    written, out_site = _parse(named.write.name)
    if layer is None or written is None:
        return
    for index in range(n_layers(model)):
        moved = index + written - layer
        if index == layer or (abs(index - layer) == 1) != near or not 0 <= moved < n_layers(model):
            continue
        read, _ = reading_of(model, f"blocks.{index}.{site}")
        write = reading(model, f"blocks.{moved}.{out_site}")
        yield replace(named, read=read, write=write, cause="wrong layer", label=read.name)


def _parse(name: str) -> tuple[int | None, str]:
    """Layer and the rest of a hook name; no layer outside the blocks."""
    match = _HOOK.fullmatch(name)
    return (int(match[1]), match[2]) if match else (None, name)


def explain(
    model: HookedModel,
    sae: SAE,
    fit: Fit,
    tried: list[Fit],
    declared: Declared,
    loss: SpliceLoss,
    *,
    readable: bool,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Causes, empty if the dictionary fits, and findings; ``fit`` is that of what the dictionary names.

    ``readable`` tells whether a splice can read the tensor that it names.
    """
    causes: list[str] = []
    findings: list[str] = []
    best = declared.best(tried, fit)
    if not readable and gained_layer(fit.candidate.read.name) is not None:
        causes.append("folded norms")
        findings.append(_folded(fit))
    elif best is not None:
        causes.append(best.candidate.cause)
        findings.append(_instead(fit, best, declared))
    elif not declared.agrees(fit):
        causes.append("wrong model")
        findings.append(_nothing_fits(model, sae, fit, tried, declared))
    if not readable and not causes:
        causes.append("wrong site")
        findings.append(f"Wrong site: {fit.candidate.label} does not fire in this model.")
    return tuple(causes), tuple(findings + _notes(fit, declared, loss))


def _folded(fit: Fit) -> str:
    return (
        f"Folded norms: the gain that belongs to {fit.candidate.label} was folded into the MLP, so this "
        f"tensor no longer exists in the model; L0 {fit.l0:.1f} and FVU {fit.fvu:.3g} are those without "
        "the gain, and nothing can be spliced. Load the model with gemmascope_plugin.load_model(), "
        "which folds nothing."
    )


def _instead(fit: Fit, best: Fit, declared: Declared) -> str:
    cause, label = best.candidate.cause, fit.candidate.label
    return (
        f"{cause[0].upper()}{cause[1:]}: reading {best.candidate.label} gives L0 {best.l0:.1f}"
        f"{_in_brackets(declared)} and FVU {best.fvu:.3g}, against L0 {fit.l0:.1f} and FVU {fit.fvu:.3g} "
        f"with {label}. {_ADVICE[cause]}"
    )


def _nothing_fits(
    model: HookedModel, sae: SAE, fit: Fit, tried: list[Fit], declared: Declared
) -> str:
    trained_on = sae.cfg.metadata.model_name or "an unnamed model"
    model_name = getattr(model.cfg, "model_name", None) or "unnamed"
    return (
        f"Wrong model: L0 {fit.l0:.1f}{_in_brackets(declared)} and FVU {fit.fvu:.3g} with "
        f"{fit.candidate.label}, and none of {len(tried)} other readings fits. The likely cause is "
        f"another model (the dictionary is for {trained_on}, this one is {model_name}), other weights of "
        "it, damaged parameters, or text unlike any that it was trained on."
    )


def _in_brackets(declared: Declared) -> str:
    return "" if declared.l0 is None else f" (declared {declared.l0:g})"


def _notes(fit: Fit, declared: Declared, loss: SpliceLoss) -> list[str]:
    notes = []
    if fit.n_tokens < FEW_TOKENS:
        notes.append(
            f"Few tokens: {fit.n_tokens} were measured, so L0 and FVU are rough; {FEW_TOKENS} or more "
            "give steady figures."
        )
    if declared.l0 is None:
        notes.append("The dictionary declares no L0, so only FVU was judged.")
    if loss.zeroed > loss.clean and loss.spliced > loss.zeroed:
        notes.append("Splicing it in costs more loss than setting its site to zero.")
    change = loss.error_kept - loss.clean
    if abs(change) > _ERROR_KEPT:
        notes.append(
            f"Adding the error back changes the loss by {change:+.1e} nats, which should "
            "be nothing: is the model or the dictionary in a narrow number type?"
        )
    return notes
