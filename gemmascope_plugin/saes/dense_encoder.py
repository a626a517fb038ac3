"""Encoders whose features compete or gate one another: any of them costs the whole encode.

1. The kept tokens are encoded densely: pre-activations, then ``activate``.  What is active is as exact
   as one matrix product: ties and gates are decided on computed values, unlike JumpReLU's
   (``jumprelu.py``).
2. There are no two stages: a first pass would have to bound the k-th largest pre-activation.
3. Tokens may be standardised: ``x' = (x - mean) / (std + 1e-5)``, ``std`` unbiased, over ``d_in``: what
   SAELens calls ``normalize_activations="layer_norm"``, to the same formula.  The reconstruction is
   ``(f @ W_dec + b_dec) * std + mean``: a feature writes ``f_i * W_dec[i] * std``.
4. SAELens keeps mean and deviation of the last ``encode`` in the dictionary, and ``decode`` takes them,
   whoever's activations it is given.  Here they travel *with the activations* that ``encode``
   returned; any other tensor (edited, sliced, loaded) needs the tokens, so that another token's mean
   and deviation are never used in silence.

``RankCoder``: the largest pre-activations of a token are active, in top-k and SoftSAE.

1. ``z = ReLU((x - b_dec) @ W_enc + b_enc)``; whether ``b_dec`` is subtracted, and whether tokens are
   standardised first, is the dictionary's choice.
2. ``f`` keeps the ``k`` largest ``z`` of each token. ``k`` is one number (arXiv 2406.04093), or what a
   budget network says of the token (SoftSAE, arXiv 2605.06610; ``soft.py``).
3. ``x_hat = f @ W_dec + b_dec``.

Edits change the features that they name and no others: what is freed does not let others in.

Cost: ``2 * tokens * d_in * d_sae`` operations, one dense block of ``tokens * d_sae``, one ``topk``; a
budget network doubles the encoder.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from typing_extensions import override

from gemmascope_plugin.errors import ModelError, UnknownNameError, WidthMismatchError
from gemmascope_plugin.saes.lapsum import keep_top
from gemmascope_plugin.saes.sparse import Acts, Inputs, Outputs, SparseActs
from gemmascope_plugin.saes.two_stage import Bf16Prefilter
from gemmascope_plugin.types import SAE

EPS = 1e-5
_UNITS = "_gemmascope_token_units"
"""Attribute of activations that ``encode`` returned: means and deviations of their tokens."""

Units = tuple[
    Inputs, Float[torch.Tensor, "*tokens 1"] | None, Float[torch.Tensor, "*tokens 1"] | None
]
"""Tokens as the encoder takes them, and mean and deviation; None where nothing was taken off."""


def standardise(
    x: Inputs,
) -> tuple[Inputs, Float[torch.Tensor, "*tokens 1"], Float[torch.Tensor, "*tokens 1"]]:
    """The standardised tokens, their means and their deviations."""
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    return (x - mean) / (std + EPS), mean, std


class DenseEncoder(ABC):
    """What follows for a coder (``coder.py``) from its pre-activations and its ``activate``."""

    description: str
    """What kind of dictionary this is, for errors."""

    W_enc: Float[torch.Tensor, "d_in d_sae"]
    b_dec: Float[torch.Tensor, " d_out"]
    standardize: bool
    subtract_b_dec: bool

    @abstractmethod
    def pre_activations(self, x: Inputs) -> Acts:
        """What decides which features are active, and is their value there."""

    @abstractmethod
    def activate(self, pre: Acts, x: Inputs) -> Acts:
        """The features of pre-activations of ``x``."""

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.W_enc.shape[1]

    @property
    def reads_input(self) -> bool:
        """True where tokens are standardised: their mean and deviation are put back."""
        return self.standardize

    def units(self, x: Inputs) -> Units:
        """``x', mean, std`` in the dictionary's type; refuses tokens of another width."""
        if x.shape[-1] != self.W_enc.shape[0]:
            raise WidthMismatchError(
                f"the dictionary has width {self.W_enc.shape[0]}, the tensor has {x.shape[-1]}",
                fix="the tensor at the dictionary's own hook point",
            )
        x = x.to(self.W_enc.dtype)
        return standardise(x) if self.standardize else (x, None, None)

    def encoder_input(self, x: Inputs) -> Inputs:
        """What the encoder's matrix is multiplied with."""
        scaled = self.units(x)[0]
        return scaled - self.b_dec if self.subtract_b_dec else scaled

    def encode_sparse(
        self,
        x: Inputs,
        *,
        keep: Bool[torch.Tensor, "*tokens"] | None = None,
        two_stage: Bf16Prefilter | None = None,
    ) -> SparseActs:
        """The active features; tokens that are not kept have none."""
        assert two_stage is None, f"a {self.description} has no two stages"
        tokens = x if keep is None else x[keep]
        if not bool(torch.isfinite(tokens).all()):
            raise ModelError(
                "a token that should be encoded has NaN or infinity",
                fix="keep= without that token, or a model in a type in which it does not overflow",
            )
        acts = self.activate(self.pre_activations(tokens), tokens)
        if keep is not None:
            acts = acts.new_zeros(*x.shape[:-1], self.d_sae).index_put((keep,), acts)
        return SparseActs.from_dense(acts)

    def encode_features(
        self, x: Inputs, features: Int[torch.Tensor, " k"]
    ) -> Float[torch.Tensor, "*tokens k"]:
        """The chosen features; costs the whole encode."""
        return self.activate(self.pre_activations(x), x)[..., features]

    def scale(self, x: Inputs) -> Float[torch.Tensor, "*tokens 1"] | None:
        """The deviation of each token, where it was taken off."""
        return self.units(x)[2]

    def bias(self, x: Inputs) -> Float[torch.Tensor, "*#tokens d_out"]:
        """``b_dec``, or ``b_dec * std + mean``."""
        _, mean, std = self.units(x)
        if mean is None or std is None:
            return self.b_dec.expand(*[1] * (x.ndim - 1), -1)
        return self.b_dec * std + mean

    def make_two_stage(self) -> Bf16Prefilter:
        """Refuses: there are no two stages here."""
        raise ModelError(
            f"two_stage=True is for JumpReLU dictionaries, this one is a {self.description}",
            fix="two_stage=False",
        )


