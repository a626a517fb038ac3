"""What a splice needs of a dictionary at one site, whatever its architecture.

With ``f`` the features of ``x``, a dictionary writes ``D(f, x) = scale(x) * (f @ W_dec) + bias(x)``.

* JumpReLU: no scale; the bias is ``b_dec``, plus ``x @ W_skip.T`` with an affine skip (``weights.py``).
* Top-k and SoftSAE: no scale; the bias is ``b_dec`` (``rank_coder.py``).
* Tree: the scale is the token's deviation, the bias ``b_dec * deviation + mean`` (``tree_coder.py``).

A dictionary class of this package brings its own coder, through a method ``coder(level)``; SAELens'
JumpReLU and top-k classes are read as they are.  ``coder_of`` is the only place that knows of both.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int

from gemmascope_plugin.saes.jumprelu import check_architecture
from gemmascope_plugin.saes.rank_coder import ARCHITECTURE, topk_coder
from gemmascope_plugin.saes.sparse import SparseActs, write
from gemmascope_plugin.saes.two_stage import TwoStage
from gemmascope_plugin.saes.weights import weights_of


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
        two_stage: TwoStage | None = None,
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

    def make_two_stage(self) -> TwoStage:
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
    written, scale = write(acts, coder.W_dec) if sparse else acts @ coder.W_dec, coder.scale(x)
    return (written if scale is None else written * scale) + coder.bias(x)


def coder_of(sae: Any, level: int | None = None) -> Coder:
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
    own = getattr(sae, "coder", None)
    if own is not None:
        return own(level)
    if sae.cfg.architecture() == ARCHITECTURE:
        return topk_coder(sae, level)
    check_architecture(sae)
    return weights_of(sae, level)
