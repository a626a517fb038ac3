"""Shapes and sparsity of a Tree SAE (arXiv 2605.07922), as SAELens keeps configs.

1. Features are split into privilege layers; features of layers >= 1 have a parent in an earlier one.
2. Each layer keeps its ``k`` largest open pre-activations (TopK), or, where ``k`` is None, those above
   a threshold of their own (JumpReLU, arXiv 2407.14435).
3. Standardising each token is what SAELens calls ``normalize_activations="layer_norm"``: the same mean,
   the same unbiased deviation, the same 1e-5.  The bias that is taken off before the encoder is
   SAELens' ``apply_b_dec_to_input``.

Everything is checked when the config is made; ``from_dict`` refuses keys that it does not know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal, NamedTuple, TypeVar

from sae_lens.saes.sae import SAEConfig, SAEMetadata
from typing_extensions import override

from gemmascope_plugin.errors import ModelError, check_choice
from gemmascope_plugin.saes.registration import StrictConfig

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
