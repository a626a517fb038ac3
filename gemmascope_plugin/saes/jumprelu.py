"""Encode with a JumpReLU dictionary: every feature, a few, or the active ones exactly.

``pre = x @ W_enc + b_enc``; ``f = pre`` where ``pre > threshold`` and ``pre > 0``, else 0 (arXiv
2407.14435, equation 1). The comparison runs in float32 at least. For chosen features only their columns
of ``W_enc`` are read.

How a matrix product rounds depends on the number of tokens, the threads and the device, so which
features near their threshold are active would too. ``encode_sparse`` gives the active set of a
**float32** dictionary that exact arithmetic has on its parameters and on the inputs as float32 numbers.
For a block of tokens:

1. One product, in float32; or, with a ``Bf16Prefilter``, a rough one and then only its candidates' in
   float32 (``two_stage.py``).
2. Each entry has a bound of its error (``rounding.py``). ``pre > max(threshold, 0) + bound`` is
   active, ``pre < max(threshold, 0) - bound`` is not.
3. The few between are computed again: their terms are exact in float64, and are added there in one
   fixed order. What is within the error of even that is added by ``math.fsum``, which rounds once.
   Such an entry's value is this result, rounded.

So the same features are active for every block size, batch, device and number of threads, with and
without the first stage; *values* still differ by the rounding of a float32 product. One smaller than
float32 can hold, or equal to its threshold after rounding, may therefore appear.

Dictionaries of **other types** decide as ``jump`` does on ``x @ W_enc + b_enc`` in their own type, the
comparison in float32: no more exact, and no more reproducible, than that product. Inputs are cast to
the dictionary's type first in any case.

Parameters are frozen: gradients reach ``x``, through the values, and nothing else.

Cost: the product, ``2 * tokens * d_in`` operations a feature, and a few percent of it for the decision.
Memory: one block ``[tokens, d_sae]`` besides the result; the backward pass keeps entries and weights.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Float64, Int, Int64

from gemmascope_plugin.errors import ModelError, WidthMismatchError
from gemmascope_plugin.saes.rounding import (
    check_range,
    column_norms,
    may_exceed,
    plain_products,
    product_slope,
    row_norms,
)
from gemmascope_plugin.saes.sparse import BLOCK_BYTES, Acts, Inputs, SparseActs, offsets_of, write
from gemmascope_plugin.saes.two_stage import Bf16Prefilter

if TYPE_CHECKING:
    from gemmascope_plugin.saes.two_stage import JumpReLUEncoder

GATHERED = 2048
"""Encoder columns that are gathered at a time; sorted, so that memory is read in order."""
PIECE = 256
"""Undecided entries that are added at a time: their terms stay in the cache."""


def pre_activations(sae: JumpReLUEncoder, x: Inputs) -> Acts:
    """``x @ W_enc + b_enc`` in the dictionary's type."""
    return x.to(sae.W_enc.dtype) @ sae.W_enc + sae.b_enc


def jump(
    pre: Float[torch.Tensor, "*tokens k"], threshold: Float[torch.Tensor, " k"]
) -> Float[torch.Tensor, "*tokens k"]:
    """``pre`` where it exceeds both its threshold and zero, else 0; gradient 1 where active."""
    return torch.where((pre.float() > threshold.float()) & (pre > 0), pre, 0)


def encode(sae: JumpReLUEncoder, x: Inputs) -> Acts:
    """All features of ``x``."""
    return jump(pre_activations(sae, x), sae.threshold)


def encode_features(
    sae: JumpReLUEncoder, x: Inputs, features: Int[torch.Tensor, " k"]
) -> Float[torch.Tensor, "*tokens k"]:
    """The chosen features of ``x``; reads ``k`` encoder columns.

    Those of a float32 dictionary are computed and compared in float64, so that what is active is what
    ``encode_sparse`` says, however many features are asked for together.
    """
    dtype = sae.W_enc.dtype
    wide = torch.float64 if dtype == torch.float32 else dtype
    columns, bias = sae.W_enc[:, features].to(wide), sae.b_enc[features].to(wide)
    pre = x.to(dtype).to(wide) @ columns + bias
    threshold = sae.threshold[features].to(torch.promote_types(wide, torch.float32))
    return torch.where((pre > threshold) & (pre > 0), pre, 0).to(dtype)


