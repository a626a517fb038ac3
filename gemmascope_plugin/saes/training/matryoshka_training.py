"""Training of Matryoshka dictionaries (arXiv 2503.17547), on SAELens' training classes.

1. ``L = sum_m w_m ||x - (f[:m] @ W_dec[:m] + b_dec)||^2 + L_aux`` over the levels ``m`` (equation 3): one
   decoder, activations computed once over the whole dictionary, weights 1 unless given. The features
   between two levels are decoded once and added to the level before.
2. ``MatryoshkaBatchTopK``: the ``k * batch`` largest activations of the batch; ``L_aux`` is SAELens'
   AuxK of the whole reconstruction, with the paper's coefficient 1/32. With equal weights the loss is
   that of SAELens' ``matryoshka_batchtopk``, and so is the rest: SAELens' classes do it.
3. ``MatryoshkaJumpReLU``: the same prefix losses with Gemma Scope's JumpReLU training
   (``jumprelu_training.py``); ``L_aux`` is its sparsity term. This is Gemma Scope 2's combination.
4. ``save_inference_model`` saves a ``MatryoshkaSAE``: thresholds (BatchTopK's running threshold for all
   features), unit decoder rows, levels.

Not here: the authors' code adds the loss of ``b_dec`` alone and takes the mean over levels; random
prefixes, which the paper found slightly worse.

Cost: one decode a step whatever the number ``K`` of levels, ``2 * tokens * d_sae * d_out`` operations,
and ``K - 1`` sums of ``tokens * d_out``; SAELens decodes the whole and all inner levels again. The pieces
are made by ``split``, whose gradient is one concatenation; slices would each allocate a gradient as large
as the whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.sae import SAEConfig, TrainingSAE, TrainStepInput, TrainStepOutput
from typing_extensions import override

from gemmascope_plugin.errors import ModelError
from gemmascope_plugin.saes.matryoshka import MatryoshkaSAEConfig, check_levels
from gemmascope_plugin.saes.registration import StrictConfig, register_class
from gemmascope_plugin.saes.training.jumprelu_training import (
    GemmaScopeConfig,
    GemmaScopeTrainingSAE,
    check_foldable,
)
from gemmascope_plugin.saes.training.step_parts import fold_decoder


def check_level_weights(
    weights: Sequence[float | int] | None, levels: Sequence[int]
) -> tuple[float, ...]:
    """One weight for each level's loss; None for the paper's, all 1. The last level must have a loss."""
    if weights is None:
        return (1.0,) * len(levels)
    if len(weights) != len(levels):
        raise ModelError(
            f"{len(weights)} level weights for {len(levels)} levels {list(levels)}",
            fix=f"level_weights={(1.0,) * len(levels)}",
        )
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
        raise ModelError(f"The level weights {list(weights)} are not all finite and positive or 0")
    if weights[-1] == 0:
        raise ModelError(
            f"The level weights {list(weights)} leave the last features without a loss",
            fix="a positive weight for the last level, which is the whole dictionary",
        )
    return tuple(float(weight) for weight in weights)


def prefix_reconstructions(
    acts: Float[torch.Tensor, "*tokens d_sae"],
    W_dec: Float[torch.Tensor, "d_sae d_out"],
    b_dec: Float[torch.Tensor, " d_out"],
    levels: Sequence[int],
) -> list[Float[torch.Tensor, "*tokens d_out"]]:
    """What each level reconstructs; the last is the whole dictionary's reconstruction."""
    sizes = [after - before for before, after in pairwise((0, *levels))]
    total, reconstructions = b_dec, []
    for part, rows in zip(acts.split(sizes, dim=-1), W_dec.split(sizes), strict=True):
        total = part @ rows + total
        reconstructions.append(total)
    return reconstructions


@dataclass(kw_only=True)
class LevelsConfig(StrictConfig):
    """Mixin: the settings of prefix losses."""

    levels: Sequence[int] = ()
    """Numbers of features of the prefixes, coarsest first; the last one is ``d_sae``."""
    level_weights: Sequence[float] | None = None
    """Weight of each level's squared error; None for the paper's, all 1."""

    def __post_init__(self) -> None:
        self.levels = check_levels(self.levels, self.d_sae)
        self.level_weights = check_level_weights(self.level_weights, self.levels)
        check_foldable(self.normalize_activations)
        super().__post_init__()

    def get_inference_config_class(self) -> type[SAEConfig]:
        """JumpReLU with levels."""
        return MatryoshkaSAEConfig


