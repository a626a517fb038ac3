"""What a splice needs of a dictionary at one site, whatever its architecture.

With ``f`` the features of ``x``, a dictionary writes ``D(f, x) = scale(x) * (f @ W_dec) + bias(x)``.

* JumpReLU (``Weights``): no scale; the bias is ``b_dec``, plus ``x @ W_skip.T`` with an affine skip,
  SAELens' ``W_skip`` being the transpose of the matrix in Gemma Scope's files.
* Top-k and SoftSAE: no scale; the bias is ``b_dec`` (``dense_encoder.py``).
* Tree: the scale is the token's deviation, the bias ``b_dec * deviation + mean`` (``tree.py``).

A dictionary class of this package brings its own coder, through a method ``coder(level)``; SAELens'
JumpReLU and top-k classes are read as they are.  ``coder_of`` is the only place that knows of both.
Unlike SAELens' methods a coder never reshapes, fires no hooks, keeps no state and never forgets the skip.

``Weights`` are the tensors of a JumpReLU dictionary, whole or cut to a prefix of its features. A
Matryoshka dictionary (arXiv 2503.17547) reconstructs its input from the first ``m`` features alone, for
each of its levels ``m``. The prefix is a dictionary of its own: the first ``m`` columns of ``W_enc`` and
rows of ``W_dec`` with the shared ``b_dec``. All tensors are views; nothing is copied.

Cost: decoding ``2 * tokens * d_sae * d_out`` operations; ``d_sae`` shrinks to the number of chosen or of
active features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int

from gemmascope_plugin.errors import ModelError, UnknownNameError
from gemmascope_plugin.saes.cross_layer import CrossLayerDictionary
from gemmascope_plugin.saes.dense_encoder import ARCHITECTURE, topk_coder
from gemmascope_plugin.saes.jumprelu import encode_features, encode_sparse, jump, pre_activations
from gemmascope_plugin.saes.sparse import Acts, Inputs, Outputs, SparseActs, write
from gemmascope_plugin.saes.two_stage import Bf16Prefilter
from gemmascope_plugin.types import SAE

ARCHITECTURES = (
    "jumprelu",
    "jumprelu_transcoder",
    "jumprelu_skip_transcoder",
    "matryoshka_jumprelu",
)
"""SAELens architectures, and ours beside them, that ``Weights`` computes exactly."""


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
        x: Inputs,
        *,
        keep: Bool[torch.Tensor, "*tokens"] | None = None,
        two_stage: Bf16Prefilter | None = None,
    ) -> SparseActs:
        """The active features; tokens that are not kept have none."""
        ...

    def encode_features(
        self, x: Inputs, features: Int[torch.Tensor, " k"]
    ) -> Float[torch.Tensor, "*tokens k"]:
        """The chosen features, at the least cost that gives what ``encode_sparse`` gives."""
        ...

    def pre_activations(self, x: Inputs) -> Acts:
        """What decides which features are active, and is their value there."""
        ...

    def activate(self, pre: Acts, x: Inputs) -> Acts:
        """The features of pre-activations of ``x``, as they are or as somebody changed them."""
        ...

    def scale(self, x: Inputs) -> Float[torch.Tensor, "*tokens 1"] | None:
        """The factor on what features write; None for 1."""
        ...

    def bias(self, x: Inputs) -> Float[torch.Tensor, "*#tokens d_out"]:
        """What is written whatever the features."""
        ...

    def make_two_stage(self) -> Bf16Prefilter:
        """A faster exact encoder; refuses where there is none."""
        ...


@dataclass(frozen=True, eq=False)
class Weights:
    """What encodes and decodes at one site of a JumpReLU dictionary."""

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
        return self.W_skip is not None

    def encode_sparse(
        self,
        x: Inputs,
        *,
        keep: Bool[torch.Tensor, "*tokens"] | None = None,
        two_stage: Bf16Prefilter | None = None,
    ) -> SparseActs:
        """The active features, exactly."""
        return encode_sparse(self, x, keep=keep, two_stage=two_stage)

    def encode_features(
        self, x: Inputs, features: Int[torch.Tensor, " k"]
    ) -> Float[torch.Tensor, "*tokens k"]:
        """The chosen features; reads ``k`` encoder columns."""
        return encode_features(self, x, features)

    def pre_activations(self, x: Inputs) -> Acts:
        """``x @ W_enc + b_enc``."""
        return pre_activations(self, x)

    def activate(self, pre: Acts, x: Inputs) -> Acts:
        """``pre`` above threshold and zero, whatever ``x``."""
        return jump(pre, self.threshold)

    def scale(self, x: Inputs) -> None:
        """None: features write ``f_i * W_dec[i]``."""

    def bias(self, x: Inputs) -> Float[torch.Tensor, "*#tokens d_out"]:
        """``b_dec``, plus ``x @ W_skip.T`` with a skip."""
        if self.W_skip is None:
            return self.b_dec.expand(*[1] * (x.ndim - 1), -1)
        return x.to(self.W_skip.dtype) @ self.W_skip.T + self.b_dec

    def make_two_stage(self) -> Bf16Prefilter:
        """A faster exact encoder; see ``two_stage.py``."""
        return Bf16Prefilter(self)


def has_skip(sae: object) -> bool:
    """Whether the dictionary adds a linear map of its input to what its features write."""
    return getattr(sae, "W_skip", None) is not None


def weights_of(sae: SAE, level: int | None = None) -> Weights:
    """The tensors of a SAELens JumpReLU dictionary; of a Matryoshka, those of a level.

    Args:
        sae: ``JumpReLUSAE``, ``JumpReLUTranscoder`` or ``JumpReLUSkipTranscoder``.
        level: 0 for the coarsest prefix, -1 for the whole; None for the whole of any dictionary.

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
    """Number of features in a level of a Matryoshka dictionary, which has to exist."""
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

    ``position`` is an index into ``cfg.layers``; the layer is opened if it is not open yet.
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


