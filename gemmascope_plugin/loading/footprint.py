"""How much memory will it take?  An estimate before anything is loaded.

1. The model: the parameters that it has, or for a name those of its published dimensions, with the
   unembedding counted once more because TransformerLens keeps it apart from the embedding.
2. The dictionaries: their parameters.
3. Activations of a forward pass of ``n_tokens``: at each dictionary the tensor read and written
   (one pair per layer), pre-activations and features, dense; and the logits, which outweigh the
   rest of a Gemma model.

Weights on the CPU in float32 are memory-mapped: they need that much only once all are in use.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from gemmascope_plugin.arguments import as_dtype, as_index, human_size
from gemmascope_plugin.catalog import SaeSpec
from gemmascope_plugin.catalog.tables import resolve_model
from gemmascope_plugin.errors import InputError, UnknownNameError, nearest, number_of, shorten
from gemmascope_plugin.loading.sae_suite import as_specs


@dataclass(frozen=True)
class Dimensions:
    """What the number of a Gemma model's parameters follows from."""

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int

    @property
    def n_parameters(self) -> int:
        """Embedding, blocks and final norm, the embedding once."""
        attention = 2 * self.d_model * self.d_head * (self.n_heads + self.n_kv_heads)
        block = attention + 3 * self.d_model * self.d_mlp + 4 * self.d_model
        return (self.d_vocab + 1) * self.d_model + self.n_layers * block


MODELS = {
    "gemma-2-2b": Dimensions(26, 2304, 8, 4, 256, 9216, 256_000),
    "gemma-2-9b": Dimensions(42, 3584, 16, 8, 256, 14336, 256_000),
    "gemma-2-27b": Dimensions(46, 4608, 32, 16, 128, 36864, 256_000),
    "gemma-3-270m": Dimensions(18, 640, 4, 1, 256, 2048, 262_144),
    "gemma-3-1b": Dimensions(26, 1152, 4, 1, 256, 6912, 262_144),
    "gemma-3-4b": Dimensions(34, 2560, 8, 4, 256, 10240, 262_144),
    "gemma-3-12b": Dimensions(48, 3840, 16, 8, 256, 15360, 262_144),
    "gemma-3-27b": Dimensions(62, 5376, 32, 16, 128, 21504, 262_144),
}
"""The text models; Gemma 3 from 4B on has a vision part besides."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes by what needs them."""

    model: int
    dictionaries: int
    activations: int
    logits: int
    n_dictionaries: int
    n_tokens: int
    dtype: torch.dtype

    @property
    def total(self) -> int:
        """All together."""
        return self.model + self.dictionaries + self.activations + self.logits

    def __repr__(self) -> str:
        rows = (
            ("model", self.model),
            (number_of(self.n_dictionaries, "dictionary"), self.dictionaries),
            (f"features and hooks of {number_of(self.n_tokens, 'token')}", self.activations),
            ("logits", self.logits),
            ("total", self.total),
        )
        width = max(len(name) for name, _ in rows)
        lines = [f"  {name:<{width}}  {human_size(size):>10}" for name, size in rows]
        return "\n".join([f"Footprint in {str(self.dtype).removeprefix('torch.')}", *lines])


def footprint(
    model: Any,
    specs: Iterable[SaeSpec] | SaeSpec,
    dtype: str | torch.dtype = "float32",
    n_tokens: int = 1024,
) -> Footprint:
    """Memory that a model with dictionaries will take, estimated.

    Args:
        model: A name such as ``gemma-2-2b``, a loaded model, or None for the dictionaries alone.
        specs: One or several dictionaries.
        dtype: Type, or its name, of all weights and activations that are not loaded yet.
        n_tokens: Tokens of one forward pass, batch and positions together.

    Returns:
        The estimate by part.

    Raises:
        UnknownNameError: A name that is not a Gemma model.
        InputError: Something that is neither a model nor specs.

    Example:
        >>> suite = gs.tiny()
        >>> gs.footprint(suite.model, suite.specs[:2], n_tokens=128)
        Footprint in float32
          model                                 3.6 MB
          2 dictionaries                        1.1 MB
          features and hooks of 128 tokens      1.3 MB
          logits                              236.5 kB
          total                                 6.2 MB
    """
    listed_specs, n_tokens = as_specs(specs), _tokens(n_tokens)
    dtype = as_dtype(dtype)
    size = dtype.itemsize
    weights, vocabulary = _model(model, size)
    acts = sum(2 * s.d_sae + len(s.all_layers) * (s.d_in + s.d_out) for s in listed_specs)
    return Footprint(
        model=weights,
        dictionaries=sum(s.nbytes // 4 * size for s in listed_specs),
        activations=n_tokens * acts * size,
        # Logits are computed or compared in float32 wherever a loss is taken.
        logits=n_tokens * vocabulary * max(4, size),
        n_dictionaries=len(listed_specs),
        n_tokens=n_tokens,
        dtype=dtype,
    )


def _tokens(n: object) -> int:
    number = as_index(n)
    if number is None or number < 0:
        raise InputError(f"n_tokens={n!r} is not a number of tokens", fix="n_tokens=1024")
    return number


def _model(model: Any, size: int) -> tuple[int, int]:
    """Bytes of the weights, and the number of logits per token."""
    if model is None:
        return 0, 0
    if isinstance(model, str):
        word = model.lower().rpartition("/")[2].removesuffix("-it").removesuffix("-pt")
        name = resolve_model(word, MODELS)
        if name is None:
            raise UnknownNameError(
                f"no model {model!r}", exists=shorten(MODELS), nearest=nearest(word, MODELS)
            )
        sizes = MODELS[name]
        return (sizes.n_parameters + sizes.d_vocab * sizes.d_model) * size, sizes.d_vocab
    if not isinstance(model, torch.nn.Module):
        raise InputError(
            f"A {type(model).__name__} is not a model",
            exists="a model, its name, or None for dictionaries alone",
            fix="footprint(model, specs)",
        )
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return weights, int(getattr(model.cfg, "d_vocab", 0))
