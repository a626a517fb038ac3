"""What a crosscoder or cross-layer transcoder is, as SAELens keeps configs.

1. ``d_in``, ``d_out`` and ``d_sae`` are those of all layers together, in equal parts.
2. Layers increase, and each has one hook that is read and one that is written.

Everything is checked when the config is made; ``from_dict`` refuses keys that it does not know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

from sae_lens.saes.sae import SAEConfig, SAEMetadata
from typing_extensions import override

from gemmascope_plugin.errors import ModelError
from gemmascope_plugin.saes.registration import StrictConfig


@dataclass(kw_only=True)
class CrossLayerSAEConfig(StrictConfig, SAEConfig):
    """SAELens' config with layers; ``d_in`` and ``d_out`` are widths of all layers together.

    Raises:
        ModelError: Layers that do not increase, hooks that are not one per layer, sizes that the number
            of layers does not divide, or something left to fold or to reshape.
    """

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
