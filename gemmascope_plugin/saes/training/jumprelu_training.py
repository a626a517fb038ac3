"""Training of JumpReLU dictionaries as Gemma Scope did it, on SAELens' ``JumpReLUTrainingSAE``.

1. ``||x - x_hat||^2 + lambda * L0`` (Gemma Scope, arXiv 2408.05147, equation 3), or the quadratic
   ``lambda * (2 / L0*) * (L0 - L0*)^2`` (Gemma Scope 2). Gradients of thresholds are SAELens'
   straight-through estimators with a rectangle kernel (arXiv 2407.14435, equations 11 and 12).
2. Decoder rows have unit norm in every forward pass, and their gradient has no part along them. The
   projection comes at the beginning of a step, since SAELens' trainer has no place at its end.
3. Frequency penalty, through the same estimator: ``c * sum_i max(0, p_i - p_max)``, where
   ``p_i = mean_batch H(z_i - threshold_i)``. Gemma Scope 2 names such a penalty and does not publish it.
   This form is ours: L0 is ``sum_i p_i``, so ``c`` is what an activation beyond ``p_max`` costs more, in
   the units of ``lambda``.
4. ``save_inference_model`` folds what rounding and the last step left of the rows' norms, and
   ``b_dec`` out of the encoder's input: a plain ``jumprelu`` that ``splice`` takes.

Thresholds are SAELens' parameter clamped at 0, not the papers' ``exp(log_threshold)``. Adam moves any
parameter by about ``lr`` a step; a logarithm at lr 7e-5 needs 10,000 steps to double a threshold of
0.001, which the papers' million steps allow and a small run does not (SAELens issue 494).

Bandwidth and initial threshold are in units of inputs with ``E||x||^2 = 1``, training's ``scale="unit"``.

Cost: SAELens' step, a few passes over ``W_dec`` more (4 % at 512 x 8192, 1,024 tokens). 3. adds one
comparison of ``batch * d_sae``, and the estimator for the features above ``p_max``, which alone have a
gradient: a quarter of the step at the start, when all are above, little once they are few.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUSAEConfig, Step
from sae_lens.saes.sae import SAEConfig, TrainCoefficientConfig, TrainStepInput, TrainStepOutput
from typing_extensions import override

from gemmascope_plugin.errors import ModelError
from gemmascope_plugin.saes.registration import StrictConfig, register_class
from gemmascope_plugin.saes.training.step_parts import fold_decoder, fold_scale, tangent, unit_rows

FOLDABLE = ("none", "expected_average_only_in", "covariance_whitening")
"""Normalisations of SAELens that become part of the weights after training."""


def check_foldable(normalize_activations: str) -> None:
    """Refuses normalisations by each token's own length."""
    if normalize_activations not in FOLDABLE:
        raise ModelError(
            f"normalize_activations={normalize_activations!r} depends on the token and cannot be "
            "folded into the weights",
            exists=", ".join(FOLDABLE),
        )


