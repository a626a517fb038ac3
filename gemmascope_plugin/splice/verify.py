"""Does a dictionary belong where it says, in this model? Measured, not assumed.

1. L0 and FVU at the dictionary's own tensors, special tokens left out; L0 at BOS for comparison.
2. The same under the tensors that are most often taken by mistake (``diagnose.py``).
3. The next-token loss clean, with the reconstruction alone, with the error kept, and with the site at
   zero (``fit.py``).
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
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Int

import gemmascope_plugin.saes as saes
from gemmascope_plugin.catalog.site_names import L0Kind
from gemmascope_plugin.errors import EmptySelectionError
from gemmascope_plugin.figures.fragments import card
from gemmascope_plugin.loading import spec_of
from gemmascope_plugin.models import special_ids
from gemmascope_plugin.models.gate import gate
from gemmascope_plugin.models.points import reading
from gemmascope_plugin.models.prompts import PromptLike, documents
from gemmascope_plugin.models.protocol import HookedModel, check_model
from gemmascope_plugin.models.record import record
from gemmascope_plugin.models.tokens import kept_positions
from gemmascope_plugin.splice.diagnose import (
    Declared,
    explain,
    far,
    nearby,
    reading_of,
    with_special,
)
from gemmascope_plugin.splice.fit import Batches, Candidate, Fit, SpliceLoss, losses_of, measure
from gemmascope_plugin.splice.hooked_sae import HookedSAE, check_sae
from gemmascope_plugin.splice.window import refuse_empty
from gemmascope_plugin.types import SAE

_BATCH = 16
"""Documents per forward pass."""
_SAMPLE = 256
"""Tokens on which every layer is tried."""

Verdict = Literal["fits", "does not fit"]


@dataclass(frozen=True, kw_only=True)
class Report:
    """A dictionary in a model, on some text."""

    hook_in: str
    """The tensor that was read."""
    hook_out: str
    """The tensor that was reconstructed."""
    l0: float
    """Mean number of active features per token that is not excluded."""
    declared_l0: float | None
    """What the release says; None when it says nothing."""
    l0_is: L0Kind
    """Whether the declared L0 was measured after training or is the target of training."""
    fvu: float
    """Squared error over squared distance from the mean; NaN for a single token."""
    bos_l0: float | None
    """Active features at BOS, where no Gemma Scope dictionary was trained; None without any BOS."""
    losses: SpliceLoss
    """Next-token losses in nats: clean, spliced, with the error kept, with the site at zero."""
    n_tokens: int
    """Tokens that were measured."""
    exclude: tuple[str | int, ...]
    """Special tokens that were left out."""
    causes: tuple[str, ...] = ()
    """What is wrong, in a word or two each: ``wrong site``, ``wrong layer``, ``gain missing``, ``gain
    doubled``, ``BOS included``, ``BOS left out``, ``folded norms``, ``wrong model``; empty when the
    dictionary fits."""
    findings: tuple[str, ...] = ()
    """What looks wrong and the likely cause, a short text each."""
    tried: tuple[Fit, ...] = ()
    """What was measured under other tensors."""

    @property
    def verdict(self) -> Verdict:
        """Whether the dictionary belongs where it says, in this model."""
        return "does not fit" if self.causes else "fits"

    @property
    def fits(self) -> bool:
        """The verdict as a truth value."""
        return not self.causes

    @property
    def delta_loss(self) -> float:
        """Rise of the loss when only the reconstruction flows, in nats; NaN if it cannot be spliced."""
        return self.losses.delta

    @property
    def delta_loss_kept(self) -> float:
        """Rise of the loss with the error added back; zero but for rounding."""
        return self.losses.error_kept - self.losses.clean

    @property
    def delta_loss_share(self) -> float:
        """:attr:`delta_loss` as a share of the rise when the site is set to zero."""
        return self.losses.share_of_zero

    def facts(self) -> list[tuple[str, str]]:
        """Pairs of name and text, as ``repr`` shows them."""
        route = (
            self.hook_out if self.hook_in == self.hook_out else f"{self.hook_in} -> {self.hook_out}"
        )
        loss = self.losses
        pairs = [
            ("verdict", self.verdict + (f": {', '.join(self.causes)}" if self.causes else "")),
            ("site", route),
            (
                "tokens",
                f"{self.n_tokens} (excluded: {', '.join(map(str, self.exclude)) or 'none'})",
            ),
            ("l0", f"{self.l0:.1f} ({self._declared()})"),
            ("l0 at BOS", "no BOS in the text" if self.bos_l0 is None else f"{self.bos_l0:.1f}"),
            ("fvu", f"{self.fvu:.3g}"),
            (
                "loss",
                f"{loss.clean:.4f} clean, {loss.spliced:.4f} spliced, {loss.zeroed:.4f} zeroed",
            ),
            ("delta loss", f"{self.delta_loss:+.4f}, {self.delta_loss_share:.2%} of zeroing"),
            ("with the error kept", f"{self.delta_loss_kept:+.1e}"),
        ]
        return pairs + [("finding", finding) for finding in self.findings]

    def _declared(self) -> str:
        if self.declared_l0 is None:
            return "none declared"
        return f"declared {self.declared_l0:g}{', a target' if self.l0_is == 'target' else ''}"

    def to_frame(self) -> Any:
        """A DataFrame of one row with every figure; rows of several reports can be concatenated."""
        import pandas as pd

        loss = self.losses
        row = {
            "hook_in": self.hook_in,
            "hook_out": self.hook_out,
            "verdict": self.verdict,
            "causes": ", ".join(self.causes),
            "l0": self.l0,
            "declared_l0": self.declared_l0,
            "l0_is": self.l0_is,
            "bos_l0": self.bos_l0,
            "fvu": self.fvu,
            "loss_clean": loss.clean,
            "loss_spliced": loss.spliced,
            "loss_kept": loss.error_kept,
            "loss_zeroed": loss.zeroed,
            "delta_loss": self.delta_loss,
            "delta_loss_share": self.delta_loss_share,
            "n_tokens": self.n_tokens,
            "exclude": ", ".join(map(str, self.exclude)),
            "findings": " ".join(self.findings),
        }
        return pd.DataFrame([row])

    def tried_frame(self) -> Any:
        """A DataFrame with one row per tensor that was tried beside the dictionary's own."""
        import pandas as pd

        columns = ["tensor", "would_mean", "l0", "fvu", "n_tokens"]
        rows = [(f.candidate.label, f.candidate.cause, f.l0, f.fvu, f.n_tokens) for f in self.tried]
        return pd.DataFrame(rows, columns=columns)

    def __repr__(self) -> str:
        return "Report\n" + "\n".join(f"  {name}: {text}" for name, text in self.facts())

    def _repr_html_(self) -> str:
        return card("verify", self.facts())


