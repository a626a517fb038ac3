"""Training of crosscoders and cross-layer transcoders, on SAELens' JumpReLU training class.

1. A batch has the tensors of all layers side by side (``cross_layer_sae.py``); of a CLT the inputs of all
   layers, then the outputs of all layers.
2. The squared errors of all layers are summed; the trainer scales each layer's tensors by themselves,
   so that each counts alike (Gemma Scope 2 normalises likewise).
3. The sparsity term is SAELens', over the features of all layers together: they share one budget. A
   feature's decoder norm, where a term has it, is that of its row over all layers.
4. Decoder rows begin in the space of their own layer, with one norm; the encoder of a crosscoder begins
   as their transpose, that of a CLT with directions of its own, since the spaces differ.

Gemma Scope 2 begins with dictionaries of single layers, which is not done here.

Cost: a step is that of an SAE with the same number of features and ``n`` times the width, less half of
the decoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from sae_lens import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.jumprelu_sae import JumpReLU
from sae_lens.saes.sae import SAEConfig, TrainingSAEConfig, TrainStepInput, TrainStepOutput
from typing_extensions import override

from gemmascope_plugin.errors import ModelError, WidthMismatchError
from gemmascope_plugin.saes.cross_layer_sae import (
    CLTSAEConfig,
    CrossCoderSAEConfig,
    CrossLayerSAEConfig,
    CrossLayerWeights,
)
from gemmascope_plugin.saes.registration import register_class
from gemmascope_plugin.saes.training.step_parts import paired_step


@dataclass(kw_only=True)
class CrossLayerTrainingConfig(CrossLayerSAEConfig, JumpReLUTrainingSAEConfig):
    """Layers, and SAELens' settings of JumpReLU training."""

    inference: ClassVar[type[CrossLayerSAEConfig]]
    """The config of what is saved, without the settings of training."""
    apply_b_dec_to_input: bool = False
    decoder_init_norm: float | None = 1.0
    """Of decoder rows and encoder columns at the beginning, as in Gemma Scope."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decoder_init_norm is None or not self.decoder_init_norm > 0:
            raise ModelError(
                f"decoder_init_norm is {self.decoder_init_norm}, not a norm that a row can begin with",
                fix="decoder_init_norm=1.0",
            )

    @override
    @classmethod
    def architecture(cls) -> str:
        """SAELens' name of what is saved."""
        return cls.inference.architecture()

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        """The config of what is saved."""
        return self.inference

    @property
    def batch_width(self) -> int:
        """Width of a batch: of what a crosscoder reads and writes, of a CLT's inputs and outputs."""
        return self.d_in if self.kind == CrossCoderSAEConfig.kind else self.d_in + self.d_out


@dataclass(kw_only=True)
class CrossCoderTrainingConfig(CrossLayerTrainingConfig):
    """Of a crosscoder."""

    kind: ClassVar[str] = CrossCoderSAEConfig.kind
    inference: ClassVar[type[CrossLayerSAEConfig]] = CrossCoderSAEConfig


@dataclass(kw_only=True)
class CLTTrainingConfig(CrossLayerTrainingConfig):
    """Of a cross-layer transcoder."""

    kind: ClassVar[str] = CLTSAEConfig.kind
    inference: ClassVar[type[CrossLayerSAEConfig]] = CLTSAEConfig


class CrossLayerTrainingSAE(CrossLayerWeights[Any], JumpReLUTrainingSAE):
    """A crosscoder or CLT in training."""

    cfg: CrossLayerTrainingConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    @override
    def initialize_weights(self) -> None:
        """Decoder rows and encoder columns of ``cfg.decoder_init_norm``."""
        super().initialize_weights()
        norm = self.cfg.decoder_init_norm
        assert norm is not None, "the config refuses it"
        self.W_dec.data.mul_(norm)
        self.W_enc.data.mul_(norm)

    @override
    def encode_with_hidden_pre(
        self, x: Float[torch.Tensor, "batch d_in"]
    ) -> tuple[Float[torch.Tensor, "batch d_sae"], Float[torch.Tensor, "batch d_sae"]]:
        """Activations, with a gradient for thresholds, and pre-activations."""
        pre = self.hook_sae_acts_pre(self.pre_activations(self.hook_sae_input(x)))
        acts: Any = JumpReLU.apply(
            pre, self.threshold.to(pre.dtype), self.bandwidth, self.cfg.jumprelu_ste_to_input
        )
        return self.hook_sae_acts_post(acts), pre

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """One step on ``[batch, d_in]``, of a CLT ``[batch, d_in + d_out]``."""
        width = step_input.sae_in.shape[-1]
        if width != self.cfg.batch_width:
            raise WidthMismatchError(
                f"a {self.cfg.kind} learns from batches of width {self.cfg.batch_width}, "
                f"this one has {width}",
                fix="the tensors of all layers side by side; of a clt the inputs, then the outputs",
            )
        x, target = step_input.sae_in[:, : self.cfg.d_in], step_input.sae_in[:, -self.cfg.d_out :]
        with torch.no_grad():
            self.threshold.data.clamp_(min=0.0)
        acts, pre = self.encode_with_hidden_pre(x)
        out = self.decode(acts, like=x)
        return paired_step(self, step_input, x, target, acts, pre, out)

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        """Thresholds that the last step left below zero; the live tensors stay as they are."""
        super().process_state_dict_for_saving_inference(state_dict)
        state_dict["threshold"] = state_dict["threshold"].clamp(min=0)

    @torch.no_grad()
    def fold_scales(
        self, scales_in: Float[torch.Tensor, " layer"], scales_out: Float[torch.Tensor, " layer"]
    ) -> None:
        """Makes it a dictionary of ``x_i`` and ``y_j`` from one of ``scales_in[i] * x_i`` and so on."""
        cfg = self.cfg
        place = {"device": self.W_enc.device, "dtype": self.W_enc.dtype}
        scales_in, scales_out = scales_in.to(**place), scales_out.to(**place)
        self.W_enc.data.mul_(scales_in.repeat_interleave(cfg.block))
        wide = scales_out.repeat_interleave(cfg.widths[1])
        self.W_dec.data.div_(wide)
        self.b_dec.data.div_(wide)
        if self.W_skip is not None:
            self.W_skip.data.mul_((scales_in / scales_out)[:, None, None])

    @classmethod
    @override
    def get_sae_config_class_for_architecture(cls, architecture: str) -> type[TrainingSAEConfig]:
        """The training config."""
        return get_sae_training_class(architecture)[1]


class CrossCoderTrainingSAE(CrossLayerTrainingSAE):
    """A crosscoder in training."""


class CLTTrainingSAE(CrossLayerTrainingSAE):
    """A cross-layer transcoder in training."""


register_class(CrossCoderTrainingSAE, CrossCoderTrainingConfig)
register_class(CLTTrainingSAE, CLTTrainingConfig)