@dataclass
class GemmaScopeConfig(StrictConfig, JumpReLUTrainingSAEConfig):
    """SAELens' JumpReLU settings with Gemma Scope's values, and the frequency penalty.

    Raises:
        ModelError: A frequency outside (0, 1], a negative coefficient, or a normalisation that cannot
            be folded.
    """

    decoder_init_norm: float | None = 1.0
    """The encoder begins as the transpose of the decoder (He-uniform, then unit norm)."""
    jumprelu_init_threshold: float = 0.001
    jumprelu_bandwidth: float = 0.001
    l0_warm_up_steps: int = 10_000
    frequency_coefficient: float = 0.0
    """``c`` of the frequency penalty; warms up as the L0 coefficient does."""
    max_frequency: float = 0.1
    """Share of tokens up to which a feature is not charged."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_foldable(self.normalize_activations)
        if not 0 < self.max_frequency <= 1:
            raise ModelError(f"max_frequency is {self.max_frequency}, not a share of tokens")
        if not self.frequency_coefficient >= 0:
            raise ModelError(f"frequency_coefficient is {self.frequency_coefficient}, below 0")

    @override
    @classmethod
    def architecture(cls) -> str:
        """``"gemma_scope_jumprelu"``."""
        return "gemma_scope_jumprelu"

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        """Plain JumpReLU."""
        return JumpReLUSAEConfig

    @override
    def get_inference_sae_cfg_dict(self) -> dict[str, Any]:
        """The config of the saved dictionary, whose encoder sees the input as it is."""
        return {**super().get_inference_sae_cfg_dict(), "apply_b_dec_to_input": False}


class GemmaScopeTrainingSAE(JumpReLUTrainingSAE):
    """A JumpReLU SAE in training; any trainer of SAELens can drive it."""

    cfg: GemmaScopeConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, cfg: GemmaScopeConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        self._projected: Callable[[], torch.Tensor | None] = lambda: None

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """SAELens' step, on a decoder with unit rows."""
        self._constrain_decoder()
        return super().training_forward_pass(step_input)

    def _constrain_decoder(self) -> None:
        with torch.no_grad():
            self.W_dec.copy_(unit_rows(self.W_dec))
        # Loading puts another parameter in the old one's place, without its hooks.
        if self._projected() is not self.W_dec and self.W_dec.requires_grad:
            self._projected = weakref.ref(self.W_dec)
            self.W_dec.register_hook(lambda gradient: tangent(gradient, self.W_dec.detach()))

    @override
    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: Float[torch.Tensor, "batch d_sae"],
        hidden_pre: Float[torch.Tensor, "batch d_sae"],
        sae_out: Float[torch.Tensor, "batch d_in"],
    ) -> dict[str, torch.Tensor]:
        """SAELens' sparsity loss and the frequency penalty."""
        losses = super().calculate_aux_loss(
            step_input=step_input,
            feature_acts=feature_acts,
            hidden_pre=hidden_pre,
            sae_out=sae_out,
        )
        if self.cfg.frequency_coefficient:
            excess = excess_frequency(
                hidden_pre,
                self.threshold.to(hidden_pre.dtype),
                self.cfg.max_frequency,
                self.bandwidth,
                to_input=self.cfg.jumprelu_ste_to_input,
            )
            losses["frequency_loss"] = step_input.coefficients["frequency"] * excess
        return losses

    @override
    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        """The L0 coefficient and that of the frequency penalty, both warmed up."""
        frequency = TrainCoefficientConfig(
            value=self.cfg.frequency_coefficient, warm_up_steps=self.cfg.l0_warm_up_steps
        )
        return {**super().get_coefficients(), "frequency": frequency}

    @override
    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        """Makes it a dictionary of ``x`` from one of ``scaling_factor * x``, rows of unit norm."""
        self.fold_W_dec_norm()
        parameters = dict(self.named_parameters())
        for name, value in fold_scale(parameters, 1 / scaling_factor).items():
            parameters[name].data = value.data
        self.cfg.normalize_activations = "none"

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        """Folds what a plain JumpReLU dictionary does not have; the live tensors stay as they are."""
        super().process_state_dict_for_saving_inference(state_dict)
        state_dict |= fold_decoder(state_dict, subtracts_b_dec=self.cfg.apply_b_dec_to_input)


def excess_frequency(
    pre: Float[torch.Tensor, "batch d_sae"],
    threshold: Float[torch.Tensor, " d_sae"],
    max_frequency: float,
    bandwidth: float,
    *,
    to_input: bool = False,
) -> Float[torch.Tensor, ""]:
    """``sum_i max(0, p_i - p_max)`` with the straight-through gradient of ``p_i``.

    ``to_input``: the estimator passes a gradient to ``pre`` as well (Anthropic's variant).
    """
    with torch.no_grad():
        often = ((pre > threshold).to(pre.dtype).mean(0) > max_frequency).nonzero().squeeze(-1)
    fires: Any = Step.apply(pre[:, often], threshold[often], bandwidth, to_input)
    return (fires.mean(0) - max_frequency).sum()


register_class(GemmaScopeTrainingSAE, GemmaScopeConfig)
