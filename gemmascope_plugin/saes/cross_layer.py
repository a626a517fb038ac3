"""Crosscoders and cross-layer transcoders: features that read one layer and write several.

With ``n`` layers, 0 <= i <= j < n:

1. ``f_i = JumpReLU(x_i @ W_enc_i + b_enc_i; threshold_i)``; the comparison runs in float32.
2. ``y_j = b_dec_j + sum_{i <= j} f_i @ W_dec_i[:, j, :]`` and, with an affine skip, ``+ x_j @ A_j``.
   The second axis of ``W_dec_i`` is the *absolute* output layer; what lies before ``i`` is zero in
   the files, checked by the reader, and never read here.
3. A weakly causal crosscoder (Gemma Scope 2) reads and writes the residual stream of a few layers; a
   cross-layer transcoder reads the MLP inputs and writes the MLP outputs of all of them.

Weights come from a ``fetch`` function, layer by layer, when first used.  Encoders are kept on the
module's device; decoders stay where they are (on disk when memory-mapped) and only the rows of
active features are gathered, so that a 33 GB dictionary runs in the memory of its encoders.

Cost: encoding is ``2 * tokens * d_in * d_sae`` operations a layer; decoding layer ``j`` reads
``active * d_out`` values for each ``i <= j``, ``active`` counted over all tokens together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float

from gemmascope_plugin.errors import ModelError, UnknownNameError, WidthMismatchError
from gemmascope_plugin.saes.jumprelu import encode
from gemmascope_plugin.saes.sparse import Acts, Inputs, Outputs, SparseActs, write

Layers = Sequence[Float[torch.Tensor, "*tokens _"]]
"""One tensor per layer; the last axes may differ between the layers."""


@dataclass(frozen=True, kw_only=True)
class CrossLayerConfig:
    """What a dictionary over several layers is."""

    kind: str
    """``crosscoder`` or ``clt``."""
    layers: tuple[int, ...]
    """The model's layers, in the order of all lists of tensors here."""
    hooks_in: tuple[str, ...]
    hooks_out: tuple[str, ...]
    d_in: int
    d_out: int
    d_sae: tuple[int, ...]
    """Number of features that read each layer."""
    affine: bool = False
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n_layers(self) -> int:
        """Number of layers that are read and written."""
        return len(self.layers)

    def architecture(self) -> str:
        """The kind, where SAELens' configs have their architecture."""
        return f"jumprelu_{self.kind}"


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """The parameters that belong to one layer: its encoder, its features' decoder, its output bias."""

    W_enc: Float[torch.Tensor, "d_in d_sae"]
    b_enc: Float[torch.Tensor, " d_sae"]
    threshold: Float[torch.Tensor, " d_sae"]
    W_dec: Float[torch.Tensor, "d_sae n_out d_out"]
    """Rows are features of this layer; the second axis is the output layer."""
    b_dec: Float[torch.Tensor, " d_out"]
    A: Float[torch.Tensor, "d_in d_out"] | None = None
    """Affine skip of this layer, ``y += x @ A``."""

    def on(self, device: torch.device, dtype: torch.dtype) -> LayerWeights:
        """All but the decoder moved and cast."""
        names = ("W_enc", "b_enc", "threshold", "b_dec")
        moved: dict[str, Any] = {n: getattr(self, n).to(device, dtype) for n in names}
        if self.A is not None:
            moved["A"] = self.A.to(device, dtype)
        return replace(self, **moved)