class PrefixLosses(TrainingSAE[Any]):
    """Mixin: SAELens' training step with the squared error of every level.

    It stands behind a training class in the list of bases, in front of ``TrainingSAE``: what the class
    does around the step (running threshold, clamped thresholds) stays as it is.
    """

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """One step; losses: ``mse_loss``, ``inner_mse_loss_<m>`` of other levels, and the class' own."""
        x = step_input.sae_in
        acts, pre = self.encode_with_hidden_pre(x)
        levels = prefix_reconstructions(
            self.in_decoder_units(acts), self.W_dec, self.b_dec, self.cfg.levels
        )
        levels[-1] = self.hook_sae_recons(levels[-1])
        losses = self._level_losses(levels, x)
        class_losses: Any = self.calculate_aux_loss(
            step_input=step_input, feature_acts=acts, hidden_pre=pre, sae_out=levels[-1]
        )
        losses |= class_losses
        return TrainStepOutput(
            sae_in=x,
            sae_out=levels[-1],
            feature_acts=acts,
            hidden_pre=pre,
            loss=torch.stack(list(losses.values())).sum(),
            losses=losses,
        )

    def in_decoder_units(
        self, acts: Float[torch.Tensor, "batch d_sae"]
    ) -> Float[torch.Tensor, "batch d_sae"]:
        """What the rows of ``W_dec`` are multiplied by."""
        return acts

    def _level_losses(
        self,
        levels: Sequence[Float[torch.Tensor, "batch d_in"]],
        x: Float[torch.Tensor, "batch d_in"],
    ) -> dict[str, torch.Tensor]:
        names = [*(f"inner_mse_loss_{m}" for m in self.cfg.levels[:-1]), "mse_loss"]
        return {
            name: weight * self.mse_loss_fn(level, x).sum(-1).mean()
            for name, weight, level in zip(names, self.cfg.level_weights, levels, strict=True)
        }


@dataclass(kw_only=True)
class MatryoshkaBatchTopKConfig(LevelsConfig, BatchTopKTrainingSAEConfig):
    """SAELens' BatchTopK settings, levels, and the paper's AuxK coefficient.

    Raises:
        ModelError: Levels that do not increase to ``d_sae``, weights that do not fit them, or a
            normalisation that cannot be folded.
    """

    aux_loss_coefficient: float = 1 / 32

    @override
    @classmethod
    def architecture(cls) -> str:
        """``"matryoshka_prefix_batchtopk"``; SAELens' own class is ``"matryoshka_batchtopk"``."""
        return "matryoshka_prefix_batchtopk"

    @override
    def get_inference_sae_cfg_dict(self) -> dict[str, Any]:
        """The config of the saved dictionary, whose encoder sees the input as it is."""
        return {**super().get_inference_sae_cfg_dict(), "apply_b_dec_to_input": False}


class MatryoshkaBatchTopK(BatchTopKTrainingSAE, PrefixLosses):
    """The paper's Matryoshka SAE in training."""

    cfg: MatryoshkaBatchTopKConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    @override
    def in_decoder_units(
        self, acts: Float[torch.Tensor, "batch d_sae"]
    ) -> Float[torch.Tensor, "batch d_sae"]:
        """SAELens compares activations as if rows had unit norm; here the norms come back out."""
        return acts / self.W_dec.norm(dim=-1) if self.cfg.rescale_acts_by_decoder_norm else acts

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        """One threshold for all features, unit decoder rows, no bias on the input."""
        super().process_state_dict_for_saving_inference(state_dict)
        state_dict |= fold_decoder(state_dict, subtracts_b_dec=self.cfg.apply_b_dec_to_input)


@dataclass(kw_only=True)
class MatryoshkaJumpReLUConfig(LevelsConfig, GemmaScopeConfig):
    """Gemma Scope's JumpReLU settings, and levels.

    Raises:
        ModelError: As for ``GemmaScopeConfig`` and ``MatryoshkaBatchTopKConfig``.
    """

    @override
    @classmethod
    def architecture(cls) -> str:
        """``"matryoshka_prefix_jumprelu"``."""
        return "matryoshka_prefix_jumprelu"


class MatryoshkaJumpReLU(GemmaScopeTrainingSAE, PrefixLosses):
    """A JumpReLU SAE in training whose every prefix reconstructs, as Gemma Scope 2's do."""

    cfg: MatryoshkaJumpReLUConfig  # pyright: ignore[reportIncompatibleVariableOverride]


register_class(MatryoshkaBatchTopK, MatryoshkaBatchTopKConfig)
register_class(MatryoshkaJumpReLU, MatryoshkaJumpReLUConfig)