def encode_sparse(
    sae: JumpReLUEncoder,
    x: Inputs,
    *,
    keep: Bool[torch.Tensor, "*tokens"] | None = None,
    two_stage: Bf16Prefilter | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> SparseActs:
    """The active features of ``x``.

    Args:
        sae: Anything with ``W_enc, b_enc, threshold``; views and memory-mapped tensors will do.
        x: Inputs of any floating type.
        keep: Tokens to encode; the others are not computed and have no active feature.
        two_stage: Made from the same dictionary; changes the speed, never the active set.
        block_bytes: Most bytes of a dense block of activations, at least one token of course.

    Returns:
        Activations in the dictionary's type. Differentiable with respect to ``x``.

    Raises:
        WidthMismatchError: ``x`` or ``keep`` has another shape than it should.
        ModelError: ``x`` is not finite or so large that the product may overflow, or ``two_stage``
            was made from another dictionary.
    """
    _check_shapes(sae, x, keep)
    if two_stage is not None:
        two_stage.check(sae)
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).to(sae.W_enc.dtype)
    positions = None if keep is None else keep.reshape(-1).nonzero()[:, 0].to(x.device)
    if positions is not None and len(positions) == len(flat):
        positions = None  # spares a copy of the input
    inputs = flat if positions is None else flat[positions]
    _check_finite(inputs)
    with torch.no_grad():
        acts = _encode_blocks(sae, inputs.detach(), two_stage, block_bytes)
    if torch.is_grad_enabled() and inputs.requires_grad:
        transposed = sae.W_enc.detach().t() if two_stage is None else two_stage.transposed
        values = _Linear.apply(inputs, transposed, acts.offsets, acts.indices, acts.values)
        acts = acts.with_values(values)
    counts = acts.offsets.diff()
    if positions is not None:
        counts = counts.new_zeros(len(flat)).index_put((positions,), counts)
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return SparseActs(offsets, acts.indices, acts.values, (*x.shape[:-1], sae.W_enc.shape[1]))


def _check_shapes(
    sae: JumpReLUEncoder, x: Inputs, keep: Bool[torch.Tensor, "*others"] | None
) -> None:
    if x.shape[-1] != sae.W_enc.shape[0]:
        raise WidthMismatchError(
            f"the dictionary reads width {sae.W_enc.shape[0]}, the tensor has {x.shape[-1]}",
            fix="the tensor at the dictionary's own hook point",
        )
    if keep is not None and keep.shape != x.shape[:-1]:
        raise WidthMismatchError(
            f"keep has shape {list(keep.shape)}, the tokens have {list(x.shape[:-1])}",
            fix="one Boolean for each token",
        )


def _check_finite(x: Float[torch.Tensor, "n d_in"]) -> None:
    """A comparison with NaN is false, so the features of such a token would vanish unnoticed."""
    if not bool(torch.isfinite(x).all()):
        token = int((~torch.isfinite(x)).any(1).nonzero()[0, 0])
        raise ModelError(
            f"the input, as {x.dtype}, has NaN or infinity at token {token} of those encoded",
            fix="keep= without that token, or a model in a type in which it does not overflow",
        )


