"""SoftSAE, inference: each input has as many active features as a small network allots to it.

Method (arXiv 2605.06610):

1. ``z = ReLU((x - b_dec) @ W_enc + b_enc)``.
2. The budget ``k_hat = max(1, 2 k sigmoid(MLP(x - b_dec)))``, where ``k`` is the mean budget that the
   dictionary was trained for and the MLP is ``d_in -> d_sae -> 1`` with one ReLU. It can never exceed
   ``2 k``.
3. ``f`` keeps the ``floor(k_hat)`` largest ``z`` of each row; ``x_hat = f @ W_dec + b_dec``. The soft
   weights of ``soft_topk`` belong to training alone.

Tokens may be standardised first (``normalize_activations="layer_norm"``, ``dense_encoder.py``), which the
paper does not do. Squared errors then weigh all tokens alike, and the budget follows what is in a token
and not how long it is: on the bundled model its rank correlation with the number of known concepts is
0.7 with it and 0.1 without (``tests/benchmarks/architectures.py``).

A fixed budget needs no class of its own here: trained softly it selects hard like SAELens' ``TopKSAE``,
and is saved as one.

What SAELens accepts or drops silently the config refuses: keys that it does not have, and budgets that no
dictionary of that width can serve.

Cost: that of a top-k SAE plus the budget network, which doubles the encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from sae_lens.saes.sae import SAEConfig, SAEMetadata
from typing_extensions import override

from gemmascope_plugin.errors import ModelError
from gemmascope_plugin.saes.dense_encoder import (
    RankCoder,
    Units,
    in_model_units,
    rank_coder,
    standardise,
    with_units,
)
from gemmascope_plugin.saes.lapsum import keep_top
from gemmascope_plugin.saes.registration import StrictConfig, register_class
from gemmascope_plugin.saes.sparse import Acts, Inputs

FOLDABLE = ("none", "expected_average_only_in")
"""Normalisations that become part of the weights."""
BUDGETED = (*FOLDABLE, "layer_norm")
"""SoftSAE's class standardises tokens by itself; SAELens' top-k, as which a fixed budget is saved, keeps
another token's deviation."""

ARCHITECTURE = "softsae"
"""The name under which SAELens knows both the inference and the training class."""


@dataclass(kw_only=True)
class SoftSAEConfig(StrictConfig, SAEConfig):
    """SAELens' config with the mean budget.

    Raises:
        ModelError: ``k`` is below 1 or not below half of ``d_sae``, or the input normalisation is one
            that the budget network cannot follow.
    """

    k: float | int
    """Mean number of active features that training aimed at; the budget lies between 1 and ``2 k``."""
    # SAELens passes a plain dict here when it reads a config, and replaces it by its own class after.
    metadata: Any = field(default_factory=SAEMetadata)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_mean_budget(self.k, self.d_sae)
        check_normalisation(self.normalize_activations, BUDGETED)

    @override
    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE


def check_mean_budget(k: float | int, d_sae: int) -> None:
    """Refuses mean budgets of which some input could be allotted more features than there are."""
    if not 1 <= k < d_sae / 2:
        raise ModelError(
            f"k is {k}, for {d_sae} features",
            exists=f"mean budgets from 1 to below {d_sae / 2:g}, since single inputs may take 2 k",
        )


def check_normalisation(name: str, options: Sequence[str]) -> None:
    """Refuses input normalisations that a dictionary cannot follow, or that splicing could not."""
    if name not in options:
        raise ModelError(
            f"A soft top-k dictionary cannot normalise its input by {name!r}",
            exists=", ".join(options),
        )


