"""How far a computed pre-activation can be from the exact one: bounds that hold without exception.

1. A product of ``n`` terms in float32, added in any order, is within ``gamma_n |x| |w|`` of the exact
   one, ``gamma_n = n u / (1 - n u)`` with ``u = 2^-24`` (Higham, Accuracy and Stability of Numerical
   Algorithms, section 3.1; the norms come in by Cauchy-Schwarz).
2. ``torch.set_float32_matmul_precision`` may allow inputs rounded to TF32 or bfloat16: then
   ``(1 + u_in)^2 - 1`` is added, and the accumulation of a tensor core may cut instead of round.
3. Inputs rounded on purpose, ``x_hat`` and ``w_hat``, are bounded by their *actual* differences:
   ``|x_hat w_hat - x w| <= |x_hat - x| |w_hat| + |x| |w_hat - w|``.
4. So every bound is a number of the token times a number of the feature. ``may_exceed`` compares a
   product with limits lowered by it, a few tokens at a time so that the bounds never leave the cache.

Products and sums in float64 that the bounds themselves need are covered by inflating the norms, as is
underflow. Nothing here covers overflow: ``check_range`` refuses what could.

Cost: a pass over ``W_enc`` for its norms, kept as long as the tensor lives unchanged, and one
comparison a product.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import repeat

import torch
from jaxtyping import Float, Float64, Int64
from torch.utils.weak import WeakIdKeyDictionary

from gemmascope_plugin.errors import ModelError

FLOAT32 = 2.0**-24
"""Unit roundoff of float32 with rounding to nearest."""
TENSOR_CORE = 2.0**-22
"""An upper limit for the accumulator of a tensor core, which aligns and cuts its terms."""
INPUTS = {"highest": 0.0, "ieee": 0.0, "none": 0.0, "high": 2.0**-10, "tf32": 2.0**-10}
"""Unit roundoff of the inputs of float32 products, for cutting too; bfloat16 where not named."""
BFLOAT16 = 2.0**-7
"""Unit roundoff of bfloat16, for cutting too."""
CACHED = 2**20
"""Values that are compared at a time: few enough to stay in the cache."""
LARGEST = 2.0**100
"""Norms and products of norms below this are far from overflow in float32 and bfloat16."""


def gamma(terms: int, unit: float) -> float:
    """``n u / (1 - n u)``: the relative error of ``n`` roundings."""
    assert terms * unit < 1, f"no bound for {terms} terms"
    return terms * unit / (1 - terms * unit)


def accumulation_unit(device: torch.device) -> float:
    """Unit roundoff of the sums in a product of low-precision inputs."""
    return FLOAT32 if device.type == "cpu" else TENSOR_CORE


def product_slope(d_in: int, device: torch.device) -> float:
    """The ``g`` of ``|computed - exact| <= g |x| |w|`` for a float32 product under today's settings.

    One rounding more than a product has covers that what it is compared with is rounded to float64.
    """
    settings = [torch.get_float32_matmul_precision()]
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    # The newer setting, where this PyTorch has it, may differ from the older one.
    settings.append(getattr(getattr(backend, "matmul", None), "fp32_precision", "none"))
    rounded = max(INPUTS.get(setting, BFLOAT16) for setting in settings)
    unit = accumulation_unit(device) if rounded else FLOAT32
    return (1 + rounded) ** 2 * (1 + gamma(d_in + 1, unit)) - 1


@contextmanager
def plain_products(device: torch.device) -> Iterator[None]:
    """Products keep the type of their inputs and sum in float32, whatever the caller has set."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    with torch.autocast(device.type, enabled=False):
        if device.type == "cuda":
            matmul.allow_bf16_reduced_precision_reduction = False
        try:
            yield
        finally:
            if device.type == "cuda":
                matmul.allow_bf16_reduced_precision_reduction = before


def inflate(norms: Float64[torch.Tensor, " n"]) -> Float64[torch.Tensor, " n"]:
    """Norms made large enough to cover their own rounding, and underflow in their products.

    A product of ``d_in`` terms loses at most ``d_in * 2^-125 (1 + |x|) (1 + |w|)`` to underflow and
    flushed denormals; ``2^-50`` on both norms, times ``gamma >= d_in * 2^-24``, is more than that. A
    norm of zero stays: such products are exact.
    """
    return torch.where(norms == 0, 0.0, norms * (1 + 2.0**-40) + 2.0**-50)


def row_norms(x: Float[torch.Tensor, "n d_in"]) -> Float64[torch.Tensor, " n"]:
    """Upper bounds of ``|x_t|``."""
    return inflate(torch.linalg.vector_norm(x, dim=1, dtype=torch.float64))


