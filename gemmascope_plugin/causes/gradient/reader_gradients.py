"""Gradients at the input of every reader: what one more unit of the stream there does to the metric.

1. One backward pass gives the gradients at queries, keys and values, at the normalised input of each
   MLP and at the last residual stream.
2. They are pulled back to what the reader reads, the stream before its norm:
   ``g_q[h] = J_ln1(x)^T (W_Q[h] dm/dq_h)``, keys and values likewise per **key-value** head; an MLP's
   through its norm where the hook lies behind it.

No gate of the model has to be switched for that, it is the same on both model classes and in every
folding, and ``d_head`` numbers per head are kept instead of ``d_model``.  A key-value head's gradient is
the sum over the query heads that share it.

Where prompts can be run again late (``models/replay.py``), both passes begin at the site whose line is
followed, and at the first position that differs: what lies before has no edge to score.

Cost: one forward and one backward pass; ``readers of a layer * d_model`` numbers per token asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float

from gemmascope_plugin.causes.components import layer_of
from gemmascope_plugin.causes.gradient.slopes import EMBED, late_slopes
from gemmascope_plugin.causes.nodes import Runner
from gemmascope_plugin.causes.replayed import Part
from gemmascope_plugin.causes.writes import Writes
from gemmascope_plugin.models.anatomy import Anatomy
from gemmascope_plugin.models.gradients import gradients_of
from gemmascope_plugin.models.protocol import wide
from gemmascope_plugin.models.record import keeping

_PORTS = ("q", "k", "v")


@dataclass(frozen=True)
class ReaderGradients:
    """Activations and gradients of one run, as far as readers are concerned."""

    anatomy: Anatomy
    cache: dict[str, torch.Tensor]
    """Activations: the stream before each half layer, and what the writers wrote."""
    slopes: dict[str, torch.Tensor]
    """Gradients of the summed metric."""

    @property
    def writes(self) -> Writes:
        """What the writers wrote in this run."""
        return Writes.of(self.cache, self.anatomy.n_layers)

    def split(self, rows: int) -> list[ReaderGradients]:
        """The runs of copies of the prompts, copy after copy, one by one."""
        n_copies = len(next(iter(self.slopes.values()))) // rows
        parts = [
            [
                {name: value.split(rows)[i] for name, value in values.items()}
                for i in range(n_copies)
            ]
            for values in (self.cache, self.slopes)
        ]
        pairs = zip(*parts, strict=True)
        return [ReaderGradients(self.anatomy, cache, slopes) for cache, slopes in pairs]

    def of_heads(self, layer: int, tokens: slice) -> Float[torch.Tensor, "token reader d_model"]:
        """Gradients at the queries, keys and values of a layer, in the order of ``EdgeMap``."""
        name = f"blocks.{layer}."
        pre = self._at(self.cache, f"{name}hook_resid_pre", tokens)
        ln1 = self.anatomy.norm(layer, "ln1")
        assert ln1 is not None, "models without it are refused"
        weights = (self.anatomy.W_Q(layer), self.anatomy.W_K(layer), self.anatomy.W_V(layer))
        pulled = [
            torch.einsum(
                "thd,hmd->thm", self._at(self.slopes, f"{name}attn.hook_{port}", tokens), weight
            )
            for port, weight in zip(_PORTS, weights, strict=True)
        ]
        return ln1.vjp(pre[:, None], torch.cat(pulled, 1))

    def of_mlp(self, layer: int, tokens: slice) -> Float[torch.Tensor, "token 1 d_model"]:
        """Gradient at the input of an MLP."""
        mlp_input = self.anatomy.mlp_input(layer)
        mid = self._at(self.cache, f"blocks.{layer}.hook_resid_mid", tokens)
        return mlp_input.pulled(mid, self._at(self.slopes, mlp_input.hook, tokens))[:, None]

    def of_logits(self, tokens: slice) -> Float[torch.Tensor, "token 1 d_model"]:
        """Gradient at the end of the stream."""
        last = f"blocks.{self.anatomy.n_layers - 1}.hook_resid_post"
        return self._at(self.slopes, last, tokens)[:, None]

    @staticmethod
    def _at(
        values: dict[str, torch.Tensor], name: str, tokens: slice
    ) -> Float[torch.Tensor, "token ..."]:
        return wide(values[name].flatten(0, 1)[tokens])


def read_gradients(
    anatomy: Anatomy,
    runner: Runner,
    run: Callable[[], Float[torch.Tensor, " row"]],
    fwd_hooks: Sequence[tuple[str, Callable[..., Any]]] = (),
) -> ReaderGradients:
    """One forward and one backward pass; ``run`` gives the metric of each row."""
    hooks, streams = _behind(anatomy, EMBED)
    cache: dict[str, torch.Tensor] = {}

    reads = keeping(cache, [*streams, *Writes.hooks(anatomy.n_layers)])
    slopes = gradients_of(runner, lambda: run().sum(), hooks, fwd_hooks=[*fwd_hooks, *reads])
    return ReaderGradients(anatomy, cache, slopes)


def late_gradients(
    anatomy: Anatomy,
    part: Part,
    window: slice,
    hook: str,
    start: Float[torch.Tensor, "row pos ..."],
) -> ReaderGradients:
    """The same of readers behind a hook, from a value there on; of positions that are run again.

    ``hook`` is that of the embedding, or where a writer's activation is.
    """
    hooks, streams = _behind(anatomy, hook)
    writes = Writes.hooks(anatomy.n_layers) if hook == EMBED else []
    acts, slopes = late_slopes(part, window, hook, start, hooks, [*streams, *writes])
    return ReaderGradients(anatomy, acts, slopes)


def _behind(anatomy: Anatomy, hook: str) -> tuple[list[str], list[str]]:
    """Where readers behind a hook have their gradients, and the streams that they read."""
    n, first = anatomy.n_layers, 0 if hook == EMBED else layer_of(hook) + 1
    layers = range(first, n)
    mlps = range(first - hook.endswith("hook_z"), n)  # that of the same layer reads heads
    inputs = [f"blocks.{layer}.attn.hook_{port}" for layer in layers for port in _PORTS]
    inputs += [anatomy.mlp_input(layer).hook for layer in mlps]
    streams = [f"blocks.{layer}.hook_resid_pre" for layer in layers]
    streams += [f"blocks.{layer}.hook_resid_mid" for layer in mlps]
    return [*inputs, f"blocks.{n - 1}.hook_resid_post"], streams