class SoftSAE(SAE[SoftSAEConfig]):
    """A dictionary with a budget per input, selected hard."""

    b_enc: torch.nn.Parameter
    k_estimator: torch.nn.Sequential

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        add_soft_weights(self)

    def budget(self, x: Float[torch.Tensor, "*axes width"]) -> Float[torch.Tensor, "*tokens"]:
        """``k_hat`` of raw inputs, a real number; its floor is how many features may be active."""
        return predict_budget(self.k_estimator, self.process_sae_in(x), self.cfg.k)

    @override
    def encode(self, x: Float[torch.Tensor, "*axes width"]) -> Acts:
        sae_in = self.process_sae_in(x)
        pre = self.hook_sae_acts_pre(sae_in @ self.W_enc + self.b_enc)
        acts = self.hook_sae_acts_post(keep_top(pre.relu(), self._limits(sae_in)))
        return with_units(acts, self._units(x)) if self.standardizes else acts

    @override
    def decode(
        self, feature_acts: Acts, like: Float[torch.Tensor, ...] | None = None
    ) -> Float[torch.Tensor, "*axes width"]:
        """The reconstruction in the units of the model.

        Args:
            feature_acts: Activations, edited or not.
            like: The tokens that were encoded, where they are standardised; not needed for the very
                tensor that ``encode`` returned.

        Raises:
            ModelError: Whose mean and deviation to use is not known.
        """
        out = self.hook_sae_recons(feature_acts @ self.W_dec + self.b_dec)
        if self.standardizes:
            out = in_model_units(out, feature_acts, None if like is None else self._units(like))
        return self.reshape_fn_out(out, self.d_head)

    @property
    def standardizes(self) -> bool:
        """Whether each token is brought to mean 0 and deviation 1 first."""
        return self.cfg.normalize_activations == "layer_norm"

    def _units(self, x: Float[torch.Tensor, "*axes width"]) -> Units:
        return standardise(self.reshape_fn_in(x.to(self.dtype)))

    def coder(self, level: int | None = None) -> RankCoder:
        """The dictionary's tensors, as splicing reads them; there are no levels."""
        return rank_coder(self, self._limits, level)

    def _limits(self, sae_in: Inputs) -> Int[torch.Tensor, "*tokens"]:
        return predict_budget(self.k_estimator, sae_in, self.cfg.k).long()

    @override
    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        super().fold_activation_norm_scaling_factor(scaling_factor)
        scale_budget_input(self.k_estimator, scaling_factor)

    @override
    def fold_W_dec_norm(self) -> None:
        refuse_to_fold()

    @classmethod
    @override
    def get_sae_config_class_for_architecture(cls, architecture: str) -> type[SAEConfig]:
        # With this, loading through the class refuses unknown keys; SAE.load_from_disk drops them.
        return SoftSAEConfig


def add_soft_weights(sae: Any) -> None:
    """Gives an SAE with an encoder its ``b_enc``, zero, and its budget network.

    The network starts as the encoder followed by small random weights, hence near a budget of ``k``.
    """
    W_enc = sae.W_enc.data
    d_in, d_sae = W_enc.shape
    like = {"device": W_enc.device, "dtype": W_enc.dtype}
    sae.b_enc = torch.nn.Parameter(torch.zeros(d_sae, **like))
    first, last = torch.nn.Linear(d_in, d_sae, **like), torch.nn.Linear(d_sae, 1, **like)
    with torch.no_grad():
        first.weight.copy_(W_enc.T)
        first.bias.zero_()
    sae.k_estimator = torch.nn.Sequential(first, torch.nn.ReLU(), last, torch.nn.Sigmoid())


def predict_budget(
    network: torch.nn.Module, sae_in: Inputs, k: float | int
) -> Float[torch.Tensor, "*tokens"]:
    """``max(1, 2 k network(sae_in))``, differentiable where it exceeds 1."""
    return (2 * k * network(sae_in).squeeze(-1)).clamp(min=1)


def scale_budget_input(network: torch.nn.Sequential, factor: float) -> None:
    """Makes a budget network that expects ``factor * x`` take ``x``."""
    first = network[0]
    assert isinstance(first, torch.nn.Linear)
    first.weight.data.mul_(factor)


def refuse_to_fold() -> None:
    """Folding the decoder's norms into the encoder would rescale the scores one by one."""
    raise ModelError(
        "Folding the decoder's norms changes which features a soft top-k dictionary selects",
        fix="leave fold_W_dec_norm False; its decoder rows have unit norm from training",
    )


register_class(SoftSAE, SoftSAEConfig)
