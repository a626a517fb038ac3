"""Encoders whose features compete or gate one another: any of them costs the whole encode.

1. The kept tokens are encoded densely: pre-activations, then ``activate``.
2. What is active is as exact as one matrix product: ties and gates are decided on computed values,
   unlike JumpReLU's (``encode_sparse.py``).
3. There are no two stages: a first pass would have to bound the k-th largest pre-activation.

Cost: ``2 * tokens * d_in * d_sae`` operations, and one dense block of ``tokens * d_sae``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Bool, Float, Int

from gemmascope_plugin.errors import ModelError, WidthMismatchError
from gemmascope_plugin.saes.sparse import SparseActs
from gemmascope_plugin.saes.two_stage import TwoStage


class WholeEncode(ABC):
    """What follows for a coder (``coder.py``) from its pre-activations and its ``activate``."""

    what: str
    """What kind of dictionary this is, in words."""

    @property
    @abstractmethod
    def d_sae(self) -> int:
        """Number of features."""

    @abstractmethod
    def pre_activations(
        self, x: Float[torch.Tensor, "*tokens d_in"]
    ) -> Float[torch.Tensor, "*tokens d_sae"]:
        """What decides which features are active, and is their value there."""

    @abstractmethod
    def activate(
        self,
        pre: Float[torch.Tensor, "*tokens d_sae"],
        x: Float[torch.Tensor, "*tokens d_in"],
    ) -> Float[torch.Tensor, "*tokens d_sae"]:
        """The features of pre-activations of ``x``."""

    def encode_sparse(
        self,
        x: Float[torch.Tensor, "*tokens d_in"],
        *,
        keep: Bool[torch.Tensor, "*tokens"] | None = None,
        two_stage: TwoStage | None = None,
    ) -> SparseActs:
        """The active features.

        Args:
            x: Tokens at the site.
            keep: Tokens to encode; the others have no active feature.
            two_stage: Always None, see ``make_two_stage``.

        Raises:
            ModelError: A kept token is not finite.
            WidthMismatchError: ``x`` has another width than the dictionary.
        """
        assert two_stage is None, f"a {self.what} has no two stages"
        kept = x if keep is None else x[keep]
        if not bool(torch.isfinite(kept).all()):
            raise ModelError(
                "a token that should be encoded has NaN or infinity",
                fix="keep= without that token, or a model in a type in which it does not overflow",
            )
        acts = self.activate(self.pre_activations(kept), kept)
        if keep is not None:
            acts = acts.new_zeros(*x.shape[:-1], self.d_sae).index_put((keep,), acts)
        return SparseActs.from_dense(acts)

    def encode_features(
        self, x: Float[torch.Tensor, "*tokens d_in"], features: Int[torch.Tensor, " k"]
    ) -> Float[torch.Tensor, "*tokens k"]:
        """The chosen features; costs the whole encode."""
        return self.activate(self.pre_activations(x), x)[..., features]

    def make_two_stage(self) -> TwoStage:
        """Refuses, see step 3.

        Raises:
            ModelError: Always.
        """
        raise ModelError(
            f"two_stage=True is for JumpReLU dictionaries, this one is a {self.what}",
            fix="two_stage=False",
        )


def check_width(x: Float[torch.Tensor, "*tokens _"], W_enc: Float[torch.Tensor, "d_in _"]) -> None:
    """Refuses tokens of another width than the encoder's.

    Raises:
        WidthMismatchError: See above.
    """
    if x.shape[-1] != W_enc.shape[0]:
        raise WidthMismatchError(
            f"the dictionary has width {W_enc.shape[0]}, the tensor has {x.shape[-1]}",
            fix="the tensor at the dictionary's own hook point",
        )
