"""Crosscoders and cross-layer transcoders as SAELens classes: side by side, saved, loaded, spliced.

SAELens knows one tensor in and one out.  Here those of ``n`` layers stand side by side on the last axis,
in the order of ``layers``, which increase; each layer has one hook that is read and one that is written.
``d_in``, ``d_out`` and ``d_sae`` are those of all layers together, in equal parts; features that read
layer ``i`` are the ``i``-th of ``n`` equal blocks:

1. ``W_enc [d, d_sae]``: the columns of block ``i`` are multiplied with the ``i``-th tensor.
2. ``W_dec [d_sae, n * d_out]``: tensor ``j`` is written by the blocks ``i <= j`` alone.  What lies below
   is zero, never read, and so never has a gradient: no mask can be forgotten.  Weights that have anything
   there are refused when they are loaded, since norms and files would have it.
3. ``W_skip [n, d_out, d]``, of CLTs if ``affine``: ``y_j += x_j @ W_skip_j.T``.

``dictionary()`` gives the ``CrossLayerDictionary`` that splicing runs (formulas: ``cross_layer.py``).

Cost: encode ``2 * tokens * d * d_sae`` operations, decode half of ``2 * tokens * d_sae * n * d_out``.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from jaxtyping import Float
from sae_lens import SAE
from sae_lens.registry import get_sae_class
from sae_lens.saes.sae import SAEConfig
from typing_extensions import override

from gemmascope_plugin.errors import ModelError, WidthMismatchError
from gemmascope_plugin.saes.cross_layer import (
    CrossCoder,
    CrossLayerConfig,
    CrossLayerDictionary,
    CrossLayerTranscoder,
    LayerWeights,
)
from gemmascope_plugin.saes.cross_layer_sae_config import (
    CLTSAEConfig,
    CrossCoderSAEConfig,
    CrossLayerSAEConfig,
)
from gemmascope_plugin.saes.jumprelu import jump
from gemmascope_plugin.saes.registration import register_class

Config = TypeVar("Config", bound="CrossLayerSAEConfig")


class CrossLayerWeights(SAE[Config]):
    """The parameters, and what they compute; for inference and training alike.

    Raises:
        ModelError: On loading features that write to a layer before their own.
    """

    b_enc: torch.nn.Parameter
    threshold: torch.nn.Parameter
    W_skip: torch.nn.Parameter | None

    def __init__(self, cfg: Config, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        self.register_load_state_dict_pre_hook(_check_causal)

    @override
    def initialize_weights(self) -> None:
        """Decoder rows of norm 1, zero where nothing may be written; biases, thresholds, skip zero."""
        cfg, place = self.cfg, {"dtype": self.dtype, "device": self.device}
        d_in, d_out = cfg.widths
        self.b_enc = torch.nn.Parameter(torch.zeros(cfg.d_sae, **place))
        self.threshold = torch.nn.Parameter(torch.zeros(cfg.d_sae, **place))
        self.b_dec = torch.nn.Parameter(torch.zeros(cfg.d_out, **place))
        rows = torch.zeros(cfg.d_sae, cfg.d_out, **place)
        directions = torch.nn.functional.normalize(torch.randn(cfg.d_sae, d_out, **place), dim=-1)
        for i in range(cfg.n_layers):  # features begin with the output of their own layer
            block = slice(i * cfg.block, (i + 1) * cfg.block)
            rows[block, i * d_out : (i + 1) * d_out] = directions[block]
        self.W_dec = torch.nn.Parameter(rows)
        tied = cfg.kind == "crosscoder"
        encoder = directions if tied else torch.randn(cfg.d_sae, d_in, **place)
        encoder = torch.nn.functional.normalize(encoder, dim=-1)
        self.W_enc = torch.nn.Parameter(encoder.T.clone().contiguous())
        skip = torch.zeros(cfg.n_layers, d_out, d_in, **place)
        self.W_skip = torch.nn.Parameter(skip) if cfg.affine else None

    def pre_activations(
        self, x: Float[torch.Tensor, "*tokens d_in"]
    ) -> Float[torch.Tensor, "*tokens d_sae"]:
        """Every block's product with its own layer's tensor.

        Raises:
            WidthMismatchError: ``x`` is not as wide as all layers together.
        """
        encoders = self.W_enc.split(self.cfg.block, dim=1)
        tensors = self._layers_of(x)
        pre = torch.cat([x_i @ W for x_i, W in zip(tensors, encoders, strict=True)], dim=-1)
        return pre + self.b_enc

    def _layers_of(
        self, x: Float[torch.Tensor, "*tokens d_in"]
    ) -> tuple[Float[torch.Tensor, "*tokens _"], ...]:
        cfg = self.cfg
        if x.shape[-1] != cfg.d_in:
            raise WidthMismatchError(
                f"the {cfg.kind} reads {cfg.n_layers} tensors of width {cfg.widths[0]} side by side, "
                f"the tensor has width {x.shape[-1]}",
                fix=f"torch.cat of the tensors at {', '.join(cfg.hooks_in)}",
            )
        return x.to(self.dtype).split(cfg.widths[0], dim=-1)

    def write(
        self,
        acts: Float[torch.Tensor, "*tokens d_sae"],
        x: Float[torch.Tensor, "*tokens d_in"] | None,
    ) -> Float[torch.Tensor, "*tokens d_out"]:
        """What the features write to each layer, from its own and all earlier blocks.

        Raises:
            ModelError: The affine skip has no input.
            WidthMismatchError: Not one activation per feature, or an input of another width.
        """
        cfg = self.cfg
        if acts.shape[-1] != cfg.d_sae:
            raise WidthMismatchError(
                f"the {cfg.kind} has {cfg.d_sae} features over {cfg.n_layers} layers, "
                f"the activations have width {acts.shape[-1]}",
                fix="what encode returned, edited or not",
            )
        columns = self.W_dec.split(cfg.widths[1], dim=1)
        out = torch.cat(
            [
                acts[..., : (j + 1) * cfg.block] @ W[: (j + 1) * cfg.block]
                for j, W in enumerate(columns)
            ],
            dim=-1,
        )
        out = out + self.b_dec
        if self.W_skip is None:
            return out
        if x is None:
            raise ModelError(
                f"This {cfg.kind} has an affine skip, so decoding needs the tensors that were encoded",
                fix="decode(acts, like=x)",
            )
        skipped = [t @ A.T for t, A in zip(self._layers_of(x), self.W_skip, strict=True)]
        return out + torch.cat(skipped, dim=-1)

    @override
    def decode(
        self,
        feature_acts: Float[torch.Tensor, "*tokens d_sae"],
        like: Float[torch.Tensor, "*tokens d_in"] | None = None,
    ) -> Float[torch.Tensor, "*tokens d_out"]:
        """Reconstructions of all layers; ``like`` is what was encoded, needed with an affine skip."""
        return self.hook_sae_recons(self.write(feature_acts, like))

    @override
    def forward(
        self, x: Float[torch.Tensor, "*tokens d_in"]
    ) -> Float[torch.Tensor, "*tokens d_out"]:
        """``decode(encode(x), x)``.

        Raises:
            ModelError: ``use_error_term`` is set; a splice knows what the model has at its outputs.
        """
        if self.use_error_term:
            raise ModelError(
                f"A {self.cfg.kind} has no error term of its own (use_error_term=True)",
                fix="splice(model, sae, error='keep')",
            )
        return self.hook_sae_output(self.decode(self.encode(x), like=x))

    @override
    def fold_W_dec_norm(self) -> None:
        """Makes every feature's decoder row, over all layers, a unit vector."""
        norms = self.get_W_dec_norm()
        self.W_dec.data.div_(norms[:, None])
        for parameter in (self.W_enc, self.b_enc, self.threshold):
            parameter.data.mul_(norms)

    def layer(self, i: int) -> LayerWeights:
        """The weights of the ``i``-th layer, as splicing and Gemma Scope's files have them."""
        cfg, (_, d_out) = self.cfg, self.cfg.widths
        block = slice(i * cfg.block, (i + 1) * cfg.block)
        return LayerWeights(
            W_enc=self.W_enc.detach()[:, block],
            b_enc=self.b_enc.detach()[block],
            threshold=self.threshold.detach()[block],
            W_dec=self.W_dec.detach()[block].unflatten(1, (cfg.n_layers, d_out)),
            b_dec=self.b_dec.detach()[i * d_out : (i + 1) * d_out],
            A=None if self.W_skip is None else self.W_skip.detach()[i].T,
        )


