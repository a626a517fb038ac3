"""Does a dictionary belong where it says, in this model? Measured, not assumed.

1. L0 and FVU at the dictionary's own tensors, special tokens left out; L0 at BOS for comparison.
2. The same under the tensors that are most often taken by mistake (``diagnose.py``).
3. The next-token loss clean, with the reconstruction alone, with the error kept, and with the site at
   zero (``losses.py``).
4. A verdict with its causes, one sentence each.

It fits when the measured L0 is 0.65 to 1.5 times the declared one (0.5 to 2 times for a target that
training only aimed at; not looked at where none is declared), FVU is at most 0.8, and no other tensor
tried has at most 0.85 times its FVU with an L0 that is as close. The limits are wide because text
differs: published right readings have L0 within 35 % and FVU 0.05 to 0.55, wrong tensors an FVU above
1 or an L0 off by a factor of two and more. The comparison is sharp because it is made on the same tokens.

Cost: five forward passes and about ten encodes and decodes of the text, and one of 256 tokens per
layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int

import gemmascope_plugin.saes as saes
from gemmascope_plugin.errors import EmptySelectionError
from gemmascope_plugin.loading import spec_of
from gemmascope_plugin.models import special_ids
from gemmascope_plugin.models.check_model import check_model
from gemmascope_plugin.models.gate import gate
from gemmascope_plugin.models.prompts import PromptLike, documents
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.models.record import record
from gemmascope_plugin.models.site_hooks import reading
from gemmascope_plugin.models.tokens import kept_positions
from gemmascope_plugin.splice.check_saes import check_sae
from gemmascope_plugin.splice.diagnose import Declared, far, nearby, own_reading, with_special
from gemmascope_plugin.splice.findings import explain
from gemmascope_plugin.splice.fit import Batches, Candidate, Fit, measure
from gemmascope_plugin.splice.hooked_sae import HookedSAE
from gemmascope_plugin.splice.losses import losses
from gemmascope_plugin.splice.report import Report

_BATCH = 16
"""Documents per forward pass."""
_SAMPLE = 256
"""Tokens on which every layer is tried."""


@gate(model=check_model, sae=check_sae)
def verify(
    model: HookedModel,
    sae: Any,
    text: PromptLike,
    *,
    exclude: str | int | Sequence[str | int] = ("bos", "eos", "pad"),
) -> Report:
    """Measures a dictionary in a model and says what looks wrong and why.

    Args:
        model: The bare model.
        sae: A dictionary from :func:`gemmascope_plugin.load`, or any JumpReLU SAE or transcoder of
            SAELens; its own ``metadata.hook_name`` is what is verified.
        text: One or several prompts of any lengths, or token ids ``[batch, pos]``; a few hundred
            tokens of ordinary text give steady figures.
        exclude: Special tokens that are not measured. Gemma Scope was trained without them.

    Returns:
        A report whose ``verdict`` is ``"fits"`` or ``"does not fit"``. A dictionary fits when its L0
        is 0.65 to 1.5 times the declared one (0.5 to 2 times for a target), its FVU at most 0.8, and
        no tensor that was tried instead does clearly better.

    Raises:
        ModelError: Neither a JumpReLU dictionary nor a tree, or text without a tokenizer.
        MissingHookError: The model has no such hook at all.
        WidthMismatchError: The model's tensor has another width.
        EmptySelectionError: No text, or nothing but excluded tokens.
    """
    hooked = sae if isinstance(sae, HookedSAE) else HookedSAE(sae)
    sae, exclude = hooked.sae, (exclude,) if isinstance(exclude, (str, int)) else tuple(exclude)
    batches = [part for rows in documents(model, text) for part in rows.split(_BATCH)]
    if not batches:
        raise EmptySelectionError("There is no prompt", fix="give text or token ids [batch, pos]")
    excluded = special_ids(model, exclude)
    _refuse_empty(batches, excluded, exclude)
    read, readable = own_reading(model, hooked.hook_in)
    own = Candidate(
        read=read,
        write=reading(model, hooked.hook_out) if hooked.is_transcoder else read,
        excluded=excluded,
        what=hooked.hook_in,
    )
    declared = _declared(sae)
    fit, tried = _try_all(model, sae, batches, own, declared)
    loss = losses(
        model, sae, batches, exclude=exclude, hook_out=hooked.hook_out, can_splice=readable
    )
    causes, findings = explain(model, sae, fit, tried, declared, loss, readable=readable)
    return Report(
        hook_in=hooked.hook_in,
        hook_out=hooked.hook_out,
        l0=fit.l0,
        declared_l0=declared.l0,
        l0_is=declared.l0_is,
        fvu=fit.fvu,
        bos_l0=_bos_l0(model, sae, batches, own),
        losses=loss,
        n_tokens=fit.n_tokens,
        exclude=exclude,
        causes=causes,
        findings=findings,
        tried=tuple(tried),
    )


def _try_all(
    model: HookedModel, sae: Any, batches: Batches, own: Candidate, declared: Declared
) -> tuple[Fit, list[Fit]]:
    """The dictionary's own fit and those of the candidates."""
    names = ("bos", "eos", "pad")
    special = special_ids(model, names) if model.tokenizer is not None else frozenset()
    first, *tried = measure(model, sae, batches, [own, *nearby(model, sae, own, special)])
    # Far layers on a few tokens of the same text, as there are many; the best one on all of it.
    sampled, *others = measure(model, sae, [_sample(batches)], [own, *far(model, own)])
    best = declared.best(others, sampled)
    more = [] if best is None else [best.candidate]
    if not declared.agrees(first):
        more += with_special(own)
    return first, tried + (measure(model, sae, batches, more) if more else [])


def _sample(batches: Batches) -> Int[torch.Tensor, "_ _"]:
    """The first few hundred tokens; cutting a document off changes nothing before the cut."""
    tokens = batches[0][:, :_SAMPLE]
    return tokens[: max(1, _SAMPLE // tokens.shape[1])]


def _declared(sae: Any) -> Declared:
    spec = spec_of(sae)
    if spec is not None:
        return Declared(l0=spec.l0, l0_is=spec.l0_is)
    return Declared(l0=sae.cfg.metadata.l0)


@torch.no_grad()
def _bos_l0(model: HookedModel, sae: Any, batches: Batches, own: Candidate) -> float | None:
    """Mean active features at BOS; None without BOS."""
    bos = special_ids(model, ("bos",)) if model.tokenizer is not None else frozenset()
    coder, active, n = saes.coder_of(sae), 0, 0
    for tokens in batches:
        here = ~kept_positions(tokens, bos)
        rows = here.any(1)
        if not rows.any():
            continue
        name = own.read.hook
        n_read = int(here.any(0).nonzero().max()) + 1  # no later token changes what BOS is
        cache = record(model, tokens[rows, :n_read], [name])
        x = own.read(cache[name])[here[rows, :n_read]].flatten(1)
        active += int((coder.activate(coder.pre_activations(x), x) > 0).sum())
        n += len(x)
    return active / n if n else None


def _refuse_empty(
    batches: Batches, excluded: frozenset[int], exclude: tuple[str | int, ...]
) -> None:
    if not all(kept_positions(tokens, excluded).any(-1).all() for tokens in batches):
        raise EmptySelectionError(
            "A prompt has only excluded tokens",
            exists=f"exclude={exclude}",
            fix="prompts with at least one word, or exclude=()",
        )
