"""Measures of one dictionary on a corpus: sparsity, fit, loss, frequencies, evenness, geometry.

1. One pass reads the dictionary's input and output sites at the tokens that are not excluded. Features
   are encoded sparsely and only counts and sums are kept, so that the corpus may be of any size. The
   target is the tensor at the *output* site; an affine skip is part of the reconstruction.
2. ``l0``, ``fvu`` (about the mean of the same tokens) and the loss measures: arXiv 2408.05147,
   section 4; see ``splice_loss.py``.
3. ``dead_share``, ``dense_share`` (features active on more than a tenth of the tokens) and the
   histogram of firing frequencies in half decades, from the same counts.
4. ``r_l0``, evenness of importance (``importance.py``), and ``max_cosine`` of the decoder
   (``geometry.py``).

Cost: six forward passes over the corpus, one encode and sparse decode of it and one more in the
spliced pass, ``n_positions`` backward passes a batch, and the decoder times itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from typing_extensions import override

import gemmascope_plugin.saes as saes
from gemmascope_plugin.errors import ModelError
from gemmascope_plugin.features.stream import Corpus, Tokens, corpus, hooked_for, site_tensors
from gemmascope_plugin.measures.geometry import mean_max_cosine
from gemmascope_plugin.measures.importance import importance
from gemmascope_plugin.measures.measured import Measured
from gemmascope_plugin.measures.splice_loss import splice_loss
from gemmascope_plugin.models.check_model import check_model
from gemmascope_plugin.models.gate import gate
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.saes import Coder
from gemmascope_plugin.splice import HookedSAE
from gemmascope_plugin.splice.check_saes import check_sae
from gemmascope_plugin.splice.losses import SpliceLoss

DENSE = 0.1
"""A feature active on a larger share of the tokens is dense."""
BIN_EDGES = tuple(10 ** (k / 2) for k in range(-10, 1))
"""Upper edges of the frequency bins: half decades from 1e-5 to 1. Each bin holds its upper edge."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Measures(Measured):
    """What was measured of one dictionary; ``to_frame`` has it as a row."""

    l0: float
    """Mean number of active features per token."""
    fvu: float
    """Squared error over squared distance from the mean; NaN where the tokens do not vary."""
    losses: SpliceLoss
    frequencies: Float[torch.Tensor, " d_sae"]
    """Share of the tokens on which each feature is active."""
    r_l0: float
    """Uniformity of active features' importance, between 1 / L0 and 1."""
    r_l0_tokens: int
    """Number of tokens behind ``r_l0``."""
    max_cosine: float
    """Mean over decoder rows of the largest cosine with another row."""

    @property
    def delta_loss(self) -> float:
        """Rise of the next-token loss, in nats, with the reconstruction in place of its site."""
        return self.losses.delta

    @property
    def dead_share(self) -> float:
        """Share of the features that are active on none of these tokens."""
        return float((self.frequencies == 0).float().mean())

    @property
    def dense_share(self) -> float:
        """Share of the features that are active on more than a tenth of these tokens."""
        return float((self.frequencies > DENSE).float().mean())

    def histogram(self) -> Any:
        """A DataFrame, one row per bin of firing frequency: ``above``, ``up_to``, ``n_features``.

        The first row, ``up_to`` 0, counts the features that never fire. Bins are half decades; a
        frequency on an edge belongs to the bin below it.
        """
        import pandas as pd

        edges = torch.tensor(BIN_EDGES, dtype=torch.float64)
        alive = self.frequencies[self.frequencies > 0].double().cpu()
        counts = torch.bincount(torch.bucketize(alive, edges), minlength=len(edges)).tolist()
        rows = [(0.0, 0.0, self.d_sae - len(alive))]
        rows += zip((0.0, *BIN_EDGES[:-1]), BIN_EDGES, counts, strict=True)
        return pd.DataFrame(rows, columns=["above", "up_to", "n_features"])

    @override
    def row(self) -> dict[str, Any]:
        """Every figure by name."""
        return {
            **self._what(),
            "l0": self.l0,
            "fvu": self.fvu,
            "delta_loss": self.delta_loss,
            "share_of_zero": self.losses.share_of_zero,
            "share_of_mean": self.losses.share_of_mean,
            "dead_share": self.dead_share,
            "dense_share": self.dense_share,
            "r_l0": self.r_l0,
            "max_cosine": self.max_cosine,
        }

    def __repr__(self) -> str:
        return (
            f"Measures({self._head()}: L0 {self.l0:.1f}, FVU {self.fvu:.3f}, delta loss "
            f"{self.delta_loss:.4f} ({self.losses.share_of_zero:.1%} of zeros, "
            f"{self.losses.share_of_mean:.1%} of the mean), dead {self.dead_share:.1%}, dense "
            f"{self.dense_share:.1%}, r_L0 {self.r_l0:.3f}, max cosine {self.max_cosine:.3f})"
        )


