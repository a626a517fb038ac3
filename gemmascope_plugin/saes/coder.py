"""What a splice needs of a dictionary at one site, whatever its architecture.

With ``f`` the features of ``x``, a dictionary writes ``D(f, x) = scale(x) * (f @ W_dec) + bias(x)``.

* JumpReLU (``Weights``): no scale; the bias is ``b_dec``, plus ``x @ W_skip.T`` with an affine skip.
* Top-k and SoftSAE: no scale; the bias is ``b_dec`` (``dense_encoder.py``).
* Tree: the scale is the token's deviation, the bias ``b_dec * deviation + mean`` (``tree.py``).

A dictionary class of this package brings its own coder, through a method ``coder(level)``; SAELens'
JumpReLU and top-k classes are read as they are.  ``coder_of`` is the only place that knows of both.

``Weights`` are the tensors of a JumpReLU dictionary, whole or cut to a prefix of its features. A
Matryoshka dictionary (arXiv 2503.17547) reconstructs its input from the first ``m`` features alone, for
each of its levels ``m``. The prefix is a dictionary of its own: the first ``m`` columns of ``W_enc`` and
rows of ``W_dec`` with the shared ``b_dec``. All tensors are views; nothing is copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int

from gemmascope_plugin.errors import UnknownNameError
from gemmascope_plugin.saes.cross_layer import CrossLayerDictionary
from gemmascope_plugin.saes.dense_encoder import ARCHITECTURE, topk_coder
from gemmascope_plugin.saes.encode_sparse import encode_sparse
from gemmascope_plugin.saes.jumprelu import (
    bias,
    check_architecture,
    encode_features,
    has_skip,
    jump,
    pre_activations,
)
from gemmascope_plugin.saes.sparse import SparseActs, write
from gemmascope_plugin.saes.two_stage import Bf16Prefilter
from gemmascope_plugin.types import SAE


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
        two_stage: Bf16Prefilter | None = None,
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

    def make_two_stage(self) -> Bf16Prefilter:
        """A faster exact encoder; see ``two_stage.py``."""
        return Bf16Prefilter(self)


def weights_of(sae: SAE, level: int | None = None) -> Weights:
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


def level_width(sae: SAE, level: int) -> int:
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
    layer = dictionary.weights(position)
    return Weights(
        W_enc=layer.W_enc,
        b_enc=layer.b_enc,
        threshold=layer.threshold,
        W_dec=layer.W_dec[:, position],
        b_dec=layer.b_dec,
        W_skip=None if layer.A is None else layer.A.T,
    )


@runtime_checkable
class Coder(Protocol):
    """Encoder and decoder of one site."""

    @property
    def W_enc(self) -> Float[torch.Tensor, "d_in d_sae"]:
        """One column a feature."""
        ...

    @property
    def W_dec(self) -> Float[torch.Tensor, "d_sae d_out"]:
        """One row a feature."""
        ...

    @property
    def d_sae(self) -> int:
        """Number of features."""
        ...

    @property
    def reads_input(self) -> bool:
        """Whether ``scale`` or ``bias`` depend on ``x``."""
        ...

    def encode_sparse(
        self,
        x: Float[torch.Tensor, "*tokens d_in"],
        *,
        keep: Bool[torch.Tensor, "*tokens"] | None = None,
        two_stage: Bf16Prefilter | None = None,
    ) -> SparseActs:
        """The active features; tokens that are not kept have none."""
        ...

    def encode_features(
        self, x: Float[torch.Tensor, "*tokens d_in"], features: Int[torch.Tensor, " k"]
    ) -> Float[torch.Tensor, "*tokens k"]:
        """The chosen features, at the least cost that gives what ``encode_sparse`` gives."""
        ...

    def pre_activations(
        self, x: Float[torch.Tensor, "*tokens d_in"]
    ) -> Float[torch.Tensor, "*tokens d_sae"]:
        """What decides which features are active, and is their value there."""
        ...

    def activate(
        self,
        pre: Float[torch.Tensor, "*tokens d_sae"],
        x: Float[torch.Tensor, "*tokens d_in"],
    ) -> Float[torch.Tensor, "*tokens d_sae"]:
        """The features of pre-activations of ``x``, as they are or as somebody changed them."""
        ...

    def scale(
        self, x: Float[torch.Tensor, "*tokens d_in"]
    ) -> Float[torch.Tensor, "*tokens 1"] | None:
        """The factor on what features write; None for 1."""
        ...

    def bias(self, x: Float[torch.Tensor, "*tokens d_in"]) -> Float[torch.Tensor, "*#tokens d_out"]:
        """What is written whatever the features."""
        ...

    def make_two_stage(self) -> Bf16Prefilter:
        """A faster exact encoder.

        Raises:
            ModelError: There is none for this dictionary.
        """
        ...


def reconstruct(
    coder: Coder,
    acts: Float[torch.Tensor, "*tokens d_sae"] | SparseActs,
    x: Float[torch.Tensor, "*tokens d_in"],
) -> Float[torch.Tensor, "*tokens d_out"]:
    """``D(acts, x)``.

    Args:
        coder: The dictionary's.
        acts: Activations of all features, dense or sparse.
        x: What was encoded.
    """
    sparse = isinstance(acts, SparseActs)
    out, scale = write(acts, coder.W_dec) if sparse else acts @ coder.W_dec, coder.scale(x)
    return (out if scale is None else out * scale) + coder.bias(x)


def coder_of(sae: SAE, level: int | None = None) -> Coder:
    """Encoder and decoder of a dictionary with one site.

    Args:
        sae: SAELens' ``JumpReLUSAE``, ``JumpReLUTranscoder``, ``JumpReLUSkipTranscoder`` or
            ``TopKSAE``, or a dictionary with a method ``coder(level)``.
        level: The prefix of a nested dictionary, 0 for the coarsest, -1 for the whole; None for the
            whole of any dictionary.

    Raises:
        ModelError: A dictionary of another architecture, or with something left to fold.
        UnknownNameError: The dictionary has no such level.
    """
    make_coder = getattr(sae, "coder", None)
    if make_coder is not None:
        return make_coder(level)
    if sae.cfg.architecture() == ARCHITECTURE:
        return topk_coder(sae, level)
    check_architecture(sae)
    return weights_of(sae, level)


def cross_layer_of(sae: object) -> CrossLayerDictionary | None:
    """The dictionary over several layers that this is, or that SAELens' class of it gives; else None."""
    if isinstance(sae, CrossLayerDictionary):
        return sae
    make_dictionary = getattr(sae, "dictionary", None)
    return None if make_dictionary is None else make_dictionary()
