"""Bounds that are never violated, and a first stage that never misses an active feature."""

from __future__ import annotations

import gc
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemmascope_plugin.errors import ModelError
from gemmascope_plugin.saes import Bf16Prefilter, encode_sparse, has_bf16_instructions, rounding
from tests.saes.test_encode_sparse import active, dictionary, exact_set, inputs


def fsum_product(x: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    """Each sum rounded once, to float64."""
    columns = W.double().t().tolist()
    rows = [
        [math.fsum(a * b for a, b in zip(row, column, strict=True)) for column in columns]
        for row in x.double().tolist()
    ]
    return torch.tensor(rows, dtype=torch.float64)


def cancelling(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors whose products cancel: large terms of both signs, small sums."""
    rng = torch.Generator().manual_seed(seed)
    half = torch.randn(3, n, generator=rng) * 2.0 ** torch.randint(-8, 9, (n,), generator=rng)
    x = torch.cat([half, half * (1 + 2.0**-20 * torch.randn(3, n, generator=rng))], 1)
    w = torch.randn(n, 4, generator=rng)
    return x, torch.cat([w, -w])


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(0, 10**6))
def test_the_float32_bound_holds(n: int, seed: int) -> None:
    x, W = cancelling(n, seed)
    allowed = rounding.product_slope(2 * n, x.device)
    allowed = allowed * rounding.row_norms(x)[:, None] * rounding.column_norms(W)
    assert bool(((x @ W).double() - fsum_product(x, W)).abs().le(allowed).all())


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(0, 10**6))
def test_the_first_stage_keeps_all_that_exceed_their_limit(n: int, seed: int) -> None:
    x, W = cancelling(n, seed)
    exact = fsum_product(x, W)
    two = Bf16Prefilter(SimpleNamespace(W_enc=W))
    for token in range(len(x)):  # limits a hair below what one token has
        limit = exact[token] - 1e-12 * exact[token].abs()
        rows, features = two.candidates(x, limit, rounding.row_norms(x))
        is_candidate = torch.zeros_like(exact, dtype=torch.bool)
        is_candidate[rows, features] = True
        assert bool(is_candidate[exact > limit].all())
        actual = two.products(x, rows, features).double()
        torch.testing.assert_close(actual, exact[rows, features], rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("inexact", ["x", "W"])
def test_the_first_stage_when_all_roundings_point_the_same_way(inexact: str) -> None:
    signs = torch.tensor([1.0, -1.0]).repeat(32)
    nearly = 1.5 + 0.9 * 2.0**-8 * signs  # bfloat16 makes it 1.5
    x, w = (nearly, signs) if inexact == "x" else (signs, nearly)
    two = Bf16Prefilter(SimpleNamespace(W_enc=w[:, None]))
    exact = fsum_product(x[None], w[:, None])
    assert exact > 0.2 and (x.bfloat16() @ w.bfloat16()) == 0
    rows, _ = two.candidates(x[None], exact[0] - 1e-9, rounding.row_norms(x[None]))
    assert len(rows) == 1


def test_the_first_stage_drops_most_of_the_rest() -> None:
    sae, x = dictionary(512, 2000), inputs(30, 512)
    sae.threshold[:] = 2.3
    two = Bf16Prefilter(sae)
    limit = sae.threshold.double() - sae.b_enc.double()
    rows, _ = two.candidates(x, limit, rounding.row_norms(x))
    assert len(rows) < 3 * len(encode_sparse(sae, x).indices)


def test_may_exceed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = torch.Generator().manual_seed(0)
    product, limit = torch.randn(7, 11, generator=rng), torch.rand(11).double()
    tokens, columns = torch.rand(7).double(), 0.1 * torch.rand(11).double()
    whole = rounding.may_exceed(product, limit, tokens, columns)
    monkeypatch.setattr(rounding, "CACHED", 22)
    pieces = rounding.may_exceed(product, limit, tokens, columns)
    sure = product > limit - tokens[:, None] * columns
    for made in (whole, pieces):
        is_candidate = torch.zeros_like(sure)
        is_candidate[made] = True
        assert torch.equal(is_candidate, sure)


def test_norms_are_never_too_small() -> None:
    W = 10.0 ** torch.linspace(-22, 18, 41) * inputs(50, 41)
    W[:, 5] = 0
    norms = rounding.measure_columns(W)
    assert bool((norms >= W.double().square().sum(0).sqrt()).all()) and norms[5] == 0
    change = rounding.measure_columns(W, W.bfloat16())
    assert bool((change >= (W.bfloat16().double() - W.double()).norm(dim=0)).all())
    torch.testing.assert_close(norms[30:], W[:, 30:].double().norm(dim=0))


def test_settings_widen_the_bound() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    exact = rounding.product_slope(100, cpu)
    assert exact == pytest.approx(101 * 2.0**-24, rel=1e-4)
    try:
        torch.set_float32_matmul_precision("high")
        high = rounding.product_slope(100, cpu), rounding.product_slope(100, gpu)
        torch.set_float32_matmul_precision("medium")
        medium = rounding.product_slope(100, cpu)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert high[1] > high[0] > 2 * 2.0**-11 and medium > 2 * 2.0**-8
    assert rounding.product_slope(100, cpu) == exact
    with pytest.raises(AssertionError, match="no bound"):
        rounding.gamma(2**24, rounding.FLOAT32)


def test_reduced_reductions_are_off_during_a_product_on_cuda() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # autocast on a machine without CUDA
        with rounding.plain_products(torch.device("cuda")):
            assert not matmul.allow_bf16_reduced_precision_reduction
    assert matmul.allow_bf16_reduced_precision_reduction == before


@pytest.mark.parametrize("two", [False, True])
def test_nothing_vanishes_in_an_overflow(two: bool) -> None:
    sae, x = dictionary(), inputs(4, 24)
    stage = Bf16Prefilter(sae) if two else None
    for wrong in (math.nan, math.inf, -math.inf):
        bad = x.clone()
        bad[2, 3] = wrong
        with pytest.raises(ModelError, match="NaN or infinity at token 2"):
            encode_sparse(sae, bad, two_stage=stage)
    with pytest.raises(ModelError, match="the input has a vector of norm .*, at position 1"):
        encode_sparse(sae, x * torch.tensor([1, 3e37, 1, 1])[:, None], two_stage=stage)
    far = encode_sparse(sae, x * 1e29, two_stage=stage)
    assert torch.equal(active(far), exact_set(sae, x * 1e29))
    sae.W_enc[0, 7] = math.nan
    with pytest.raises(ModelError, match="the encoder has a vector of norm nan, at position 7"):
        encode_sparse(sae, x, two_stage=Bf16Prefilter(sae) if two else None)
    sae.W_enc[0, 7] = 1e28
    with pytest.raises(ModelError, match="whose product may overflow"):
        encode_sparse(sae, x * 1e28, two_stage=Bf16Prefilter(sae) if two else None)


def test_norms_are_remembered_until_the_tensor_changes() -> None:
    W = inputs(8, 5)
    first = rounding.column_norms(W)
    assert rounding.column_norms(W) is first
    assert rounding.column_norms(W.clone()) is not first
    W[3, 2] += 10
    second = rounding.column_norms(W)
    torch.testing.assert_close(second, W.double().norm(dim=0))
    W.data.mul_(3)  # PyTorch does not count this one
    torch.testing.assert_close(rounding.column_norms(W), W.double().norm(dim=0))
    with torch.inference_mode():
        inside = inputs(8, 5)
        assert rounding.column_norms(inside) is not rounding.column_norms(inside)
        cached_norms = rounding.column_norms(W)
    assert rounding.column_norms(W) is cached_norms and not cached_norms.is_inference()
    gc.collect()
    n_cached = len(rounding._NORMS)
    del W
    gc.collect()
    assert len(rounding._NORMS) == n_cached - 1


def test_a_changed_encoder_is_encoded_as_it_is_now() -> None:
    sae, x = dictionary(), inputs(5, 24)
    encode_sparse(sae, x)
    sae.W_enc *= 50
    sae.threshold = (x @ sae.W_enc + sae.b_enc)[2]
    fresh = SimpleNamespace(**{name: value.clone() for name, value in vars(sae).items()})
    actual, expected = encode_sparse(sae, x), encode_sparse(fresh, x)
    assert torch.equal(actual.indices, expected.indices)


def test_another_dictionary_is_refused() -> None:
    sae, x = dictionary(), inputs(5, 24)
    two = Bf16Prefilter(sae)
    for other in (dictionary(seed=1), dictionary(d_sae=59)):
        with pytest.raises(ModelError, match=r"another encoder.*Bf16Prefilter\(sae\)"):
            encode_sparse(other, x, two_stage=two)
    sae.b_enc = sae.b_enc + 1  # biases and thresholds are read anew
    assert torch.equal(encode_sparse(sae, x, two_stage=two).indices, encode_sparse(sae, x).indices)
    sae.W_enc[3, 4] += 1
    with pytest.raises(ModelError, match="changed since"):
        encode_sparse(sae, x, two_stage=two)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_only_float32_has_two_stages(dtype: torch.dtype) -> None:
    with pytest.raises(ModelError, match="need a float32 dictionary"):
        Bf16Prefilter(dictionary(dtype=dtype))


def test_what_it_costs() -> None:
    two = Bf16Prefilter(dictionary(24, 60))
    assert two.nbytes == 24 * 60 * (2 + 4) + 60 * 2 * 8
    assert repr(two) == "Bf16Prefilter(d_in=24, d_sae=60, 0.0096 MB)"


def test_whether_the_processor_has_bf16() -> None:
    assert has_bf16_instructions() in (True, False)