@gate(model=check_model, sae=check_sae)
def verify(
    model: HookedModel,
    sae: SAE | HookedSAE,
    prompts: PromptLike,
    *,
    exclude: str | int | Sequence[str | int] = ("bos", "eos", "pad"),
) -> Report:
    """Measures a dictionary in a model and says what looks wrong and why.

    Args:
        model: The bare model.
        sae: A dictionary from :func:`gemmascope_plugin.load`, or any JumpReLU SAE or transcoder of
            SAELens; its own ``metadata.hook_name`` is what is verified.
        prompts: One or several of any lengths, or token ids ``[batch, pos]``; a few hundred
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

    Example:
        >>> suite = gs.tiny()
        >>> gs.verify(suite.model, suite.load("res", 1), suite.task("ioi").clean)
        Report
          verdict: fits
          site: blocks.1.hook_resid_post
          tokens: 896 (excluded: bos, eos, pad)
          l0: 11.9 (declared 12.48)
          l0 at BOS: 58.0
          fvu: 0.0236
          loss: 1.2741 clean, 1.2740 spliced, 8.1088 zeroed
          delta loss: -0.0001, -0.00% of zeroing
          with the error kept: +0.0e+00
    """
    hooked = sae if isinstance(sae, HookedSAE) else HookedSAE(sae)
    plain, exclude = hooked.sae, (exclude,) if isinstance(exclude, (str, int)) else tuple(exclude)
    batches = [part for rows in documents(model, prompts) for part in rows.split(_BATCH)]
    if not batches:
        raise EmptySelectionError("There is no prompt", fix="give text or token ids [batch, pos]")
    excluded = special_ids(model, exclude)
    for tokens in batches:
        refuse_empty(kept_positions(tokens, excluded), exclude)
    read, readable = reading_of(model, hooked.hook_in)
    named = Candidate(
        read=read,
        write=reading(model, hooked.hook_out) if hooked.is_transcoder else read,
        excluded=excluded,
        label=hooked.hook_in,
    )
    declared = _declared(plain)
    fit, tried = _try_all(model, plain, batches, named, declared)
    loss = losses_of(
        model, plain, batches, exclude=exclude, hook_out=hooked.hook_out, can_splice=readable
    )
    causes, findings = explain(model, plain, fit, tried, declared, loss, readable=readable)
    return Report(
        hook_in=hooked.hook_in,
        hook_out=hooked.hook_out,
        l0=fit.l0,
        declared_l0=declared.l0,
        l0_is=declared.l0_is,
        fvu=fit.fvu,
        bos_l0=_bos_l0(model, plain, batches, named),
        losses=loss,
        n_tokens=fit.n_tokens,
        exclude=exclude,
        causes=causes,
        findings=findings,
        tried=tuple(tried),
    )


