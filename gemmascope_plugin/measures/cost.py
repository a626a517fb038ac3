"""What a dictionary costs at inference: parameters, bytes, multiply-adds, and seconds measured.

1. Parameters are those of the dictionary, or of its level; bytes have its buffers too (the parents of a
   Tree SAE).
2. Multiply-adds per token, of matrix products alone: a full encode makes ``d_in * d_sae``, and those of
   the budget network if there is one; a decode at the measured L0 makes ``L0 * d_out``, and ``d_in *
   d_out`` for an affine skip. Sorting, gates and norms are not counted.
3. Seconds per 1,000 tokens on the machine at hand, the median of ``repeats`` runs after one that does
   not count: ``encode`` of all features, dense; and ``round trip``, sparse encode and sparse decode, as a
   splice makes it. They differ from run to run; compare them within one run only.

Cost: a forward pass over documents of ``n_tokens`` tokens, and ``2 * (repeats + 1)`` encodes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from jaxtyping import Float
from typing_extensions import override

import gemmascope_plugin.saes as saes
from gemmascope_plugin.errors import ModelError
from gemmascope_plugin.features.stream import Corpus, Tokens, corpus, hooked_for, site_tensors
from gemmascope_plugin.measures.measure_results import Measured, subject
from gemmascope_plugin.models.gate import gate
from gemmascope_plugin.models.protocol import HookedModel, check_model
from gemmascope_plugin.saes import Coder
from gemmascope_plugin.splice import HookedSAE
from gemmascope_plugin.splice.hooked_sae import check_sae
from gemmascope_plugin.types import SAE


@dataclass(frozen=True, eq=False, kw_only=True)
class Cost(Measured):
    """What one dictionary costs; ``n_tokens`` are those that were timed."""

    noun = "cost"

    l0: float
    """Mean number of active features of these tokens."""
    n_parameters: int
    nbytes: int
    encode_madds: int
    """Multiply-adds per token of a full encode."""
    decode_madds: float
    """Multiply-adds per token of a sparse decode at ``l0``."""
    encode_seconds: float
    """Seconds per 1,000 tokens of a full dense encode."""
    round_trip_seconds: float
    """Seconds per 1,000 tokens of a sparse encode and decode."""

    @override
    def row(self) -> dict[str, Any]:
        """Every figure by name."""
        return {**self._what(), "l0": self.l0, **self.costs()}

    def costs(self) -> dict[str, Any]:
        """The figures of this measure alone."""
        return {
            "n_parameters": self.n_parameters,
            "nbytes": self.nbytes,
            "encode_madds": self.encode_madds,
            "decode_madds": self.decode_madds,
            "encode_seconds": self.encode_seconds,
            "round_trip_seconds": self.round_trip_seconds,
        }

    def __repr__(self) -> str:
        return (
            f"Cost({self._head()}: {self.n_parameters:,} parameters, {self.nbytes / 1e6:.1f} MB; per "
            f"token {self.encode_madds:,} multiply-adds to encode, {self.decode_madds:,.0f} to decode "
            f"L0 {self.l0:.1f}; per 1,000 tokens {self.encode_seconds:.2g} s to encode, "
            f"{self.round_trip_seconds:.2g} s for a sparse round trip)"
        )


@gate(model=check_model, sae=check_sae)
@torch.no_grad()
def cost(
    model: HookedModel,
    sae: SAE | HookedSAE,
    tokens: Tokens,
    *,
    n_tokens: int = 1024,
    repeats: int = 5,
    exclude: str | int | Sequence[str | int] = ("bos", "eos", "pad"),
    batch_size: int = 16,
) -> Cost:
    """Measures what a dictionary costs.

    Args:
        model: The bare model.
        sae: A dictionary with one site, or ``HookedSAE(sae, level=...)`` for a level of it.
        tokens: Token ids ``[document, pos]``, or several such tensors.
        n_tokens: Tokens that are encoded together; fewer where there are fewer.
        repeats: Runs that are timed.
        exclude: Special tokens to leave out.
        batch_size: Documents per forward pass.

    Raises:
        EmptySelectionError: No token, or excluded ones only.
        ModelError: Not a dictionary with one site, or a number out of range.
        MissingHookError: The model has no such hook.
        WidthMismatchError: The dictionary has another width than the model's tensor.
    """
    for name, value in (("n_tokens", n_tokens), ("repeats", repeats)):
        if value < 1:
            raise ModelError(f"{name}={value} is less than one", fix=f"{name}=5")
    text = corpus(model, tokens, exclude, batch_size)
    hooked = hooked_for(sae, text.exclude)
    coder, x = hooked.weights, _inputs(model, hooked, text, n_tokens)
    acts = coder.encode_sparse(x)
    encode, decode = multiply_adds(hooked, acts.l0)
    encode_seconds, round_trip_seconds = _times(coder, x, repeats)
    tensors = _tensors(hooked)
    return Cost(
        **subject(hooked, len(x), text.exclude),
        l0=acts.l0,
        n_parameters=sum(t.numel() for t in tensors if t.is_floating_point()),
        nbytes=sum(t.numel() * t.element_size() for t in tensors),
        encode_madds=encode,
        decode_madds=decode,
        encode_seconds=encode_seconds,
        round_trip_seconds=round_trip_seconds,
    )


def multiply_adds(hooked: HookedSAE, l0: float) -> tuple[int, float]:
    """Multiply-adds per token of a full encode, and of a decode of ``l0`` features."""
    coder = hooked.weights
    d_in, d_out = hooked.widths
    networks = [part for part in hooked.sae.modules() if isinstance(part, torch.nn.Linear)]
    encode = d_in * coder.d_sae + sum(part.weight.numel() for part in networks)
    skip = getattr(coder, "W_skip", None)
    return encode, float(l0) * d_out + (0 if skip is None else skip.numel())


def _inputs(
    model: HookedModel, hooked: HookedSAE, text: Corpus, n: int
) -> Float[torch.Tensor, "token d_in"]:
    """What the dictionary reads at the first ``n`` tokens that count."""
    inputs, n_left = [], n
    for x, _ in site_tensors(model, hooked, text):
        inputs.append(x[:n_left])
        n_left -= len(inputs[-1])
        if not n_left:
            break
    return torch.cat(inputs)


def _tensors(hooked: HookedSAE) -> list[torch.Tensor]:
    """The tensors of the dictionary, or those of its level."""
    coder: Coder = hooked.weights
    if hooked.level is None:
        return [*hooked.sae.parameters(), *hooked.sae.buffers()]
    assert is_dataclass(coder), "a coder with levels is a record of tensors"
    values = [getattr(coder, field.name) for field in fields(coder)]
    return [value for value in values if isinstance(value, torch.Tensor)]


def _times(coder: Coder, x: Float[torch.Tensor, "token d_in"], repeats: int) -> tuple[float, float]:
    """Seconds of a dense encode and of a sparse round trip, step 3 at the top of this file."""

    def dense() -> object:
        return coder.activate(coder.pre_activations(x), x)

    def round_trip() -> object:
        return saes.reconstruct(coder, coder.encode_sparse(x), x)

    return _seconds(dense, x, repeats), _seconds(round_trip, x, repeats)


def _seconds(run: Callable[[], object], x: torch.Tensor, repeats: int) -> float:
    """Median time of a run per 1,000 tokens; the first run, which warms up, does not count."""
    times = []
    for _ in range(repeats + 1):
        _wait(x.device)
        start = time.perf_counter()
        run()
        _wait(x.device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]) * 1000 / len(x)


def _wait(device: torch.device) -> None:
    """Until the device has done what it was asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
