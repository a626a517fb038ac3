"""Runs prompts again from a layer by the model's own modules, where ``replay.py`` does not know them.

1. Every position runs, in rows that are copies of the prompts. Below a layer every copy is what it was,
   so a pass starts there (:class:`Restart`): one whole pass records what each block is given, its input,
   its attention mask, its position embeddings; the end is the model's own blocks called in order with
   these, the final norm, the unembedding and the soft-cap. ``HookedTransformer`` could start at a layer
   by itself, ``TransformerBridge`` of TransformerLens 3.9 cannot; by hand is the same on both, bit for
   bit.
2. Where somebody's hooks take part, those of dictionaries among them, a pass runs whole: they may need
   what would be left out.

Cost: one pass, and one more to restart from; then the layers that run.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int

from gemmascope_plugin.models.asked import no_logits
from gemmascope_plugin.models.points import can_restart, n_layers
from gemmascope_plugin.models.protocol import HookedModel, Runner, model_of
from gemmascope_plugin.models.record import hooking, keeping, put
from gemmascope_plugin.models.replay_points import Entry
from gemmascope_plugin.models.threads import threads_for_tokens
from gemmascope_plugin.models.unembed import soft_cap
from gemmascope_plugin.types import Hooks


@dataclass(eq=False)
class ModuleReplay:
    """Prompts that were run once, to be run again from a layer; ``row`` is each position's prompt."""

    runner: Any
    tokens: Int[torch.Tensor, "prompt pos"]
    at: Int[torch.Tensor, " ask"]
    row: Int[torch.Tensor, " ask"]
    pre: list[torch.Tensor] = field(default_factory=list)
    """Streams before each layer, and behind the last; none with dictionaries."""
    mid: list[torch.Tensor] = field(default_factory=list)
    """Streams between attention and MLP."""
    _end: Restart | None = None

    @property
    def runs_whole(self) -> bool:
        """Whether passes start at the bottom, wherever they could start."""
        return self._end is None

    @property
    def model(self) -> HookedModel:
        """The model."""
        return model_of(self.runner)

    @torch.no_grad()
    def record(self, hooks: Hooks = ()) -> Float[torch.Tensor, "ask d_model"]:
        """Runs the prompts; gives what the unembedding reads at the asked positions."""
        if self.runner is not self.model:
            return self._pass(self.tokens, hooks, {})
        restarts = can_restart(self.model)
        n = n_layers(self.model)
        streams: dict[str, torch.Tensor] = {}
        pre = [f"blocks.{layer}.hook_resid_pre" for layer in range(n)]
        mid = [f"blocks.{layer}.hook_resid_mid" for layer in range(n)]
        pre.append(f"blocks.{n - 1}.hook_resid_post")
        final = self._pass(self.tokens, [*hooks, *keeping(streams, [*pre, *mid])], {})
        self.pre = [streams[name] for name in pre]
        self.mid = [streams[name] for name in mid]
        self._end = Restart(self.model, self.tokens, range(n + 1)) if restarts else None
        return final

    def run(self, entry: Entry, window: slice) -> Float[torch.Tensor, "ask d_model"]:
        """What ``Replay.run`` says, always from the beginning of the layer; ``values`` saves nothing."""
        layer, copies, stream, hooks = entry.layer, entry.copies, entry.stream, list(entry.hooks)
        embeds = layer == 0 and any(name == "hook_embed" for name, _ in hooks)
        if self._end is not None and not embeds:
            rows = self._end.stream(layer, copies) if stream is None else stream
            return self._pass(rows, hooks, {"start_at_layer": layer}, self._end)
        rows = self.tokens.repeat(copies, 1)
        if stream is None:
            return self._pass(rows, hooks, {})
        n = n_layers(self.model)
        last = f"blocks.{n - 1}.hook_resid_post"
        where = last if layer == n else f"blocks.{layer}.hook_resid_pre"
        return self._pass(rows, [(where, put(stream)), *hooks], {})

    def window(self, start: int) -> slice:
        """All positions."""
        return slice(0, self.tokens.shape[1])

    @torch.no_grad()
    def variant(
        self, tokens: Int[torch.Tensor, "prompt pos"], start: int, hooks: Hooks = ()
    ) -> Float[torch.Tensor, "ask d_model"]:
        """Other tokens."""
        return self._pass(tokens, hooks, {})

    def _pass(
        self,
        rows: torch.Tensor,
        hooks: Hooks,
        options: dict[str, Any],
        runner: Runner | None = None,
    ) -> Float[torch.Tensor, "ask d_model"]:
        held: list[torch.Tensor] = []
        target: Runner = self.runner if runner is None else runner

        def end(x: torch.Tensor, hook: object) -> torch.Tensor:
            first = torch.arange(0, len(x), len(self.tokens), device=x.device)[:, None]
            at = self.at.repeat(len(first)).to(x.device)
            held.append(x[(first + self.row.to(x.device)).flatten(), at])
            return x[:1, :1]  # logits are not asked for

        hooks = [*hooks, ("unembed.hook_in", end)]
        with (
            threads_for_tokens(self.model, len(rows) * rows.shape[1]),
            hooking(target, fwd_hooks=hooks),
        ):
            target(rows, **options)
        return held[0]


_CACHES = ("past_kv_cache_entry", "past_key_values")
"""Arguments of a block that hold keys and values of earlier tokens: those of the recorded pass."""


class Restart:
    """Runs the layers from one of ``layers`` on, ``n_layers`` being the final norm."""

    def __init__(
        self, model: HookedModel, tokens: Int[torch.Tensor, "prompt pos"], layers: Iterable[int]
    ) -> None:
        self._model: Any = model
        self._n_prompts = len(tokens)
        self._arguments: list[dict[str, Any]] = []
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
        cap = soft_cap(self._model)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def blocks(
        self, stream: Float[torch.Tensor, "row pos d_model"], start: int, stop: int
    ) -> Float[torch.Tensor, "row pos d_model"]:
        """The stream before ``stop``, of one before ``start``: the layers between them, and no more."""
        copies = len(stream) // self._n_prompts
        blocks = zip(self._model.blocks, self._arguments, strict=True)
        for block, arguments in list(blocks)[start:stop]:
            out = block(stream, **{name: self._repeat(x, copies) for name, x in arguments.items()})
            stream = out[0] if isinstance(out, tuple) else out
        return stream

    def _repeat(self, value: Any, copies: int) -> Any:
        """One row per row of the stream; what is the same for all prompts stays one row."""
        if isinstance(value, tuple):
            return tuple(self._repeat(each, copies) for each in value)
        by_prompt = isinstance(value, torch.Tensor) and value.shape[:1] == (self._n_prompts,)
        if not by_prompt or self._n_prompts == 1:
            return value
        return value.repeat(copies, *[1] * (value.ndim - 1))

    def _record(self, tokens: torch.Tensor, layers: set[int]) -> None:
        modules = [*self._model.blocks, self._model.ln_final]

        def keep(layer: int) -> Any:
            def hook_fn(module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if layer in layers:
                    self._streams[layer] = args[0].detach()
                if layer < n_layers(self._model):
                    self._arguments.append({k: v for k, v in kwargs.items() if k not in _CACHES})

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
