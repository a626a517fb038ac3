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

All layers are in memory and every product is dense, so that the same code learns.  ``dictionary()`` gives
the ``CrossLayerDictionary`` that splicing runs, layer by layer and on active features only
(``cross_layer.py``).  A config is checked when it is made, and its ``from_dict`` refuses keys that it
does not know.

Cost: encode ``2 * tokens * d * d_sae`` operations, decode half of ``2 * tokens * d_sae * n * d_out``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float
from sae_lens import SAE
from sae_lens.registry import get_sae_class
from sae_lens.saes.sae import SAEConfig, SAEMetadata
from typing_extensions import override

from gemmascope_plugin.errors import ModelError, WidthMismatchError
from gemmascope_plugin.saes.cross_layer import (
    CrossCoder,
    CrossLayerConfig,
    CrossLayerDictionary,
    CrossLayerTranscoder,
    LayerWeights,
)
from gemmascope_plugin.saes.jumprelu import jump
from gemmascope_plugin.saes.registration import StrictConfig, register_class
from gemmascope_plugin.saes.sparse import Acts, Inputs, Outputs


@dataclass(kw_only=True)
class CrossLayerSAEConfig(StrictConfig, SAEConfig):
    """SAELens' config with layers; ``d_in`` and ``d_out`` are widths of all layers together."""

    layers: Sequence[int] = ()
    hooks_in: Sequence[str] = ()
    hooks_out: Sequence[str] = ()
    d_out: int = 0
    affine: bool = False
    apply_b_dec_to_input: bool = False
    metadata: Any = field(default_factory=SAEMetadata)
    """SAELens' metadata; its ``from_dict`` passes a dict first and replaces it afterwards."""

    kind: ClassVar[str] = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.layers = tuple(self.layers)
        self.hooks_in, self.hooks_out = tuple(self.hooks_in), tuple(self.hooks_out)
        check_layers(self.layers)
        n = len(self.layers)
        if len(self.hooks_in) != n or len(self.hooks_out) != n:
            raise ModelError(
                f"{n} layers with {len(self.hooks_in)} hooks to read and {len(self.hooks_out)} to write",
                fix="one of each per layer",
            )
        for name in ("d_in", "d_out", "d_sae"):
            size = getattr(self, name)
            if size < n or size % n:
                raise ModelError(
                    f"{name} is {size}, which {n} layers do not divide", fix=f"a multiple of {n}"
                )
        if self.normalize_activations != "none" or self.apply_b_dec_to_input:
            raise ModelError(
                f"A {self.kind} neither normalises its input nor subtracts b_dec from it",
                fix="normalize_activations='none', apply_b_dec_to_input=False",
            )
        if self.reshape_activations != "none":
            raise ModelError(
                f"A {self.kind} does not reshape its input "
                f"(reshape_activations={self.reshape_activations!r})",
                fix="reshape_activations='none', heads flattened",
            )

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @property
    def block(self) -> int:
        """Features that read one layer."""
        return self.d_sae // self.n_layers

    @property
    def widths(self) -> tuple[int, int]:
        """Width of one tensor that is read, and of one that is written."""
        return self.d_in // self.n_layers, self.d_out // self.n_layers


@dataclass(kw_only=True)
class CrossCoderSAEConfig(CrossLayerSAEConfig):
    """A weakly causal crosscoder: residual streams of a few layers to themselves."""

    kind: ClassVar[str] = "crosscoder"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.affine:
            raise ModelError("A crosscoder has no affine skip", fix="affine=False")
        if self.d_out != self.d_in:
            raise ModelError(
                f"A crosscoder writes what it reads, and has d_in {self.d_in} and d_out {self.d_out}",
                fix=f"d_out={self.d_in}",
            )

    @override
    @classmethod
    def architecture(cls) -> str:
        """``"jumprelu_crosscoder"``."""
        return "jumprelu_crosscoder"


@dataclass(kw_only=True)
class CLTSAEConfig(CrossLayerSAEConfig):
    """A cross-layer transcoder: MLP inputs to the MLP outputs of the same and all later layers."""

    kind: ClassVar[str] = "clt"

    @override
    @classmethod
    def architecture(cls) -> str:
        """``"jumprelu_clt"``."""
        return "jumprelu_clt"


def check_layers(layers: Sequence[int]) -> None:
    """Refuses anything but increasing layers from 0."""
    if not all(type(layer) is int for layer in layers):
        raise ModelError(
            f"The layers {list(layers)} are not all whole numbers", fix="layers=[0, 1]"
        )
    if not layers or layers[0] < 0 or any(b <= a for a, b in pairwise(layers)):
        raise ModelError(
            f"The layers {list(layers)} do not increase from 0",
            fix=f"layers={sorted({n for n in layers if n >= 0}) or [0, 1]}",
        )


Config = TypeVar("Config", bound="CrossLayerSAEConfig")


class CrossLayerWeights(SAE[Config]):
    """The parameters, and what they compute; for inference and training alike."""

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

    def pre_activations(self, x: Inputs) -> Acts:
        """Every block's product with its own layer's tensor."""
        encoders = self.W_enc.split(self.cfg.block, dim=1)
        tensors = self._layers_of(x)
        pre = torch.cat([x_i @ W for x_i, W in zip(tensors, encoders, strict=True)], dim=-1)
        return pre + self.b_enc

    def _layers_of(self, x: Inputs) -> tuple[Float[torch.Tensor, "*tokens _"], ...]:
        cfg = self.cfg
        if x.shape[-1] != cfg.d_in:
            raise WidthMismatchError(
                f"the {cfg.kind} reads {cfg.n_layers} tensors of width {cfg.widths[0]} side by side, "
                f"the tensor has width {x.shape[-1]}",
                fix=f"torch.cat of the tensors at {', '.join(cfg.hooks_in)}",
            )
        return x.to(self.dtype).split(cfg.widths[0], dim=-1)

    def write(self, acts: Acts, x: Inputs | None) -> Outputs:
        """What the features write to each layer, from its own and all earlier blocks."""
        cfg = self.cfg
        if acts.shape[-1] != cfg.d_sae:
            raise WidthMismatchError(
                f"the {cfg.kind} has {cfg.d_sae} features over {cfg.n_layers} layers, "
                f"the activations have width {acts.shape[-1]}",
                fix="what encode returned, edited or not",
            )
        columns = self.W_dec.split(cfg.widths[1], dim=1)
        stops = [(j + 1) * cfg.block for j in range(cfg.n_layers)]
        pairs = zip(stops, columns, strict=True)
        written = [acts[..., :stop] @ W[:stop] for stop, W in pairs]
        out = torch.cat(written, dim=-1) + self.b_dec
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
    def decode(self, feature_acts: Acts, like: Inputs | None = None) -> Outputs:
        """Reconstructions of all layers; ``like`` is what was encoded, needed with an affine skip."""
        return self.hook_sae_recons(self.write(feature_acts, like))

    @override
    def forward(self, x: Inputs) -> Outputs:
        """``decode(encode(x), x)``; an error term is a splice's, which knows what the model has there."""
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
    """SAELens' inference class; tensors of all layers side by side."""

    @override
    def encode(self, x: Inputs) -> Acts:
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
        kinds = {kind.kind: kind for kind in (CrossCoder, CrossLayerTranscoder)}
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
