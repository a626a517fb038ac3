"""Encode and decode where the largest pre-activations of a token are active: top-k and SoftSAE.

1. ``z = ReLU((x - b_dec) @ W_enc + b_enc)``; whether ``b_dec`` is subtracted, and whether tokens are
   standardised first (``token_units.py``), is the dictionary's choice.
2. ``f`` keeps the ``k`` largest ``z`` of each token. ``k`` is one number (arXiv 2406.04093), or what a
   budget network says of the token (SoftSAE, arXiv 2605.06610; ``soft.py``).
3. ``x_hat = f @ W_dec + b_dec``.

Edits change the features that they name and no others: what is freed does not let others in.

Cost: that of a dense SAE and one ``topk``; a budget network doubles the encoder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from typing_extensions import override

from gemmascope_plugin.errors import ModelError, UnknownNameError
from gemmascope_plugin.saes.lapsum import keep_top
from gemmascope_plugin.saes.token_units import TokenUnits
from gemmascope_plugin.saes.whole_encode import WholeEncode

Budget = Callable[[torch.Tensor], "Int[torch.Tensor, '*tokens']"]
"""From what the encoder sees of some tokens to how many features each may have."""

ARCHITECTURE = "topk"
"""SAELens' name of the dictionaries that ``topk_coder`` reads."""


@dataclass(frozen=True, eq=False)
class RankCoder(TokenUnits, WholeEncode):
    """The tensors of a dictionary that selects by rank."""

    what = "dictionary that selects by rank"

    W_enc: Float[torch.Tensor, "d_in d_sae"]
    b_enc: Float[torch.Tensor, " d_sae"]
    W_dec: Float[torch.Tensor, "d_sae d_out"]
    b_dec: Float[torch.Tensor, " d_out"]
    k: int | Budget
    """One number for all tokens, or a network's."""
    subtract_b_dec: bool

    standardize: bool = False

    @property
    @override
    def d_sae(self) -> int:
        """Number of features."""
        return self.W_enc.shape[1]

    @override
    def pre_activations(
        self, x: Float[torch.Tensor, "*tokens d_in"]
    ) -> Float[torch.Tensor, "*tokens d_sae"]:
        """``z`` before ReLU."""
        return self.seen(x) @ self.W_enc + self.b_enc

    @override
    def activate(
        self,
        pre: Float[torch.Tensor, "*tokens d_sae"],
        x: Float[torch.Tensor, "*tokens d_in"],
    ) -> Float[torch.Tensor, "*tokens d_sae"]:
        """The largest of each token, where positive."""
        return keep_top(pre.relu(), self.k if isinstance(self.k, int) else self.k(self.seen(x)))


def rank_coder(sae: Any, k: int | Budget, level: int | None) -> RankCoder:
    """The coder of a dictionary with ``W_enc, b_enc, W_dec, b_dec``.

    Args:
        sae: SAELens' ``TopKSAE``, or a ``SoftSAE``.
        k: How many features are active.
        level: None: there are no levels.

    Raises:
        UnknownNameError: A level was asked for.
        ModelError: The input has a factor, which must be folded into the weights first.
    """
    if level is not None:
        raise UnknownNameError(
            f"The dictionary has no levels, so there is no level {level}",
            exists=f"one dictionary of {sae.W_enc.shape[1]} features",
            fix="level=None",
        )
    if sae.cfg.normalize_activations not in ("none", "layer_norm"):
        raise ModelError(
            f"The dictionary normalises its input ({sae.cfg.normalize_activations})",
            fix="sae.fold_activation_norm_scaling_factor(factor) first",
        )
    return RankCoder(
        W_enc=sae.W_enc,
        b_enc=sae.b_enc,
        W_dec=sae.W_dec,
        b_dec=sae.b_dec,
        k=k,
        subtract_b_dec=sae.cfg.apply_b_dec_to_input,
        standardize=sae.cfg.normalize_activations == "layer_norm",
    )


def topk_coder(sae: Any, level: int | None) -> RankCoder:
    """The coder of SAELens' ``TopKSAE``.

    Raises:
        UnknownNameError: A level was asked for.
        ModelError: The input is normalised, or features are compared times their decoder norms.
    """
    if sae.cfg.rescale_acts_by_decoder_norm:
        raise ModelError(
            "The dictionary compares features times the norms of their decoder rows",
            fix="sae.fold_W_dec_norm(), then sae.cfg.rescale_acts_by_decoder_norm = False",
        )
    return rank_coder(sae, int(sae.cfg.k), level)
