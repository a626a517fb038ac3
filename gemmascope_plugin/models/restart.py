"""The end of a forward pass from the residual stream before a layer, on both model classes.

1. One whole pass over the prompts records what each block is given: its input, its attention mask, its
   position embeddings.
2. The end is the model's own blocks called in order with the recorded arguments, the final norm, the
   unembedding and the soft-cap. ``HookedTransformer`` could start at a layer by itself,
   ``TransformerBridge`` of TransformerLens 3.9 cannot; by hand is the same on both, bit for bit.
3. Rows are copies of the prompts, copy after copy: recorded tensors with one row per prompt are repeated.

Cost: one pass once, with ``[layer, prompt, pos, d_model]`` numbers kept; after that the blocks that run.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float, Int

from gemmascope_plugin.models.asked import no_logits
from gemmascope_plugin.models.hooks import hooking
from gemmascope_plugin.models.points import n_layers
from gemmascope_plugin.models.protocol import HookedModel

_CACHES = ("past_kv_cache_entry", "past_key_values")
"""Arguments of a block that hold keys and values of earlier tokens: those of the recorded pass."""


class Restart:
    """Runs the layers from one on, as a model would that started there.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``.
        tokens: The prompts.
        layers: Where to start; ``n_layers`` for the final norm.
    """

    def __init__(
        self, model: HookedModel, tokens: Int[torch.Tensor, "prompt pos"], layers: Iterable[int]
    ) -> None:
        self._model: Any = model
        self._n_prompts = len(tokens)
        self._given: list[dict[str, Any]] = []
        self._streams: dict[int, torch.Tensor] = {}
        self._record(tokens, set(layers))

    @property
    def model(self) -> Any:
        """The model itself."""
        return self._model

    def stream(self, layer: int, copies: int) -> Float[torch.Tensor, "row pos d_model"]:
        """The residual stream before a layer, copies of the prompts one after the other."""
        return self._streams[layer].repeat(copies, 1, 1)

    def hooks(self, *args: Any, **kwargs: Any) -> Any:
        """Those of the model."""
        return hooking(self._model, *args, **kwargs)

    def __call__(
        self, stream: Float[torch.Tensor, "row pos d_model"], *, start_at_layer: int
    ) -> Float[torch.Tensor, "read asked d_vocab"]:
        """The logits of a stream before ``start_at_layer``, wherever they are asked for."""
        stream = self.blocks(stream, start_at_layer, n_layers(self._model))
        logits = self._model.unembed(self._model.ln_final(stream))
        cap = getattr(self._model.cfg, "output_logits_soft_cap", None)
        return cap * torch.tanh(logits / cap) if cap is not None and cap > 0 else logits

    def blocks(
        self, stream: Float[torch.Tensor, "row pos d_model"], start: int, stop: int
    ) -> Float[torch.Tensor, "row pos d_model"]:
        """The stream before ``stop``, of one before ``start``: the layers between them, and no more."""
        copies = len(stream) // self._n_prompts
        blocks = zip(self._model.blocks, self._given, strict=True)
        for block, given in list(blocks)[start:stop]:
            out = block(stream, **{name: self._repeat(x, copies) for name, x in given.items()})
            stream = out[0] if isinstance(out, tuple) else out
        return stream

    def _repeat(self, given: Any, copies: int) -> Any:
        """One row per row of the stream; what is the same for all prompts stays one row."""
        if isinstance(given, tuple):
            return tuple(self._repeat(each, copies) for each in given)
        by_prompt = isinstance(given, torch.Tensor) and given.shape[:1] == (self._n_prompts,)
        if not by_prompt or self._n_prompts == 1:
            return given
        return given.repeat(copies, *[1] * (given.ndim - 1))

    def _record(self, tokens: torch.Tensor, layers: set[int]) -> None:
        modules = [*self._model.blocks, self._model.ln_final]

        def keep(layer: int) -> Any:
            def hook_fn(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if layer in layers:
                    self._streams[layer] = args[0].detach()
                if layer < n_layers(self._model):
                    self._given.append({k: v for k, v in kwargs.items() if k not in _CACHES})

            return hook_fn

        handles = []
        try:
            for layer, module in enumerate(modules):
                fn = keep(layer)
                handles.append(module.register_forward_pre_hook(fn, with_kwargs=True))
            with torch.no_grad(), no_logits(self._model):
                self._model(tokens)
        finally:
            for handle in handles:
                handle.remove()
