"""From measurements to sentences: what is wrong with a dictionary in a model, and the likely cause.

1. Folded norms come first: the tensor that the dictionary reads does not exist in that model.
2. Else the likeliest of the candidates that explain a misfit names the cause.
3. Else, if nothing tried fits, it is another model, a damaged file or text that is no text.
4. Notes on few tokens, on losses that do not go with the figures, and on missing declarations follow;
   they do not change the verdict.

Costs nothing; everything was measured before.
"""

from __future__ import annotations

from typing import Any

from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.models.site_hooks import gained_layer
from gemmascope_plugin.splice.diagnose import Declared
from gemmascope_plugin.splice.fit import Fit
from gemmascope_plugin.splice.losses import Losses

FEW_TOKENS = 200
"""Below this, L0 and FVU of one text say little about another."""
_KEPT = 1e-3
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


def explain(
    model: HookedModel,
    sae: Any,
    own: Fit,
    tried: list[Fit],
    declared: Declared,
    loss: Losses,
    *,
    readable: bool,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Causes, empty if the dictionary fits, and findings.

    Args:
        model: The bare model.
        sae: The dictionary.
        own: The fit at its own tensors.
        tried: The fits at others.
        declared: Its declared L0.
        loss: The losses.
        readable: Whether a splice can read the tensor that it names.
    """
    causes: list[str] = []
    findings: list[str] = []
    best = declared.best(tried, own)
    if not readable and gained_layer(own.candidate.read.name) is not None:
        causes.append("folded norms")
        findings.append(_folded(own))
    elif best is not None:
        causes.append(best.candidate.cause)
        findings.append(_instead(own, best, declared))
    elif not declared.agrees(own):
        causes.append("wrong model")
        findings.append(_nothing_fits(model, sae, own, tried, declared))
    if not readable and not causes:
        causes.append("wrong site")
        findings.append(f"Wrong site: {own.candidate.what} does not fire in this model.")
    return tuple(causes), tuple(findings + _notes(own, declared, loss))


def _folded(own: Fit) -> str:
    return (
        f"Folded norms: the gain that belongs to {own.candidate.what} was folded into the MLP, so this "
        f"tensor no longer exists in the model; L0 {own.l0:.1f} and FVU {own.fvu:.3g} are those without "
        "the gain, and nothing can be spliced. Load the model with gemmascope_plugin.load_model(), "
        "which folds nothing."
    )


def _instead(own: Fit, best: Fit, declared: Declared) -> str:
    cause = best.candidate.cause
    said = "" if declared.l0 is None else f" (declared {declared.l0:g})"
    return (
        f"{cause[0].upper()}{cause[1:]}: reading {best.candidate.what} gives L0 {best.l0:.1f}{said} and "
        f"FVU {best.fvu:.3g}, against L0 {own.l0:.1f} and FVU {own.fvu:.3g} with {own.candidate.what}. "
        f"{_ADVICE[cause]}"
    )


def _nothing_fits(
    model: HookedModel, sae: Any, own: Fit, tried: list[Fit], declared: Declared
) -> str:
    said = "" if declared.l0 is None else f" (declared {declared.l0:g})"
    theirs = sae.cfg.metadata.model_name or "an unnamed model"
    ours = getattr(model.cfg, "model_name", None) or "unnamed"
    return (
        f"Wrong model: L0 {own.l0:.1f}{said} and FVU {own.fvu:.3g} with {own.candidate.what}, and none "
        f"of {len(tried)} other readings fits. The likely cause is another model (the dictionary is for "
        f"{theirs}, this one is {ours}), other weights of it, damaged parameters, or text unlike any "
        "that it was trained on."
    )


def _notes(own: Fit, declared: Declared, loss: Losses) -> list[str]:
    notes = []
    if own.n_tokens < FEW_TOKENS:
        notes.append(
            f"Few tokens: {own.n_tokens} were measured, so L0 and FVU are rough; {FEW_TOKENS} or more "
            "give steady figures."
        )
    if declared.l0 is None:
        notes.append("The dictionary declares no L0, so only FVU was judged.")
    if loss.zeroed > loss.clean and loss.spliced > loss.zeroed:
        notes.append("Splicing it in costs more loss than setting its site to zero.")
    if abs(loss.kept - loss.clean) > _KEPT:
        notes.append(
            f"Adding the error back changes the loss by {loss.kept - loss.clean:+.1e} nats, which should "
            "be nothing: is the model or the dictionary in a narrow number type?"
        )
    return notes
