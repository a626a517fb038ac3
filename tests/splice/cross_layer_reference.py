"""Random crosscoders and cross-layer transcoders, and what they should do, computed on transformers.

One pass of module hooks: the features of each layer are those of the tensor that is there when the pass
reaches it, and the tensor at output ``j`` becomes ``b_j + sum_{i <= j} f_i @ W_dec_i[:, j]`` (plus
``x_j @ A_j``), or, with the error kept, what is there plus ``sum_{i <= j} (f'_i - f_i) @ W_dec_i[:, j]``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from gemmascope_plugin.saes import CrossCoder, CrossLayerTranscoder
from gemmascope_plugin.saes.cross_layer import CrossLayerConfig, LayerWeights
from tests.factories import activations
from tests.splice.gained_transcoders import norm_outputs
from tests.tiny_models import FIRST_WORD_ID, random_tokens

D, F = 32, 48
LAYERS = (0, 1, 2)
DENSITY = 0.1


def clt(hf: Any, *, affine: bool = False, seed: int = 0, dtype: Any = torch.float32) -> Any:
    """A cross-layer transcoder of the whole model, a tenth of its features active."""
    inputs = [norm_outputs(hf, layer) for layer in LAYERS]
    hooks = [(f"blocks.{i}.mlp.hook_in", f"blocks.{i}.hook_mlp_out") for i in LAYERS]
    return _made("clt", LAYERS, hooks, inputs, affine, seed, dtype)


def crosscoder(
    model: Any, layers: Sequence[int] = (0, 2), *, affine: bool = False, seed: int = 0
) -> Any:
    """A crosscoder of a few residual streams."""
    names = [f"blocks.{i}.hook_resid_post" for i in layers]
    hooks = list(zip(names, names, strict=True))
    tokens = random_tokens(batch_size=16, seed=99)
    inputs = [activations(model, tokens, name)[:, 1:].flatten(0, 1) for name in names]
    return _made("crosscoder", tuple(layers), hooks, inputs, affine, seed, torch.float32)


def _made(
    kind: str,
    layers: tuple[int, ...],
    hooks: Sequence[tuple[str, str]],
    inputs: Sequence[torch.Tensor],
    affine: bool,
    seed: int,
    dtype: torch.dtype,
) -> Any:
    weights = [
        _weights(x.float(), i, len(layers), affine, seed, dtype) for i, x in enumerate(inputs)
    ]
    config = CrossLayerConfig(
        kind=kind,
        layers=layers,
        hooks_in=tuple(hook_in for hook_in, _ in hooks),
        hooks_out=tuple(hook_out for _, hook_out in hooks),
        d_in=D,
        d_out=D,
        d_sae=(F,) * len(layers),
        affine=affine,
        dtype=dtype,
    )
    make = CrossLayerTranscoder if kind == "clt" else CrossCoder
    return make(config, lambda position: weights[position])


def _weights(
    x: torch.Tensor, position: int, n: int, affine: bool, seed: int, dtype: torch.dtype
) -> LayerWeights:
    generator = torch.Generator().manual_seed(100 * seed + position)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    encoder, bias, decoder = randn(D, F) * D**-0.5, 0.1 * randn(F), 0.2 * randn(F, n, D)
    decoder[:, :position] = 0
    pre = x @ encoder + bias
    return LayerWeights(
        W_enc=encoder,
        b_enc=bias,
        threshold=pre.quantile(1 - DENSITY, dim=0).clamp(min=0.02),
        W_dec=decoder.to(dtype),
        b_dec=0.2 * randn(D),
        A=0.2 * randn(D, D).triu() if affine else None,
    )


def layer_features(weights: LayerWeights, x: torch.Tensor) -> torch.Tensor:
    pre = x @ weights.W_enc + weights.b_enc
    return pre * (pre > weights.threshold)


Change = Callable[[torch.Tensor], torch.Tensor]


class Replacement:
    """The features of a pass so far, and what they write.

    Args:
        code: The dictionary.
        keep: ``[batch, pos, 1]``, False at tokens that are left alone.
        error: ``"drop"`` or ``"keep"``.
        changes: By position in the dictionary, what becomes of the features.
    """

    def __init__(
        self, code: Any, keep: torch.Tensor, error: str, changes: Mapping[int, Change]
    ) -> None:
        self.code, self.keep, self.error, self.changes = code, keep, error, changes
        self.before: list[torch.Tensor] = []
        self.after: list[torch.Tensor] = []
        self.outputs: list[torch.Tensor] = []
        self.x: torch.Tensor | None = None

    def read(self, position: int, x: torch.Tensor) -> None:
        acts = layer_features(self.code.weights(position), x) * self.keep
        change = self.changes.get(position, torch.Tensor.clone)
        self.x = x
        self.before.append(acts)
        self.after.append(torch.where(self.keep, change(acts), acts))

    def write(self, position: int, y: torch.Tensor) -> torch.Tensor:
        weights = self.code.weights(position)
        decoders = [self.code.weights(i).W_dec[:, position] for i in range(position + 1)]
        if self.error == "keep":
            made = y + sum(
                (new - old) @ decoder
                for new, old, decoder in zip(self.after, self.before, decoders, strict=True)
            )
        else:
            made = weights.b_dec + sum(new @ W for new, W in zip(self.after, decoders, strict=True))
            if weights.A is not None and self.x is not None:
                made = made + self.x @ weights.A
        self.outputs.append(torch.where(self.keep, made, y))
        return self.outputs[-1]


@contextmanager
def replaced(
    hf: Any,
    code: Any,
    tokens: torch.Tensor,
    *,
    error: str = "drop",
    changes: Mapping[int, Change] | None = None,
    keep: torch.Tensor | None = None,
):
    """The transformers model with the dictionary at all its sites; yields what it did."""
    keep = (tokens >= FIRST_WORD_ID if keep is None else keep)[..., None]
    made = Replacement(code, keep, error, changes or {})
    handles = []
    for position, layer in enumerate(code.cfg.layers):
        attach = _attach_to_mlp if code.cfg.kind == "clt" else _attach_to_stream
        handles += attach(made, position, hf.model.layers[layer])
    try:
        yield made
    finally:
        for handle in handles:
            handle.remove()


def _attach_to_mlp(made: Replacement, position: int, layer: Any) -> list[Any]:
    def look(module, args, output):
        made.read(position, output)

    def write(module, args, output):
        return made.write(position, output)

    return [
        layer.pre_feedforward_layernorm.register_forward_hook(look),
        layer.post_feedforward_layernorm.register_forward_hook(write),
    ]


def _attach_to_stream(made: Replacement, position: int, layer: Any) -> list[Any]:
    def both(module, args, output):
        value = output[0] if isinstance(output, tuple) else output
        made.read(position, value)
        value = made.write(position, value)
        return (value, *output[1:]) if isinstance(output, tuple) else value

    return [layer.register_forward_hook(both)]
