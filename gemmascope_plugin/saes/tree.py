"""Tree SAE, inference (arXiv 2605.07922): a feature may fire only where its parent fires.

Features are split into privilege layers ``0..L-1``; each feature of layers >= 1 has one parent in an
earlier layer, or the root, which is always active.

1. Standardise each token: ``x' = (x - mean) / (std + 1e-5)``, ``std`` unbiased, over ``d_in``.
2. ``z = (x' - b_dec) @ W_enc``; there is no encoder bias.
3. Layer by layer: keep ``z`` where the parent's activation exceeds 1e-3 (always below the root), of
   these the ``k_l`` largest, and of these the positive ones.  A parent's activation is already gated,
   so every active feature has active ancestors up to the root ("activation coverage").
4. ``x_hat = (f @ W_dec + b_dec) * std + mean``; ``decode_prefix`` uses the first layers only.

Cost: that of a dense SAE; the gates add one gather per layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float, Int

from gemmascope_plugin.errors import ModelError, UnknownNameError, WidthMismatchError

EPS = 1e-5
GATE = 1e-3
ROOT = -1
"""Parent of features that no other feature gates."""


@dataclass(frozen=True, kw_only=True)
class TreeSAEConfig:
    """Shapes, sparsity and site of a Tree SAE."""

    d_in: int
    features_per_layer: tuple[int, ...]
    k_per_layer: tuple[int, ...]
    hook_name: str
    standardize: bool = True
    """Whether each token is brought to mean 0 and deviation 1 first."""
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return sum(self.features_per_layer)

    @property
    def bounds(self) -> tuple[int, ...]:
        """First feature of each layer, and the number of features: one entry more than layers."""
        return (0, *accumulate(self.features_per_layer))

    def architecture(self) -> str:
        """``"tree"``."""
        return "tree"


class TreeSAE(torch.nn.Module):
    """A dictionary whose features form a forest.

    Args:
        cfg: Shapes and sparsity.
        W_enc: Encoder.
        W_dec: Decoder; rows are nearly, not exactly, of unit norm in the published files.
        b_dec: Bias of both encoder and decoder.
        parent: Parent of each feature, ``-1`` for the root.

    Raises:
        ModelError: A parent does not lie in an earlier layer than its child.
        WidthMismatchError: Shapes disagree with the config.
    """

    parent: torch.Tensor

    def __init__(
        self,
        cfg: TreeSAEConfig,
        *,
        W_enc: Float[torch.Tensor, "d_in d_sae"],
        W_dec: Float[torch.Tensor, "d_sae d_in"],
        b_dec: Float[torch.Tensor, " d_in"],
        parent: Int[torch.Tensor, " d_sae"],
    ) -> None:
        super().__init__()
        self.cfg = cfg
        if tuple(W_enc.shape) != (cfg.d_in, cfg.d_sae):
            raise WidthMismatchError(
                f"W_enc has shape {list(W_enc.shape)}, the config says {[cfg.d_in, cfg.d_sae]}"
            )
        if len(cfg.k_per_layer) != len(cfg.features_per_layer):
            raise ModelError(
                f"{len(cfg.features_per_layer)} layers of features and {len(cfg.k_per_layer)} "
                "values of k"
            )
        _check_parents(cfg, parent)
        self.W_enc = torch.nn.Parameter(W_enc, requires_grad=False)
        self.W_dec = torch.nn.Parameter(W_dec, requires_grad=False)
        self.b_dec = torch.nn.Parameter(b_dec, requires_grad=False)
        self.register_buffer("parent", parent)

    def standardise(
        self, x: Float[torch.Tensor, "*tokens d_in"]
    ) -> tuple[
        Float[torch.Tensor, "*tokens d_in"],
        Float[torch.Tensor, "*tokens 1"],
        Float[torch.Tensor, "*tokens 1"],
    ]:
        """The standardised tokens, their means and their deviations.

        Args:
            x: Tokens at ``cfg.hook_name``.

        Returns:
            ``x', mean, std``; zeros and ones where the dictionary does not standardise.

        Raises:
            WidthMismatchError: ``x`` has another width than the dictionary.
        """
        if x.shape[-1] != self.cfg.d_in:
            raise WidthMismatchError(
                f"the dictionary for {self.cfg.hook_name} has width {self.cfg.d_in}, the tensor "
                f"has {x.shape[-1]}"
            )
        x = x.to(self.W_enc.dtype)
        if not self.cfg.standardize:
            return x, torch.zeros_like(x[..., :1]), torch.ones_like(x[..., :1])
        mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        return (x - mean) / (std + EPS), mean, std

    def encode(
        self, x: Float[torch.Tensor, "*tokens d_in"]
    ) -> Float[torch.Tensor, "*tokens d_sae"]:
        """Activations, gated from the root down.

        Args:
            x: Tokens at ``cfg.hook_name``.

        Returns:
            At most ``sum(cfg.k_per_layer)`` active features per token.
        """
        pre = (self.standardise(x)[0] - self.b_dec) @ self.W_enc
        acts = torch.zeros_like(pre)
        for layer, k in enumerate(self.cfg.k_per_layer):
            start, stop = self.cfg.bounds[layer], self.cfg.bounds[layer + 1]
            parent = self.parent[start:stop]
            # The gate reads activations of earlier layers only, which are final by now.
            open_gate = (parent == ROOT) | (acts[..., parent.clamp(min=0)] > GATE)
            gated = pre[..., start:stop] * open_gate
            best = gated.topk(min(k, stop - start), dim=-1)
            own = torch.zeros_like(gated).scatter(-1, best.indices, best.values.relu())
            acts = torch.cat([acts[..., :start], own, acts[..., stop:]], dim=-1)
        return acts

    def decode(
        self,
        acts: Float[torch.Tensor, "*tokens d_sae"],
        like: Float[torch.Tensor, "*tokens d_in"],
        *,
        layers: int | None = None,
    ) -> Float[torch.Tensor, "*tokens d_in"]:
        """The reconstruction in the units of the model.

        Args:
            acts: Activations, edited or not.
            like: The tokens that were encoded; their mean and deviation are put back.
            layers: Number of privilege layers to use; all when None.

        Returns:
            ``x_hat``.

        Raises:
            UnknownNameError: There are not that many layers.
        """
        n_layers = len(self.cfg.features_per_layer)
        if layers is not None and not 1 <= layers <= n_layers:
            raise UnknownNameError(f"no prefix of {layers} layers", exists=f"1 to {n_layers}")
        stop = self.cfg.bounds[n_layers if layers is None else layers]
        _, mean, std = self.standardise(like)
        return (acts[..., :stop] @ self.W_dec[:stop] + self.b_dec) * std + mean

    def forward(
        self, x: Float[torch.Tensor, "*tokens d_in"]
    ) -> Float[torch.Tensor, "*tokens d_in"]:
        """``decode(encode(x), x)``."""
        return self.decode(self.encode(x), x)

    def ancestors(self, feature: int) -> Sequence[int]:
        """Parent, grandparent and so on of a feature, up to but without the root."""
        line: list[int] = []
        above = int(self.parent[feature])
        while above != ROOT:
            line.append(above)
            above = int(self.parent[above])
        return line

    def extra_repr(self) -> str:
        """Site, shape and sparsity."""
        return (
            f"{self.cfg.hook_name}, d_in={self.cfg.d_in}, layers="
            f"{list(self.cfg.features_per_layer)}, k={list(self.cfg.k_per_layer)}"
        )


def _check_parents(cfg: TreeSAEConfig, parent: Int[torch.Tensor, " d_sae"]) -> None:
    """Each parent is the root or lies in an earlier layer, hence there are no cycles."""
    for layer, (start, stop) in enumerate(zip(cfg.bounds[:-1], cfg.bounds[1:], strict=True)):
        own = parent[start:stop]
        wrong = (own < ROOT) | (own >= start)
        if bool(wrong.any()):
            child = start + int(wrong.nonzero()[0, 0])
            raise ModelError(
                f"feature {child} of layer {layer} has parent {int(parent[child])}",
                exists=f"features 0 to {start - 1} of earlier layers, and {ROOT} for the root",
            )