def _encode_blocks(
    sae: JumpReLUEncoder,
    x: Float[torch.Tensor, "n d_in"],
    two_stage: Bf16Prefilter | None,
    block_bytes: int,
) -> SparseActs:
    d_sae = sae.W_enc.shape[1]
    if not len(x):
        return SparseActs.from_dense(x.new_zeros(0, d_sae))
    height = max(1, block_bytes // max(1, d_sae * x.element_size()))
    exact = x.dtype == torch.float32
    parts = [
        _encode_exactly(sae, block, two_stage)
        if exact
        else SparseActs.from_dense(jump(pre_activations(sae, block), sae.threshold))
        for block in x.split(height)
    ]
    counts = torch.cat([part.offsets.diff() for part in parts])
    return SparseActs(
        torch.nn.functional.pad(counts.cumsum(0), (1, 0)),
        torch.cat([part.indices for part in parts]),
        torch.cat([part.values for part in parts]),
        (len(x), d_sae),
    )


def _encode_exactly(
    sae: JumpReLUEncoder, x: Float[torch.Tensor, "n d_in"], two_stage: Bf16Prefilter | None
) -> SparseActs:
    """The exact active set of a block; see the module for the steps."""
    bias, floor = sae.b_enc.float(), sae.threshold.float().clamp(min=0)
    limit = floor.double() - bias.double()  # what the product without bias must exceed
    tokens = row_norms(x)
    columns = column_norms(sae.W_enc) if two_stage is None else two_stage.norms
    check_range(tokens, columns)
    slope = product_slope(x.shape[1], x.device)
    if two_stage is None:
        with plain_products(x.device):
            product = x @ sae.W_enc
        rows, features = may_exceed(product, limit, tokens, slope * columns)
        products = product[rows, features].double()
    else:
        rows, features = two_stage.candidates(x, limit, tokens)
        products = two_stage.products(x, rows, features).double()
    values = products + bias.double()[features]
    margin = products - limit[features]
    bound = slope * tokens[rows] * columns[features]
    active = margin > bound
    undecided = (margin.abs() <= bound).nonzero()[:, 0]
    at = (rows[undecided], features[undecided])
    values[undecided], active[undecided] = _settle(sae, x, two_stage, *at, bound[undecided])
    rows, features = rows[active], features[active]
    shape = (len(x), len(limit))
    return SparseActs(offsets_of(rows, len(x)), features, values[active].float(), shape)


def _settle(
    sae: JumpReLUEncoder,
    x: Float[torch.Tensor, "n d_in"],
    two_stage: Bf16Prefilter | None,
    rows: Int64[torch.Tensor, " undecided"],
    features: Int64[torch.Tensor, " undecided"],
    bound: Float64[torch.Tensor, " undecided"],
) -> tuple[Float64[torch.Tensor, " undecided"], Bool[torch.Tensor, " undecided"]]:
    """Pre-activations in float64, and whether the exact ones are above ``max(threshold, 0)``."""
    bias = sae.b_enc.float().double()[features]
    floor = sae.threshold.float().clamp(min=0).double()[features]
    values, active = torch.zeros_like(bound), torch.zeros_like(bound, dtype=torch.bool)
    for group in features.argsort().split(GATHERED):
        if two_stage is None:
            columns = sae.W_enc.index_select(1, features[group])
        else:
            columns = two_stage.transposed.index_select(0, features[group]).t()
        for piece, weights in zip(group.split(PIECE), columns.split(PIECE, dim=1), strict=True):
            terms = weights.double() * x[rows[piece]].t().double()  # exact: 24 + 24 bits of 53
            values[piece] = _add_in_order(terms) + bias[piece]
            margin = values[piece] - floor[piece]
            active[piece] = margin > 0
            # The bound in float64: 2^-29 of that in float32, doubled for the bias and the rest.
            close = margin.abs() <= 2.0**-28 * bound[piece] + 2.0**-52 * bias[piece].abs()
            for i in close.nonzero()[:, 0].tolist():
                entry = piece[i]
                summands = (*terms[:, i].tolist(), float(bias[entry]))
                values[entry] = math.fsum(summands)
                active[entry] = math.fsum((*summands, -float(floor[entry]))) > 0
    return values, active


def _add_in_order(terms: Float64[torch.Tensor, "d_in k"]) -> Float64[torch.Tensor, " k"]:
    """Sums over the first axis by halving it: one order whatever ``k``, threads and device are."""
    while len(terms) > 1:
        half = len(terms) // 2
        folded = terms[:half] + terms[half : 2 * half]
        if len(terms) % 2:
            folded[0] += terms[-1]
        terms = folded
    return terms.sum(0)


class _Linear(torch.autograd.Function):
    """Gives values that are known already the history of ``x @ W_enc`` at their places."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[torch.Tensor, "n d_in"],
        transposed: Float[torch.Tensor, "d_sae d_in"],
        offsets: Int64[torch.Tensor, " n_offsets"],
        indices: Int64[torch.Tensor, " active"],
        values: Float[torch.Tensor, " active"],
    ) -> Float[torch.Tensor, " active"]:
        ctx.save_for_backward(transposed, offsets, indices)
        return values.view_as(values)

    @staticmethod
    def backward(
        ctx: Any, *grads: Float[torch.Tensor, " active"]
    ) -> tuple[Float[torch.Tensor, "n d_in"] | None, ...]:
        transposed, offsets, indices = ctx.saved_tensors
        shape = (len(offsets) - 1, len(transposed))
        grad_x = write(SparseActs(offsets, indices, grads[0], shape), transposed)
        return grad_x, None, None, None, None
