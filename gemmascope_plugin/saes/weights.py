"""The tensors of a JumpReLU dictionary as one record, whole or cut to a prefix of its features.

A Matryoshka dictionary (arXiv 2503.17547) reconstructs its input from the first ``m`` features alone,
for each of its levels ``m``. The prefix is a dictionary of its own: the first ``m`` columns of ``W_enc``
and rows of ``W_dec`` with the shared ``b_dec``. All tensors are views; nothing is copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int

from gemmascope_plugin.errors import UnknownNameError
from gemmascope_plugin.saes.cross_layer import CrossLayerDictionary
from gemmascope_plugin.saes.encode_sparse import encode_sparse
from gemmascope_plugin.saes.jumprelu import bias, encode_features, has_skip, jump, pre_activations
from gemmascope_plugin.saes.sparse import SparseActs
from gemmascope_plugin.saes.two_stage import TwoStage


@dataclass(frozen=True, eq=False)
class Weights:
    """What encodes and decodes at one site."""

    W_enc: Float[torch.Tensor, "d_in d_sae"]
    b_enc: Float[torch.Tensor, " d_sae"]
    threshold: Float[torch.Tensor, " d_sae"]
    W_dec: Float[torch.Tensor, "d_sae d_out"]
    b_dec: Float[torch.Tensor, " d_out"]
    W_skip: Float[torch.Tensor, "d_out d_in"] | None = None

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.W_enc.shape[1]

    @property
    def reads_input(self) -> bool:
        """Whether there is an affine skip."""
        return has_skip(self)

    def encode_sparse(
        self,
        x: Float[torch.Tensor, "*tokens d_in"],
        *,
        keep: Bool[torch.Tensor, "*tokens"] | None = None,
        two_stage: TwoStage | None = None,
    ) -> SparseActs:
        """The active features, exactly."""
        return encode_sparse(self, x, keep=keep, two_stage=two_stage)

    def encode_features(
        self, x: Float[torch.Tensor, "*tokens d_in"], features: Int[torch.Tensor, " k"]
    ) -> Float[torch.Tensor, "*tokens k"]:
        """The chosen features; reads ``k`` encoder columns."""
        return encode_features(self, x, features)

    def pre_activations(
        self, x: Float[torch.Tensor, "*tokens d_in"]
    ) -> Float[torch.Tensor, "*tokens d_sae"]:
        """``x @ W_enc + b_enc``."""
        return pre_activations(self, x)

    def activate(
        self,
        pre: Float[torch.Tensor, "*tokens d_sae"],
        x: Float[torch.Tensor, "*tokens d_in"],
    ) -> Float[torch.Tensor, "*tokens d_sae"]:
        """``pre`` above threshold and zero, whatever ``x``."""
        return jump(pre, self.threshold)

    def scale(self, x: Float[torch.Tensor, "*tokens d_in"]) -> None:
        """None: features write ``f_i * W_dec[i]``."""

    def bias(self, x: Float[torch.Tensor, "*tokens d_in"]) -> Float[torch.Tensor, "*#tokens d_out"]:
        """``b_dec``, plus ``x @ W_skip.T`` with a skip."""
        return bias(self, x)

    def make_two_stage(self) -> TwoStage:
        """A faster exact encoder; see ``two_stage.py``."""
        return TwoStage(self)


def weights_of(sae: Any, level: int | None = None) -> Weights:
    """The tensors of a SAELens JumpReLU dictionary.

    Args:
        sae: ``JumpReLUSAE``, ``JumpReLUTranscoder`` or ``JumpReLUSkipTranscoder``.
        level: For Matryoshka dictionaries: 0 for the coarsest prefix, -1 for the whole; None for the
            whole of any dictionary.

    Raises:
        UnknownNameError: The dictionary has no such level.
    """
    width = sae.W_enc.shape[1] if level is None else level_width(sae, level)
    return Weights(
        W_enc=sae.W_enc[:, :width],
        b_enc=sae.b_enc[:width],
        threshold=sae.threshold[:width],
        W_dec=sae.W_dec[:width],
        b_dec=sae.b_dec,
        W_skip=getattr(sae, "W_skip", None),
    )


def level_width(sae: Any, level: int) -> int:
    """Number of features in a level of a Matryoshka dictionary.

    Raises:
        UnknownNameError: The dictionary has no such level.
    """
    widths = sae.cfg.metadata.levels or ()
    if not widths:
        raise UnknownNameError(
            f"The dictionary has no levels, so there is no level {level}",
            exists=f"one dictionary of {sae.W_enc.shape[1]} features",
            fix="level=None, or a dictionary from find(variant='matryoshka')",
        )
    if not -len(widths) <= level < len(widths):
        raise UnknownNameError(
            f"The dictionary has no level {level}",
            exists=", ".join(f"level {i}: {width} features" for i, width in enumerate(widths)),
        )
    return int(widths[level])


def layer_weights(dictionary: CrossLayerDictionary, position: int) -> Weights:
    """What a crosscoder or CLT encodes and decodes at one of its layers, features of that layer only.

    Args:
        dictionary: The dictionary; opens the layer if it is not open yet.
        position: Index into ``cfg.layers``.
    """
    own = dictionary.weights(position)
    return Weights(
        W_enc=own.W_enc,
        b_enc=own.b_enc,
        threshold=own.threshold,
        W_dec=own.W_dec[:, position],
        b_dec=own.b_dec,
        W_skip=None if own.A is None else own.A.T,
    )
