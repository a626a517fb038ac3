"""Encode and decode of a Tree SAE on plain tensors (arXiv 2605.07922): the parent gates the child.

1. Standardise each token: ``x' = (x - mean) / (std + 1e-5)``, ``std`` unbiased, over ``d_in``.
2. ``z = (x' - b_dec) @ W_enc``; there is no encoder bias.
3. Layer by layer: keep ``z`` where the parent's activation exceeds 1e-3 (always below the root), of
   these the ``k_l`` largest, and of these the positive ones; in a layer with thresholds those above
   them.  A parent's activation is already gated, so every active feature has active ancestors up to
   the root ("activation coverage", equation 6).
4. ``x_hat = (f @ W_dec + b_dec) * std + mean``.

An edit of one feature needs the whole encode: what a feature is depends on its ancestors and, under
TopK, on all features of its layer.  Edits change the features that they name and no others: children
are gated by the parent that was encoded, not by the edited one.  Who wants the gates to follow changes
``hook_sae_acts_pre``, from which gates and top-k are computed.

Cost: that of a dense SAE; the gates add one gather a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from typing_extensions import override

from gemmascope_plugin.saes.jumprelu import jump
from gemmascope_plugin.saes.token_units import TokenUnits
from gemmascope_plugin.saes.tree_config import Layer
from gemmascope_plugin.saes.tree_links import ROOT
from gemmascope_plugin.saes.whole_encode import WholeEncode

GATE = 1e-3
"""A gate is open where the parent's activation exceeds this."""

Jump = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Pre-activations and thresholds of a layer to its activations."""


def open_gates(
    earlier: Float[torch.Tensor, "*tokens n_earlier"], parent: Int[torch.Tensor, " n_layer"]
) -> Bool[torch.Tensor, "*tokens n_layer"]:
    """Where the features of a layer may fire.

    Args:
        earlier: Activations of all earlier layers, which are final.
        parent: Parents of the layer's features.
    """
    return (parent == ROOT) | (earlier[..., parent.clamp(min=0)] > GATE)


def activate(
    pre: Float[torch.Tensor, "*tokens d_sae"],
    parent: Int[torch.Tensor, " d_sae"],
    layers: Sequence[Layer],
    *,
    threshold: Float[torch.Tensor, " d_sae"] | None,
    coverage: bool = True,
    jump: Jump = jump,
) -> Float[torch.Tensor, "*tokens d_sae"]:
    """Activations, gated from the root down; gradient 1 where active.

    Args:
        pre: Pre-activations ``z``.
        parent: Parent of each feature.
        layers: The privilege layers.
        threshold: Needed by layers without ``k``.
        coverage: Whether parents gate.
        jump: The activation of layers with thresholds.

    Returns:
        In a layer with ``k`` at most ``k`` active features a token.
    """
    done: list[torch.Tensor] = []
    for start, stop, k in layers:
        own = pre[..., start:stop]
        if coverage and start:
            own = own * open_gates(torch.cat(done, dim=-1), parent[start:stop])
        if k is None:
            assert threshold is not None, "a layer without k has thresholds"
            done.append(jump(own, threshold[start:stop]))
        else:
            best = own.topk(k, dim=-1)
            done.append(torch.zeros_like(own).scatter(-1, best.indices, best.values.relu()))
    return torch.cat(done, dim=-1)


@dataclass(frozen=True, eq=False)
class TreeCoder(TokenUnits, WholeEncode):
    """The tensors of a Tree SAE, whole or cut to its first layers; views of the dictionary."""

    what = "tree"

    W_enc: Float[torch.Tensor, "d_in d_sae"]
    W_dec: Float[torch.Tensor, "d_sae d_in"]
    b_dec: Float[torch.Tensor, " d_in"]
    parent: Int[torch.Tensor, " d_sae"]
    threshold: Float[torch.Tensor, " d_sae"] | None
    layers: tuple[Layer, ...]
    coverage: bool
    standardize: bool
    subtract_b_dec: bool

    @property
    @override
    def d_sae(self) -> int:
        """Number of features."""
        return self.W_enc.shape[1]

    @override
    def pre_activations(
        self, x: Float[torch.Tensor, "*tokens d_in"]
    ) -> Float[torch.Tensor, "*tokens d_sae"]:
        """``(x' - b_dec) @ W_enc``, before gates and sparsity."""
        return self.seen(x) @ self.W_enc

    @override
    def activate(
        self,
        pre: Float[torch.Tensor, "*tokens d_sae"],
        x: Float[torch.Tensor, "*tokens d_in"],
    ) -> Float[torch.Tensor, "*tokens d_sae"]:
        """Gates and sparsity of all layers."""
        return activate(
            pre, self.parent, self.layers, threshold=self.threshold, coverage=self.coverage
        )