class CrossLayerSAE(CrossLayerWeights[Config]):
    """SAELens' inference class; tensors of all layers side by side.

    Raises:
        WidthMismatchError: Tensors of another width.
        ModelError: An affine skip without its input.
    """

    @override
    def encode(
        self, x: Float[torch.Tensor, "*tokens d_in"]
    ) -> Float[torch.Tensor, "*tokens d_sae"]:
        """Features of all layers."""
        pre = self.hook_sae_acts_pre(self.pre_activations(self.hook_sae_input(x)))
        return self.hook_sae_acts_post(jump(pre, self.threshold))

    def dictionary(self) -> CrossLayerDictionary:
        """What splicing runs; its tensors are views of this object's."""
        cfg = self.cfg
        layers_cfg = CrossLayerConfig(
            kind=cfg.kind,
            layers=tuple(cfg.layers),
            hooks_in=tuple(cfg.hooks_in),
            hooks_out=tuple(cfg.hooks_out),
            d_in=cfg.widths[0],
            d_out=cfg.widths[1],
            d_sae=(cfg.block,) * cfg.n_layers,
            affine=cfg.affine,
            dtype=self.dtype,
            device=str(self.device),
            metadata=cfg.metadata.to_dict(),
        )
        kinds = {
            dictionary_class.kind: dictionary_class
            for dictionary_class in (CrossCoder, CrossLayerTranscoder)
        }
        return kinds[cfg.kind](layers_cfg, self.layer).eval()

    @classmethod
    @override
    def get_sae_config_class_for_architecture(cls, architecture: str) -> type[SAEConfig]:
        """The config class itself, whose ``from_dict`` refuses unknown keys."""
        return get_sae_class(architecture)[1]


class CrossCoderSAE(CrossLayerSAE[CrossCoderSAEConfig]):
    """A weakly causal crosscoder of Gemma Scope 2's kind."""


class CLTSAE(CrossLayerSAE[CLTSAEConfig]):
    """A cross-layer transcoder, with or without affine skip."""


def _check_causal(
    module: CrossLayerWeights[Any], state_dict: dict[str, Any], prefix: str, *others: object
) -> None:
    """Weights are checked before they are taken over, wherever they come from."""
    cfg, name = module.cfg, f"{prefix}W_dec"
    if name not in state_dict or state_dict[name].shape != (cfg.d_sae, cfg.d_out):
        return  # PyTorch says what is missing, or has another shape
    for i, rows in enumerate(state_dict[name].split(cfg.block)):
        if rows[:, : i * cfg.widths[1]].any():
            raise ModelError(
                f"The features of layer {cfg.layers[i]} write to a layer before it",
                exists=f"a {cfg.kind}, whose features write to their own layer and later ones",
                fix="the weights that save_model wrote",
            )


register_class(CrossCoderSAE, CrossCoderSAEConfig)
register_class(CLTSAE, CLTSAEConfig)