class CrossLayerDictionary(torch.nn.Module):
    """A dictionary over several layers; ``CrossCoder`` and ``CrossLayerTranscoder`` are the two kinds.

    It has no parameters in PyTorch's sense, so ``state_dict`` is empty and nothing trains it. ``fetch``
    gives the weights of a layer by its position in ``cfg.layers``, when the layer is first used.
    """

    kind = ""

    def __init__(self, cfg: CrossLayerConfig, fetch: Callable[[int], LayerWeights]) -> None:
        super().__init__()
        assert cfg.kind == self.kind, f"{type(self).__name__} for a {cfg.kind}"
        self.cfg = cfg
        self._fetch = fetch
        self._opened: dict[int, LayerWeights] = {}
        # Follows ``.to()``; weights that are not open yet must arrive where the others are.
        self.register_buffer("_place", torch.empty(0, dtype=cfg.dtype, device=cfg.device), False)

    def weights(self, position: int) -> LayerWeights:
        """The weights of ``cfg.layers[position]``, opened on first use; its decoder stays on the disk."""
        if not 0 <= position < self.cfg.n_layers:
            raise UnknownNameError(
                f"no layer at position {position}",
                exists=f"{self.cfg.n_layers} positions, layers {list(self.cfg.layers)}",
            )
        if position not in self._opened:
            place = self.get_buffer("_place")
            self._opened[position] = self._fetch(position).on(place.device, place.dtype)
        return self._opened[position]

    @property
    def opened(self) -> tuple[int, ...]:
        """Positions of the layers whose weights are open."""
        return tuple(sorted(self._opened))

    def close(self) -> None:
        """Forget all open weights; the next use opens them again."""
        self._opened.clear()

    def _apply(self, fn: Any, recurse: bool = True) -> CrossLayerDictionary:
        super()._apply(fn, recurse)
        self.close()
        return self

    def encode_layer(self, position: int, x: Inputs) -> Acts:
        """Features that read one layer, of the tensor at ``cfg.hooks_in[position]``."""
        if x.shape[-1] != self.cfg.d_in:
            raise WidthMismatchError(
                f"the {self.kind} reads width {self.cfg.d_in} at {self.cfg.hooks_in[position]}, "
                f"the tensor has {x.shape[-1]}",
                fix="the tensor of the hook in cfg.hooks_in, heads flattened",
            )
        return encode(self.weights(position), x)

    def encode(self, x: Layers) -> tuple[Float[torch.Tensor, "*tokens _"], ...]:
        """Features of every layer, of one tensor per layer in the order of ``cfg.hooks_in``."""
        self._check_count(x, "tensors")
        return tuple(self.encode_layer(i, x_i) for i, x_i in enumerate(x))

    def decode_layer(self, position: int, acts: Layers, x: Inputs | None = None) -> Outputs:
        """The tensor for ``cfg.hooks_out[position]``, from the features of all layers up to it.

        ``x`` is the input of the same layer, needed with an affine skip.
        """
        if len(acts) <= position:
            raise ModelError(
                f"layer {position} needs the features of layers 0 to {position}, got {len(acts)}"
            )
        layer = self.weights(position)
        out = layer.b_dec.expand(*acts[position].shape[:-1], self.cfg.d_out)
        for i, layer_acts in enumerate(acts[: position + 1]):
            active = SparseActs.from_dense(layer_acts)
            out = out + write(active, self.weights(i).W_dec[:, position])
        if layer.A is None:
            return out
        if x is None:
            raise ModelError(
                f"this {self.kind} has an affine skip, so decoding layer {position} needs its input",
                fix="decode(acts, x) with the tensors that were encoded",
            )
        return out + x.to(layer.A.dtype) @ layer.A

    def decode(
        self, acts: Layers, x: Layers | None = None
    ) -> tuple[Float[torch.Tensor, "*tokens _"], ...]:
        """Reconstructions in the order of ``cfg.hooks_out``; with an affine skip ``x`` is needed, too."""
        self._check_count(acts, "activations")
        inputs = x if x is not None else [None] * self.cfg.n_layers
        return tuple(self.decode_layer(j, acts, inputs[j]) for j in range(self.cfg.n_layers))

    def forward(self, x: Layers) -> tuple[Float[torch.Tensor, "*tokens _"], ...]:
        """``decode(encode(x), x)``."""
        return self.decode(self.encode(x), x)

    def _check_count(self, tensors: Layers, noun: str) -> None:
        if len(tensors) != self.cfg.n_layers:
            raise WidthMismatchError(
                f"the {self.kind} has {self.cfg.n_layers} layers, got {len(tensors)} {noun}",
                exists=f"layers {list(self.cfg.layers)}",
            )

    def extra_repr(self) -> str:
        """Layers, shapes and how many layers are open."""
        cfg = self.cfg
        return (
            f"layers={list(cfg.layers)}, d_in={cfg.d_in}, d_sae={sum(cfg.d_sae)}, "
            f"affine={cfg.affine}, open={len(self._opened)}/{cfg.n_layers}"
        )


class CrossCoder(CrossLayerDictionary):
    """Weakly causal crosscoder: residual streams of a few layers to themselves."""

    kind = "crosscoder"


class CrossLayerTranscoder(CrossLayerDictionary):
    """Cross-layer transcoder: MLP inputs to the MLP outputs of the same and all later layers."""

    kind = "clt"