class _Sums:
    """Running sums over a corpus, in float64."""

    def __init__(self, coder: Coder) -> None:
        d_out, device = coder.W_dec.shape[1], coder.W_dec.device
        self.n = 0
        self.error = 0.0
        self.squares = 0.0
        self.total = torch.zeros(d_out, dtype=torch.float64, device=device)
        self.fires = torch.zeros(coder.d_sae, dtype=torch.long, device=device)

    def add(
        self,
        coder: Coder,
        x: Float[torch.Tensor, "token d_in"],
        y: Float[torch.Tensor, "token d_out"],
    ) -> None:
        """Counts one batch."""
        acts = coder.encode_sparse(x)
        target = y.double()
        self.n += len(x)
        self.error += float((target - saes.reconstruct(coder, acts, x)).pow(2).sum())
        self.squares += float(target.pow(2).sum())
        self.total += target.sum(0)
        self.fires += torch.bincount(acts.indices, minlength=len(self.fires))

    @property
    def fvu(self) -> float:
        """NaN where the tokens do not vary."""
        variance = self.squares - float(self.total.pow(2).sum()) / self.n
        varies = variance > 1e-12 * max(self.squares, 1e-30)
        return self.error / variance if varies else math.nan


@gate(model=check_model, sae=check_sae)
def measure(
    model: HookedModel,
    sae: Any,
    tokens: Tokens,
    *,
    exclude: str | int | Sequence[str | int] = ("bos", "eos", "pad"),
    batch: int = 16,
    n_positions: int = 8,
) -> Measures:
    """Measures a dictionary on a corpus.

    Args:
        model: The bare model.
        sae: A JumpReLU SAE or transcoder; ``HookedSAE(sae, level=0)`` for a level of a Matryoshka
            dictionary, whose other options do not count.
        tokens: Token ids ``[document, pos]``, or several such tensors.
        exclude: Special tokens that are neither measured nor touched.
        batch: Documents per forward pass.
        n_positions: Positions per document at which ``r_l0`` is measured, a backward pass each; 0
            leaves it NaN.

    Raises:
        EmptySelectionError: No token, or excluded ones only.
        ModelError: Not a JumpReLU dictionary, or ``batch`` or ``n_positions`` out of range.
        MissingHookError: The model has no such hook.
        WidthMismatchError: The dictionary has another width than the model's tensor.

    Example:
        >>> suite = gs.tiny()
        >>> tokens = suite.task("agreement").bind(suite.model).clean
        >>> gs.measure(suite.model, suite.load("res", 1), tokens, n_positions=2)
        Measures(blocks.1.hook_resid_post, 512 features, 384 tokens, excluded ('bos', 'eos',
          'pad'): L0 12.0, FVU 0.017, delta loss -0.0104 (-0.2% of zeros, -0.1% of the mean),
          dead 73.2%, dense 7.8%, r_L0 0.668, max cosine 0.327)
    """
    if n_positions < 0:
        raise ModelError(f"n_positions={n_positions} is negative", fix="n_positions=0 to skip r_L0")
    text = corpus(model, tokens, exclude, batch)
    return _measure(model, hooked_for(sae, text.exclude), text, n_positions)


@torch.no_grad()
def _measure(model: HookedModel, hooked: HookedSAE, text: Corpus, n_positions: int) -> Measures:
    coder = hooked.weights
    sums = _Sums(coder)
    for x, y in site_tensors(model, hooked, text):
        sums.add(coder, x, y)
    mean = (sums.total / sums.n).float()
    losses = splice_loss(model, hooked, text, mean)
    r_l0, r_l0_tokens = importance(model, hooked, text, n_positions)
    return Measures(
        hook_in=hooked.hook_in,
        hook_out=hooked.hook_out,
        d_sae=hooked.d_sae,
        level=hooked.level,
        n_tokens=sums.n,
        exclude=text.exclude,
        l0=float(sums.fires.sum()) / sums.n,
        fvu=sums.fvu,
        losses=losses,
        frequencies=sums.fires.double() / sums.n,
        r_l0=r_l0,
        r_l0_tokens=r_l0_tokens,
        max_cosine=mean_max_cosine(coder.W_dec),
    )