def _try_all(
    model: HookedModel, sae: SAE, batches: Batches, named: Candidate, declared: Declared
) -> tuple[Fit, list[Fit]]:
    """The fit at the tensors that the dictionary names, and those of the candidates."""
    names = ("bos", "eos", "pad")
    special = special_ids(model, names) if model.tokenizer is not None else frozenset()
    fit, *tried = measure(model, sae, batches, [named, *nearby(model, sae, named, special)])
    # Far layers on a few tokens of the same text, as there are many; the best one on all of it.
    sampled, *far_fits = measure(model, sae, [_sample(batches)], [named, *far(model, named)])
    best = declared.best(far_fits, sampled)
    more = [] if best is None else [best.candidate]
    if not declared.agrees(fit):
        more += with_special(named)
    return fit, tried + (measure(model, sae, batches, more) if more else [])


def _sample(batches: Batches) -> Int[torch.Tensor, "_ _"]:
    """The first few hundred tokens; cutting a document off changes nothing before the cut."""
    tokens = batches[0][:, :_SAMPLE]
    return tokens[: max(1, _SAMPLE // tokens.shape[1])]


def _declared(sae: SAE) -> Declared:
    spec = spec_of(sae)
    if spec is not None:
        return Declared(l0=spec.l0, l0_is=spec.l0_is)
    return Declared(l0=sae.cfg.metadata.l0)


@torch.no_grad()
def _bos_l0(model: HookedModel, sae: SAE, batches: Batches, named: Candidate) -> float | None:
    """Mean active features at BOS; None without BOS."""
    bos = special_ids(model, ("bos",)) if model.tokenizer is not None else frozenset()
    coder, active, n = saes.coder_of(sae), 0, 0
    for tokens in batches:
        here = ~kept_positions(tokens, bos)
        rows = here.any(1)
        if not rows.any():
            continue
        name = named.read.hook
        n_read = int(here.any(0).nonzero().max()) + 1  # no later token changes what BOS is
        cache = record(model, tokens[rows, :n_read], [name])
        x = named.read(cache[name])[here[rows, :n_read]].flatten(1)
        active += int((coder.activate(coder.pre_activations(x), x) > 0).sum())
        n += len(x)
    return active / n if n else None
