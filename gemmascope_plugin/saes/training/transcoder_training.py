"""JumpReLU transcoders, plain and with an affine skip, that SAELens' trainer can train.

SAELens trains autoencoders only. Here

1. a batch is ``[x | y]`` side by side; the encoder sees ``x``, of width ``d_in``;
2. ``y_hat = f(x) @ W_dec + b_dec``, plus ``x @ W_skip.T`` with a skip, ``W_skip [d_out, d_in]`` beginning
   at zero (arXiv 2501.18823; SAELens' convention);
3. the squared error is taken against ``y``, of width ``d_out``; sparsity term, dead features, schedules
   and optimiser are SAELens';
4. what is saved is SAELens' ``JumpReLUTranscoder`` or ``JumpReLUSkipTranscoder``.

The encoder does not start as the decoder's transpose (arXiv 2408.05147, section 3.3): the spaces differ.
``b_dec`` is never subtracted from the input, for the same reason.

Cost: ``2 * tokens * d_sae * (d_in + d_out)`` operations forward, plus ``2 * tokens * d_in * d_out``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from sae_lens import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import nn
from typing_extensions import override

from gemmascope_plugin.saes.training.step_parts import paired_step


@dataclass(kw_only=True)
class TranscoderConfig(JumpReLUTrainingSAEConfig):
    """``JumpReLUTrainingSAEConfig`` with a second width."""

    d_out: int
    apply_b_dec_to_input: bool = False
    tied_init: bool = False
    """Whether the encoder starts as the decoder's transpose; the bundled suite was trained so."""

    @classmethod
    @override
    def architecture(cls) -> str:
        """SAELens' name of what is saved."""
        return "jumprelu_transcoder"


@dataclass(kw_only=True)
class SkipTranscoderConfig(TranscoderConfig):
    """The same with an affine skip."""

    @classmethod
    @override
    def architecture(cls) -> str:
        """SAELens' name of what is saved."""
        return "jumprelu_skip_transcoder"


class JumpReLUTrainingTranscoder(JumpReLUTrainingSAE):
    """A transcoder in training; with ``SkipTranscoderConfig`` it has an affine skip."""

    cfg: TranscoderConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    W_skip: nn.Parameter | None

    @override
    def initialize_weights(self) -> None:
        """Decoder rows and encoder columns of one norm, biases and skip zero."""
        cfg, place = self.cfg, {"dtype": self.dtype, "device": self.device}
        self.b_dec = nn.Parameter(torch.zeros(cfg.d_out, **place))
        self.b_enc = nn.Parameter(torch.zeros(cfg.d_sae, **place))
        self.W_dec = nn.Parameter(self._rows(cfg.d_out))
        rows = self.W_dec.data if cfg.tied_init else self._rows(cfg.d_in)
        self.W_enc = nn.Parameter(rows.T.clone().contiguous())
        skip = isinstance(cfg, SkipTranscoderConfig)
        self.W_skip = nn.Parameter(torch.zeros(cfg.d_out, cfg.d_in, **place)) if skip else None

    def _rows(self, width: int) -> Float[torch.Tensor, "d_sae width"]:
        rows = torch.empty(self.cfg.d_sae, width, dtype=self.dtype, device=self.device)
        nn.init.kaiming_uniform_(rows)
        if self.cfg.decoder_init_norm is not None:
            rows /= rows.norm(dim=-1, keepdim=True)
            rows *= self.cfg.decoder_init_norm
        return rows

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """One step on a batch ``[batch, d_in + d_out]``; ``sae_in`` of the result is the target."""
        x, target = step_input.sae_in.split([self.cfg.d_in, self.cfg.d_out], dim=-1)
        with torch.no_grad():
            self.threshold.data.clamp_(min=0.0)
        acts, pre = self.encode_with_hidden_pre(x)
        return paired_step(self, step_input, x, target, acts, pre, self.write(acts, x))

    @override
    def process_sae_in(self, sae_in: torch.Tensor) -> torch.Tensor:
        """The input as the encoder sees it; ``b_dec`` lives in the space of the output."""
        return self.run_time_activation_norm_fn_in(self.hook_sae_input(sae_in.to(self.dtype)))

    def write(
        self, acts: Float[torch.Tensor, "batch d_sae"], x: Float[torch.Tensor, "batch d_in"]
    ) -> Float[torch.Tensor, "batch d_out"]:
        """What is written for features and the input that they come from."""
        out = self.decode(acts)
        return out if self.W_skip is None else out + x @ self.W_skip.T

    @override
    def forward(self, x: Float[torch.Tensor, "batch d_in"]) -> Float[torch.Tensor, "batch d_out"]:
        """Encodes and writes."""
        return self.hook_sae_output(self.write(self.encode(x), x))

    @torch.no_grad()
    def fold_scales(self, scale_in: float, scale_out: float) -> None:
        """Makes it a transcoder of ``x`` and ``y`` from one of ``scale_in * x`` and ``scale_out * y``."""
        self.W_enc.data *= scale_in
        self.W_dec.data /= scale_out
        self.b_dec.data /= scale_out
        if self.W_skip is not None:
            self.W_skip.data *= scale_in / scale_out
