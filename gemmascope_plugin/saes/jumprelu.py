"""Encode and decode with a JumpReLU dictionary, whole or a few features at a time.

1. ``pre = x @ W_enc + b_enc``; ``f = pre`` where ``pre > threshold`` and ``pre > 0``, else 0
   (arXiv 2407.14435, equation 1). The comparison runs in float32 at least.
2. ``x_hat = f @ W_dec + b_dec``; a transcoder with an affine skip adds ``x @ W_skip.T``, SAELens'
   ``W_skip`` being the transpose of the matrix in Gemma Scope's files.
3. For chosen features only their columns of ``W_enc`` and rows of ``W_dec`` are read.

The functions work on the tensors of SAELens' ``JumpReLUSAE``, ``JumpReLUTranscoder`` and
``JumpReLUSkipTranscoder``; unlike their methods they never reshape, fire no hooks and keep no state,
and ``decode`` never forgets the skip.

Cost: ``2 * tokens * d_in * d_sae`` operations each way; ``d_sae`` shrinks to the number of chosen
features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from jaxtyping import Float, Int

from gemmascope_plugin.errors import ModelError
from gemmascope_plugin.types import SAE

if TYPE_CHECKING:

    class JumpReLUEncoder(Protocol):
        """Anything with the tensors of an encoder.

        Not there at run time: ``isinstance`` of a protocol does not see a module's parameters.
        """

        @property
        def W_enc(self) -> torch.Tensor:
            """One column a feature."""
            ...

        @property
        def b_enc(self) -> torch.Tensor:
            """One bias a feature."""
            ...

        @property
        def threshold(self) -> torch.Tensor:
            """What a pre-activation must exceed."""
            ...

    class JumpReLUTensors(JumpReLUEncoder, Protocol):
        """Anything with the tensors of an encoder and a decoder."""

        @property
        def W_dec(self) -> torch.Tensor:
            """One row a feature."""
            ...

        @property
        def b_dec(self) -> torch.Tensor:
            """What is written whatever the features."""
            ...


ARCHITECTURES = (
    "jumprelu",
    "jumprelu_transcoder",
    "jumprelu_skip_transcoder",
    "matryoshka_jumprelu",
)
"""SAELens architectures, and ours beside them, that these functions compute exactly."""


def check_architecture(sae: SAE) -> None:
    """Refuses dictionaries that are not plain JumpReLU.

    Raises:
        ModelError: Another architecture, or input normalisation that is not folded in.
    """
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


def pre_activations(
    sae: JumpReLUEncoder, x: Float[torch.Tensor, "*tokens d_in"]
) -> Float[torch.Tensor, "*tokens d_sae"]:
    """``x @ W_enc + b_enc`` in the dictionary's type."""
    return x.to(sae.W_enc.dtype) @ sae.W_enc + sae.b_enc


def jump(
    pre: Float[torch.Tensor, "*tokens k"], threshold: Float[torch.Tensor, " k"]
) -> Float[torch.Tensor, "*tokens k"]:
    """``pre`` where it exceeds both its threshold and zero, else 0; gradient 1 where active."""
    return torch.where((pre.float() > threshold.float()) & (pre > 0), pre, 0)


def encode(
    sae: JumpReLUEncoder, x: Float[torch.Tensor, "*tokens d_in"]
) -> Float[torch.Tensor, "*tokens d_sae"]:
    """All features of ``x``."""
    return jump(pre_activations(sae, x), sae.threshold)


def encode_features(
    sae: JumpReLUEncoder, x: Float[torch.Tensor, "*tokens d_in"], features: Int[torch.Tensor, " k"]
) -> Float[torch.Tensor, "*tokens k"]:
    """The chosen features of ``x``; reads ``k`` encoder columns.

    Those of a float32 dictionary are computed and compared in float64, so that what is active is what
    ``encode_sparse`` says, however many features are asked for together.
    """
    dtype = sae.W_enc.dtype
    wide = torch.float64 if dtype == torch.float32 else dtype
    columns, bias = sae.W_enc[:, features].to(wide), sae.b_enc[features].to(wide)
    pre = x.to(dtype).to(wide) @ columns + bias
    threshold = sae.threshold[features].to(torch.promote_types(wide, torch.float32))
    return torch.where((pre > threshold) & (pre > 0), pre, 0).to(dtype)


def has_skip(sae: object) -> bool:
    """Whether the dictionary adds a linear map of its input to what its features write."""
    return getattr(sae, "W_skip", None) is not None


def decode(
    sae: JumpReLUTensors,
    acts: Float[torch.Tensor, "*tokens d_sae"],
    x: Float[torch.Tensor, "*tokens d_in"] | None = None,
) -> Float[torch.Tensor, "*tokens d_out"]:
    """``acts @ W_dec + b_dec``, plus ``x @ W_skip.T`` where there is an affine skip.

    Args:
        sae: The dictionary.
        acts: Activations of all features.
        x: What was encoded; needed with an affine skip, else unused.

    Raises:
        ModelError: The affine skip has no input.
    """
    if not has_skip(sae):
        return acts @ sae.W_dec + sae.b_dec
    if x is None:
        raise ModelError(
            "The transcoder has an affine skip, so decoding needs the tensor that was encoded",
            fix="decode(sae, acts, x)",
        )
    return acts @ sae.W_dec + bias(sae, x)


def write_features(
    W_dec: Float[torch.Tensor, "d_sae d_out"],
    amounts: Float[torch.Tensor, "*tokens k"],
    features: Int[torch.Tensor, " k"] | None,
) -> Float[torch.Tensor, "*tokens d_out"]:
    """``sum_i amounts_i * W_dec[features_i]``, without the bias; reads ``k`` decoder rows.

    Args:
        W_dec: The decoder.
        amounts: How much of each feature.
        features: Which features; None for all.
    """
    rows = W_dec if features is None else W_dec[features.to(W_dec.device)]
    return amounts @ rows.to(amounts.device, amounts.dtype)


def bias(
    sae: JumpReLUTensors, x: Float[torch.Tensor, "*tokens d_in"]
) -> Float[torch.Tensor, "*#tokens d_out"]:
    """What a dictionary writes whatever its features: ``b_dec``, plus ``x @ W_skip.T`` with a skip."""
    W_skip: torch.Tensor | None = getattr(sae, "W_skip", None)
    if W_skip is None:
        return sae.b_dec.expand(*[1] * (x.ndim - 1), -1)
    return x.to(W_skip.dtype) @ W_skip.T + sae.b_dec
