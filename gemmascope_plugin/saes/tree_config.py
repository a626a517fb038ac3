"""Shapes, sparsity and parents of a Tree SAE (arXiv 2605.07922), as SAELens keeps configs.

1. Features are split into privilege layers; features of layers >= 1 have a parent in an earlier one.
2. Each layer keeps its ``k`` largest open pre-activations (TopK), or, where ``k`` is None, those above
   a threshold of their own (JumpReLU, arXiv 2407.14435).
3. Standardising each token is what SAELens calls ``normalize_activations="layer_norm"``: the same mean,
   the same unbiased deviation, the same 1e-5.  The bias that is taken off before the encoder is
   SAELens' ``apply_b_dec_to_input``.
4. A tree is a tensor ``parent [d_sae]``: the parent of each feature, or ``ROOT`` for features that
   nothing gates.  A parent lies in an earlier layer than its child.  So there are no cycles, every line
   of ancestors ends at the root, and one sweep over the layers computes all gates.

Everything is checked when the config is made, and when parents are loaded or saved; ``from_dict`` refuses
keys that it does not know.

Cost: a look-up reads ``parent`` once; ``to_frame`` once a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Float32, Int
from sae_lens.saes.sae import SAEConfig, SAEMetadata
from typing_extensions import override

from gemmascope_plugin.errors import ModelError, WidthMismatchError, check_choice, check_feature
from gemmascope_plugin.saes.registration import StrictConfig

if TYPE_CHECKING:
    import pandas as pd

Config = TypeVar("Config", bound="TreeSAEConfig")


class Layer(NamedTuple):
    """One privilege layer."""

    start: int
    """Its first feature."""
    stop: int
    """The first feature after it."""
    k: int | None
    """Most active features a token; None where each has a threshold."""


@dataclass
class TreeSAEConfig(StrictConfig, SAEConfig):
    """Shapes, sparsity and site of a Tree SAE.

    Raises:
        ModelError: Layers without features, ``k`` larger than its layer, sizes that do not add up to
            ``d_sae``, or a normalisation that Tree SAEs do not have.
        UnknownNameError: There is no such gate.
    """

    normalize_activations: Literal[
        "none", "expected_average_only_in", "layer_norm", "covariance_whitening"
    ] = "layer_norm"
    """``"layer_norm"`` brings each token to mean 0 and deviation 1; ``"none"`` leaves it."""
    metadata: Any = field(default_factory=SAEMetadata)
    """``SAEMetadata``; SAELens' ``from_dict`` hands over a dict."""
    features_per_layer: Sequence[int] = ()
    """A tuple once the config is made; JSON has lists."""
    k_per_layer: Sequence[int | None] = ()
    """Most active features of each layer; None for a layer with thresholds."""
    gate: Literal["coverage", "none"] = "coverage"
    """``"coverage"``: a feature may fire only where its parent does; ``"none"``: parents are a record."""

    @classmethod
    @override
    def architecture(cls) -> str:
        """``"tree"``."""
        return "tree"

    @override
    def __post_init__(self) -> None:
        if isinstance(self.metadata, dict):
            self.metadata = SAEMetadata(**self.metadata)
        self.features_per_layer = tuple(self.features_per_layer)
        self.k_per_layer = tuple(self.k_per_layer)
        check_choice("gate", self.gate, ("coverage", "none"))
        if self.normalize_activations not in ("layer_norm", "none"):
            raise ModelError(
                f"A Tree SAE has normalize_activations={self.normalize_activations!r}",
                exists="'layer_norm' (standardise each token) and 'none'",
            )
        _check_layers(self.features_per_layer, self.k_per_layer, self.d_sae)
        super().__post_init__()

    @property
    def bounds(self) -> tuple[int, ...]:
        """First feature of each layer, and the number of features: one entry more than layers."""
        return (0, *accumulate(self.features_per_layer))

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The privilege layers, coarsest first."""
        spans = zip(self.bounds[:-1], self.bounds[1:], self.k_per_layer, strict=True)
        return tuple(Layer(*span) for span in spans)

    @property
    def has_thresholds(self) -> bool:
        """Whether any layer fires by thresholds."""
        return None in self.k_per_layer

    @property
    def standardize(self) -> bool:
        """Whether each token is brought to mean 0 and deviation 1 first."""
        return self.normalize_activations == "layer_norm"

    @property
    def hook_name(self) -> str:
        """The site, from the metadata; empty where it is unknown."""
        return self.metadata.hook_name or ""


def _check_layers(sizes: Sequence[int], ks: Sequence[int | None], d_sae: int) -> None:
    """Every layer has features, a possible ``k``, and together they are the dictionary."""
    if not sizes or any(not _is_count(size) for size in sizes):
        raise ModelError(
            f"features_per_layer={tuple(sizes)} is not a positive number of features for each layer",
            fix="features_per_layer=(1536, 4608) for two layers",
        )
    if len(ks) != len(sizes):
        raise ModelError(f"{len(sizes)} layers of features and {len(ks)} values of k")
    for layer, (size, k) in enumerate(zip(sizes, ks, strict=True)):
        if k is not None and not (_is_count(k) and k <= size):
            raise ModelError(
                f"layer {layer} has {size} features and k = {k!r}",
                exists=f"1 to {size}, or None for thresholds",
            )
    if sum(sizes) != d_sae:
        raise ModelError(
            f"layers of {tuple(sizes)} features are {sum(sizes)}, but d_sae is {d_sae}"
        )


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0


ROOT = -1
"""Parent of features that no other feature gates."""
_SHIFTS = (0, 8, 16, 24)


def check_parents(parent: torch.Tensor, layers: Sequence[Layer]) -> None:
    """Refuses what is not a tree: parents that do not exist, or are not in an earlier layer."""
    d_sae = layers[-1].stop
    if tuple(parent.shape) != (d_sae,):
        raise WidthMismatchError(
            f"parent has shape {list(parent.shape)}, the tree has {d_sae} features",
            fix=f"one parent for each feature, {ROOT} for the root",
        )
    if parent.is_floating_point() or parent.is_complex() or parent.dtype == torch.bool:
        raise ModelError(f"parent has type {parent.dtype}", exists="integers", fix="parent.long()")
    for number, layer in enumerate(layers):
        parents = parent[layer.start : layer.stop]
        wrong = (parents < ROOT) | (parents >= layer.start)
        if bool(wrong.any()):
            child = layer.start + int(wrong.nonzero()[0, 0])
            above = int(parent[child])
            exists = ROOT <= above < d_sae
            raise ModelError(
                f"feature {child} of layer {number} has parent {above}, which "
                + ("is in no earlier layer" if exists else "does not exist"),
                exists=f"features 0 to {layer.start - 1} of earlier layers, and {ROOT} for the root"
                if layer.start
                else f"{ROOT} for the root, in the first layer",
            )


def to_digits(parent: Int[torch.Tensor, " d_sae"]) -> Float32[torch.Tensor, "d_sae 4"]:
    """``parent + 1`` in base 256, which is exact in every floating type.

    SAELens casts all tensors of a file to the type of the dictionary: as bfloat16 the parent 1001 would
    come back as 1000, without a word.
    """
    return torch.stack([(parent + 1) >> shift & 255 for shift in _SHIFTS], dim=1).float()


def from_digits(digits: Float[torch.Tensor, "d_sae 4"]) -> Int[torch.Tensor, " d_sae"]:
    """What ``to_digits`` was given, of digits in any type."""
    parts = [digits[:, place].long() << shift for place, shift in enumerate(_SHIFTS)]
    return torch.stack(parts).sum(0) + ROOT


class TreeLinks(Generic[Config]):
    """Look-ups for a class with ``cfg`` and ``parent``."""

    cfg: Config
    parent: torch.Tensor
    """Parent of each feature, ``[d_sae]``, ``ROOT`` for the root."""

    def parent_of(self, feature: int) -> int:
        """The parent of a feature, ``-1`` for the root."""
        check_feature(feature, self.cfg.d_sae, self.cfg.hook_name)
        return int(self.parent[feature])

    def children_of(self, feature: int) -> list[int]:
        """The features that a feature gates, ascending; of ``-1`` those that nothing gates."""
        if feature != ROOT:
            check_feature(feature, self.cfg.d_sae, self.cfg.hook_name)
        return (self.parent == feature).nonzero()[:, 0].tolist()

    def ancestors(self, feature: int) -> list[int]:
        """Parent, grandparent and so on of a feature, up to but without the root."""
        line: list[int] = []
        above = self.parent_of(feature)
        while above != ROOT:
            line.append(above)
            above = int(self.parent[above])
        return line

    def edges(self) -> Int[torch.Tensor, "n_edges 2"]:
        """All pairs ``(parent, child)`` without those of the root, by child; a graph's edge list."""
        child = (self.parent != ROOT).nonzero()[:, 0]
        return torch.stack([self.parent[child], child], dim=1)

    def to_frame(self) -> pd.DataFrame:
        """One row a feature: ``feature, layer, parent, depth, n_children``; depth 0 under the root."""
        import pandas as pd

        parent = self.parent.cpu()
        layer = torch.zeros_like(parent)
        depth = torch.zeros_like(parent)
        for number, (start, stop, _) in enumerate(self.cfg.layers):
            above = parent[start:stop]
            layer[start:stop] = number
            depth[start:stop] = torch.where(above == ROOT, 0, depth[above.clamp(min=0)] + 1)
        n_children = torch.bincount(parent[parent != ROOT], minlength=len(parent))
        columns = {"layer": layer, "parent": parent, "depth": depth, "n_children": n_children}
        frame = {"feature": range(len(parent)), **{n: v.numpy() for n, v in columns.items()}}
        return pd.DataFrame(frame)