def with_units(acts: Acts, units: Units) -> Acts:
    """Activations that carry the mean and deviation of their tokens."""
    if hasattr(acts, _UNITS):  # a hook put back what another call returned: leave that alone
        acts = acts.view_as(acts)
    setattr(acts, _UNITS, units[1:])
    return acts


def in_model_units(out: Outputs, acts: Acts, units: Units | None) -> Outputs:
    """A reconstruction in the units of the model: by ``units``, or by what ``acts`` carry."""
    mean, std = getattr(acts, _UNITS, (None, None)) if units is None else units[1:]
    if mean is None or std is None:
        raise ModelError(
            "These activations are not the tensor that encode returned, so the mean and deviation "
            "of their tokens are not known",
            fix="decode(acts, like=x) with the tokens x that were encoded",
        )
    return out * std + mean


Budget = Callable[[torch.Tensor], "Int[torch.Tensor, '*tokens']"]
"""From what the encoder sees of some tokens to how many features each may have."""

ARCHITECTURE = "topk"
"""SAELens' name of the dictionaries that ``topk_coder`` reads."""


@dataclass(frozen=True, eq=False)
class RankCoder(DenseEncoder):
    """The tensors of a dictionary that selects by rank."""

    description = "dictionary that selects by rank"

    W_enc: Float[torch.Tensor, "d_in d_sae"]
    b_enc: Float[torch.Tensor, " d_sae"]
    W_dec: Float[torch.Tensor, "d_sae d_out"]
    b_dec: Float[torch.Tensor, " d_out"]
    k: int | Budget
    """One number for all tokens, or a network's."""
    subtract_b_dec: bool

    standardize: bool = False

    @override
    def pre_activations(self, x: Inputs) -> Acts:
        """``z`` before ReLU."""
        return self.encoder_input(x) @ self.W_enc + self.b_enc

    @override
    def activate(self, pre: Acts, x: Inputs) -> Acts:
        """The largest of each token, where positive."""
        return keep_top(
            pre.relu(), self.k if isinstance(self.k, int) else self.k(self.encoder_input(x))
        )


def rank_coder(sae: SAE, k: int | Budget, level: int | None) -> RankCoder:
    """The coder of a dictionary with ``W_enc, b_enc, W_dec, b_dec``."""
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


def topk_coder(sae: SAE, level: int | None) -> RankCoder:
    """The coder of SAELens' ``TopKSAE``."""
    if sae.cfg.rescale_acts_by_decoder_norm:
        raise ModelError(
            "The dictionary compares features times the norms of their decoder rows",
            fix="sae.fold_W_dec_norm(), then sae.cfg.rescale_acts_by_decoder_norm = False",
        )
    return rank_coder(sae, int(sae.cfg.k), level)