def decode(sae: SAE | Weights, acts: Acts, x: Inputs | None = None) -> Outputs:
    """``acts @ W_dec + b_dec``, plus ``x @ W_skip.T`` where a JumpReLU dictionary has an affine skip.

    Args:
        sae: The dictionary.
        acts: Activations of all features.
        x: What was encoded; needed with an affine skip, else unused.

    Raises:
        ModelError: The affine skip has no input.
    """
    weights = sae if isinstance(sae, Weights) else weights_of(sae)
    if weights.W_skip is None:
        return acts @ weights.W_dec + weights.b_dec
    if x is None:
        raise ModelError(
            "The transcoder has an affine skip, so decoding needs the tensor that was encoded",
            fix="decode(sae, acts, x)",
        )
    return acts @ weights.W_dec + weights.bias(x)


def reconstruct(coder: Coder, acts: Acts | SparseActs, x: Inputs) -> Outputs:
    """``D(acts, x)``: what a coder makes of dense or sparse activations of ``x``."""
    sparse = isinstance(acts, SparseActs)
    out, scale = write(acts, coder.W_dec) if sparse else acts @ coder.W_dec, coder.scale(x)
    return (out if scale is None else out * scale) + coder.bias(x)


def write_features(
    W_dec: Float[torch.Tensor, "d_sae d_out"],
    amounts: Float[torch.Tensor, "*tokens k"],
    features: Int[torch.Tensor, " k"] | None,
) -> Outputs:
    """``sum_i amounts_i * W_dec[features_i]``, of all features for None; reads ``k`` decoder rows."""
    rows = W_dec if features is None else W_dec[features.to(W_dec.device)]
    return amounts @ rows.to(amounts.device, amounts.dtype)


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


def check_architecture(sae: SAE) -> None:
    """Refuses dictionaries that are not plain JumpReLU, or whose input normalisation is not folded in."""
    architecture = sae.cfg.architecture()
    if architecture not in ARCHITECTURES:
        raise ModelError(
            f"The dictionary is a {architecture!r}",
            exists="splicing for " + " and ".join(ARCHITECTURES),
            fix="a Gemma Scope dictionary from gemmascope_plugin.load()",
        )
    if sae.cfg.normalize_activations != "none" or sae.cfg.apply_b_dec_to_input:
        raise ModelError(
            "The dictionary normalises its input or subtracts b_dec from it",
            fix="fold both into the weights first, as Gemma Scope files have them",
        )


def cross_layer_of(sae: object) -> CrossLayerDictionary | None:
    """The dictionary over several layers that this is, or that SAELens' class of it gives; else None."""
    if isinstance(sae, CrossLayerDictionary):
        return sae
    make_dictionary = getattr(sae, "dictionary", None)
    return None if make_dictionary is None else make_dictionary()