def measure_columns(
    W: Float[torch.Tensor, "d_in d_sae"], rounded: Float[torch.Tensor, "d_in d_sae"] | None = None
) -> Float64[torch.Tensor, " d_sae"]:
    """Upper bounds of ``|w_i|``, or of ``|rounded_i - w_i|``, a few rows of ``W`` at a time."""
    total = torch.zeros(W.shape[1], dtype=torch.float64, device=W.device)
    height = max(1, CACHED // max(1, W.shape[1]))
    rounded_pieces = repeat(None) if rounded is None else rounded.split(height)
    for piece, rounded_piece in zip(W.split(height), rounded_pieces, strict=False):
        wide = piece.double()
        total += (wide if rounded_piece is None else rounded_piece.double() - wide).square().sum(0)
    return inflate(total.sqrt())


class Stamp:
    """Tells whether a matrix is still the one, with the same values, that it was.

    PyTorch counts changes in place, but not those made through ``.data``; four whole rows are therefore
    kept and compared, of which any change of a column or of the scale alters at least one.
    """

    def __init__(self, W: Float[torch.Tensor, "d_in d_sae"]) -> None:
        self._place = self._describe(W)
        self._witness = W[self._rows(W)].clone()

    def fits(self, W: Float[torch.Tensor, "d_in d_sae"]) -> bool:
        """Whether ``W`` is that matrix, unchanged."""
        return self._place == self._describe(W) and torch.equal(self._witness, W[self._rows(W)])

    @staticmethod
    def _describe(W: Float[torch.Tensor, "d_in d_sae"]) -> tuple[object, ...]:
        version = None if W.is_inference() else W._version
        return (version, W.data_ptr(), tuple(W.shape), W.stride(), W.dtype, W.device)

    @staticmethod
    def _rows(W: Float[torch.Tensor, "d_in d_sae"]) -> Int64[torch.Tensor, " witnesses"]:
        return torch.linspace(0, len(W) - 1, min(4, len(W)), device=W.device).long()


_NORMS = WeakIdKeyDictionary()


def column_norms(W_enc: Float[torch.Tensor, "d_in d_sae"]) -> Float64[torch.Tensor, " d_sae"]:
    """``measure_columns(W_enc)``, remembered as long as this tensor object lives unchanged.

    Tensors made in inference mode do not count their changes, so nothing is remembered for them.
    """
    cached = _NORMS.get(W_enc)
    if cached is not None and cached[0].fits(W_enc):
        return cached[1]
    # Tensors made in inference mode could not be used outside it.
    with torch.inference_mode(False), torch.no_grad():
        norms = measure_columns(W_enc)
        if not W_enc.is_inference():
            _NORMS[W_enc] = (Stamp(W_enc), norms)
    return norms


def check_range(
    tokens: Float64[torch.Tensor, " n"], columns: Float64[torch.Tensor, " d_sae"]
) -> None:
    """Refuses norms so large that a product could overflow and hide an active feature."""
    for noun, norms in (("the input", tokens), ("the encoder", columns)):
        wrong = ~(norms < LARGEST)
        if bool(wrong.any()):
            at = int(wrong.nonzero()[0, 0])
            raise ModelError(
                f"{noun} has a vector of norm {float(norms[at]):.3g}, at position {at}",
                exists=f"exact decisions for finite norms below {LARGEST:.3g}",
                fix="weights and activations that do not overflow",
            )
    if len(tokens) and len(columns) and not float(tokens.max() * columns.max()) < LARGEST:
        raise ModelError(
            f"input and encoder have norms up to {float(tokens.max()):.3g} and "
            f"{float(columns.max()):.3g}, whose product may overflow float32",
            fix="a dictionary trained on activations of this scale",
        )


def may_exceed(
    product: Float[torch.Tensor, "n d_sae"],
    limit: Float64[torch.Tensor, " d_sae"],
    tokens: Float64[torch.Tensor, " n"],
    columns: Float64[torch.Tensor, " d_sae"],
    relative: float = 0.0,
) -> tuple[Int64[torch.Tensor, " entries"], Int64[torch.Tensor, " entries"]]:
    """Token and feature, sorted, where the exact product may be above its feature's limit; misses none.

    ``tokens[t] * columns[i]`` bounds the error before the product was rounded to its own type, and
    ``relative`` is the relative error of that last rounding.
    """
    # 2^-20 covers that all this is rounded to float32 itself.
    base = (limit * (1 - (relative + 2.0**-20) * limit.sign())).float()
    reach = (columns * (1 + relative) * (1 + 2.0**-20)).float()
    height = max(1, CACHED // max(1, len(limit)))
    rows, features = [], []
    pieces = zip(product.split(height), tokens.float().split(height), strict=True)
    for number, (piece, scale) in enumerate(pieces):
        low = torch.addcmul(base, scale[:, None], reach, value=-1)
        row, feature = (piece > low).nonzero(as_tuple=True)
        rows.append(row + number * height)
        features.append(feature)
    return torch.cat(rows), torch.cat(features)
