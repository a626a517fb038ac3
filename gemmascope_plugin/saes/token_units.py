"""Tokens brought to mean 0 and deviation 1, and how what was taken off is put back.

1. ``x' = (x - mean) / (std + 1e-5)``, ``std`` unbiased, over ``d_in``: what SAELens calls
   ``normalize_activations="layer_norm"``, to the same formula.
2. The reconstruction is ``(f @ W_dec + b_dec) * std + mean``: a feature writes ``f_i * W_dec[i] * std``.
3. SAELens keeps mean and deviation of the last ``encode`` in the dictionary, and ``decode`` takes them,
   whoever's activations it is given.  Here they travel *with the activations* that ``encode``
   returned; any other tensor (edited, sliced, loaded) needs the tokens, so that another token's mean
   and deviation are never used in silence.

Cost: two passes over the tokens.
"""

from __future__ import annotations

import torch
from jaxtyping import Float

from gemmascope_plugin.errors import ModelError
from gemmascope_plugin.saes.whole_encode import check_width

EPS = 1e-5
_UNITS = "_gemmascope_token_units"
"""Attribute of activations that ``encode`` returned: means and deviations of their tokens."""

Units = tuple[
    Float[torch.Tensor, "*tokens d_in"],
    Float[torch.Tensor, "*tokens 1"] | None,
    Float[torch.Tensor, "*tokens 1"] | None,
]
"""Tokens as the encoder takes them, and mean and deviation; None where nothing was taken off."""


def standardise(
    x: Float[torch.Tensor, "*tokens d_in"],
) -> tuple[
    Float[torch.Tensor, "*tokens d_in"],
    Float[torch.Tensor, "*tokens 1"],
    Float[torch.Tensor, "*tokens 1"],
]:
    """The standardised tokens, their means and their deviations."""
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    return (x - mean) / (std + EPS), mean, std


class TokenUnits:
    """Mixin of coders (``coder.py``) that may standardise each token."""

    W_enc: Float[torch.Tensor, "d_in d_sae"]
    b_dec: Float[torch.Tensor, " d_out"]
    standardize: bool
    subtract_b_dec: bool

    @property
    def reads_input(self) -> bool:
        """True where tokens are standardised: their mean and deviation are put back."""
        return self.standardize

    def units(self, x: Float[torch.Tensor, "*tokens d_in"]) -> Units:
        """``x', mean, std`` in the dictionary's type; None where it does not standardise.

        Raises:
            WidthMismatchError: ``x`` has another width than the dictionary.
        """
        check_width(x, self.W_enc)
        x = x.to(self.W_enc.dtype)
        return standardise(x) if self.standardize else (x, None, None)

    def seen(self, x: Float[torch.Tensor, "*tokens d_in"]) -> Float[torch.Tensor, "*tokens d_in"]:
        """What the encoder's matrix is multiplied with.

        Raises:
            WidthMismatchError: ``x`` has another width than the dictionary.
        """
        scaled = self.units(x)[0]
        return scaled - self.b_dec if self.subtract_b_dec else scaled

    def scale(
        self, x: Float[torch.Tensor, "*tokens d_in"]
    ) -> Float[torch.Tensor, "*tokens 1"] | None:
        """The deviation of each token, where it was taken off."""
        return self.units(x)[2]

    def bias(self, x: Float[torch.Tensor, "*tokens d_in"]) -> Float[torch.Tensor, "*#tokens d_out"]:
        """``b_dec``, or ``b_dec * std + mean``."""
        _, mean, std = self.units(x)
        if mean is None or std is None:
            return self.b_dec.expand(*[1] * (x.ndim - 1), -1)
        return self.b_dec * std + mean


def with_units(
    acts: Float[torch.Tensor, "*tokens d_sae"], units: Units
) -> Float[torch.Tensor, "*tokens d_sae"]:
    """Activations that carry the mean and deviation of their tokens."""
    if hasattr(acts, _UNITS):  # a hook put back what another call returned: leave that alone
        acts = acts.view_as(acts)
    setattr(acts, _UNITS, units[1:])
    return acts


def restored(
    out: Float[torch.Tensor, "*tokens d_out"],
    acts: Float[torch.Tensor, "*tokens d_sae"],
    units: Units | None,
) -> Float[torch.Tensor, "*tokens d_out"]:
    """A reconstruction in the units of the model.

    Args:
        out: In the units of the encoder.
        acts: What was decoded.
        units: Of the tokens that were encoded; None to take what the activations carry.

    Raises:
        ModelError: Whose mean and deviation to use is not known.
    """
    mean, std = getattr(acts, _UNITS, (None, None)) if units is None else units[1:]
    if mean is None or std is None:
        raise ModelError(
            "These activations are not the tensor that encode returned, so the mean and deviation "
            "of their tokens are not known",
            fix="decode(acts, like=x) with the tokens x that were encoded",
        )
    return out * std + mean
