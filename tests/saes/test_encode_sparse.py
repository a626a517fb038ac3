"""The active set is that of exact arithmetic, however the work is divided."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemmascope_plugin.errors import WidthMismatchError
from gemmascope_plugin.saes import Bf16Prefilter, SparseActs, encode, encode_sparse, write
from gemmascope_plugin.saes.jumprelu import _check_shapes
from tests.factories import random_sae


def dictionary(
    d_in: int = 24, d_sae: int = 60, seed: int = 0, dtype: torch.dtype = torch.float32
) -> SimpleNamespace:
    rng = torch.Generator().manual_seed(seed)
    return SimpleNamespace(
        W_enc=(torch.randn(d_in, d_sae, generator=rng) / math.sqrt(d_in)).to(dtype),
        b_enc=(0.1 * torch.randn(d_sae, generator=rng)).to(dtype),
        threshold=torch.rand(d_sae, generator=rng).to(dtype),
    )


def inputs(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact_set(sae: SimpleNamespace, x: torch.Tensor) -> torch.Tensor:
    """Every sum rounded once, hence with the exact sign."""
    columns = sae.W_enc.double().t().tolist()
    rest = list(zip(columns, sae.b_enc.tolist(), sae.threshold.clamp(min=0).tolist(), strict=True))
    rows = [
        [math.fsum([*(a * b for a, b in zip(row, w, strict=True)), bias, -floor]) > 0]
        for row in x.double().tolist()
        for w, bias, floor in rest
    ]
    return torch.tensor(rows, dtype=torch.bool).reshape(len(x), len(columns))


def active(acts: SparseActs) -> torch.Tensor:
    ones = acts.with_values(torch.ones_like(acts.values))
    return ones.to_dense().reshape(acts.n_tokens, acts.d_sae).bool()


def every_way(sae: Any, x: torch.Tensor) -> list[SparseActs]:
    two = Bf16Prefilter(sae)
    return [
        encode_sparse(sae, x, two_stage=stage, block_bytes=size)
        for stage in (None, two)
        for size in (1, 3 * 4 * sae.W_enc.shape[1], 2**26)
    ]


def check_exact(sae: SimpleNamespace, x: torch.Tensor) -> None:
    wanted = exact_set(sae, x)
    pre = x.double() @ sae.W_enc.double() + sae.b_enc.double()
    scale = x.double().norm(dim=1, keepdim=True) * sae.W_enc.double().norm(dim=0) + pre.abs()
    for made in every_way(sae, x):
        assert torch.equal(active(made), wanted)
        # As the exact set is all that may be active, each error is that of a float32 product.
        error = (made.to_dense().double() - torch.where(wanted, pre, 0.0)).abs()
        assert bool((error <= 1e-5 * scale + 1e-37).all())


@pytest.mark.parametrize("shape", [(), (7,), (2, 3), (0,), (2, 0)])
def test_equals_the_dense_encode(shape: tuple[int, ...]) -> None:
    sae, x = dictionary(), inputs(*shape, 24)
    for made in every_way(sae, x):
        assert made.shape == (*shape, 60)
        torch.testing.assert_close(made.to_dense(), encode(sae, x))


@settings(deadline=None)
@given(
    st.integers(1, 40),
    st.integers(0, 10**6),
    st.lists(st.sampled_from([-1, 0, 1, 2]), min_size=12, max_size=12),
)
def test_thresholds_at_the_pre_activations_themselves(
    d_in: int, seed: int, steps: list[int]
) -> None:
    sae, x = dictionary(d_in, 12, seed), inputs(5, d_in, seed=seed + 1)
    pre = (x @ sae.W_enc + sae.b_enc)[2]
    exact = (x.double() @ sae.W_enc.double() + sae.b_enc.double())[3].float()
    for i, step in enumerate(steps):
        at = pre[i] if i % 2 else exact[i]
        towards = torch.tensor(math.inf if step > 0 else -math.inf)
        for _ in range(abs(step)):
            at = torch.nextafter(at, towards)
        sae.threshold[i] = at
    check_exact(sae, x)


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 33))
def test_exact_ties_are_not_active(seed: int, d_in: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    sae = dictionary(d_in, 9, seed)
    # Small integers times a power of two: sums of them are exact in float32 too.
    sae.W_enc = torch.randint(-4, 5, (d_in, 9), generator=rng) * 2.0 ** (seed % 5)
    sae.b_enc = torch.randint(-4, 5, (9,), generator=rng).float()
    x = torch.randint(-4, 5, (6, d_in), generator=rng).float()
    sae.threshold = (x @ sae.W_enc + sae.b_enc)[4].clamp(min=0)
    check_exact(sae, x)
    for made in every_way(sae, x):
        assert not active(made)[4].any()


def single(x: list[float], w: list[float]) -> tuple[SimpleNamespace, torch.Tensor]:
    """One token, and a feature with its negative, both with a threshold of zero."""
    W_enc = torch.tensor([w, [-value for value in w]]).t().contiguous()
    sae = SimpleNamespace(W_enc=W_enc, b_enc=torch.zeros(2), threshold=torch.zeros(2))
    return sae, torch.tensor([x])


E = 2.0**-52


@pytest.mark.parametrize(
    "x, w",
    [
        # In the order of addition the small term is lost, and float64 says zero.
        ([2.0**20, 2.0**20, 2.0**-20, 1.0, 1.0], [2.0**30, -(2.0**30), 2.0**-40, 0.0, 0.0]),
        # Float64 rounds three sums so that the total has the wrong sign.
        ([1.0] * 8, [1.0, 1.0, -1.0, -1.0, 0.49 * E, 0.49 * E, -0.51 * E, 0.0]),
        # Every term underflows in float32.
        ([1e-30, 1e-30], [2e-20, -1e-20]),
    ],
)
def test_sums_that_neither_float32_nor_float64_can_decide(x: list[float], w: list[float]) -> None:
    sae, token = single(x, w)
    check_exact(sae, token)
    for made in every_way(sae, token):
        assert active(made).tolist() == [[True, False]] and made.values[0] >= 0


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(-25, 20))
def test_badly_scaled_columns_and_tokens(seed: int, power: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    sae, x = dictionary(16, 20, seed), inputs(4, 16, seed=seed + 1)
    scales = 10.0 ** torch.randint(min(power, 0), max(power, 0) + 1, (20,), generator=rng)
    sae.W_enc = sae.W_enc * scales
    sae.b_enc, sae.threshold = sae.b_enc * scales, sae.threshold * scales
    x[0] *= 1e-15
    x[1] *= 3e4
    x[2] = 0
    check_exact(sae, x)


def test_features_that_cannot_be_active_and_tokens_of_zeros() -> None:
    sae, x = dictionary(), inputs(5, 24)
    x[1] = 0
    sae.b_enc[:], sae.threshold[:] = 0, 0
    sae.W_enc[:, 3] = 0
    sae.threshold[4] = math.inf
    sae.threshold[5] = -1  # pre must exceed 0 all the same
    for made in every_way(sae, x):
        assert torch.equal(made.to_dense() > 0, encode(sae, x) > 0)
        assert made.offsets[1] == made.offsets[2]


@pytest.mark.parametrize("bias, count", [(-100.0, 0), (100.0, 60)])
def test_none_or_all_active(bias: float, count: int) -> None:
    sae, x = dictionary(), inputs(5, 24)
    sae.b_enc[:] = bias
    for made in every_way(sae, x):
        assert made.l0 == count
        torch.testing.assert_close(made.to_dense(), encode(sae, x))


def test_neither_batch_nor_threads_nor_precision_change_the_set() -> None:
    sae, x = dictionary(300, 500), inputs(40, 300)
    sae.threshold = (x @ sae.W_enc + sae.b_enc)[7]
    wanted = active(encode_sparse(sae, x))
    two, threads = Bf16Prefilter(sae), torch.get_num_threads()
    try:
        for stage in (None, two):
            torch.set_num_threads(2)
            assert torch.equal(active(encode_sparse(sae, x, two_stage=stage)), wanted)
            torch.set_num_threads(1)
            for token in (0, 7, 39):
                made = encode_sparse(sae, x[token], two_stage=stage)
                assert torch.equal(active(made)[0], wanted[token])
            for setting in ("high", "medium"):
                torch.set_float32_matmul_precision(setting)
                assert torch.equal(active(encode_sparse(sae, x, two_stage=stage)), wanted)
            torch.set_float32_matmul_precision("highest")
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert torch.equal(active(encode_sparse(sae, x, two_stage=stage)), wanted)
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision("highest")


def test_views_give_the_same() -> None:
    sae, x = dictionary(), inputs(9, 24)
    half = SimpleNamespace(
        W_enc=sae.W_enc[:, 10:40], b_enc=sae.b_enc[10:40], threshold=sae.threshold[10:40]
    )
    turned = SimpleNamespace(**{**vars(half), "W_enc": half.W_enc.t().contiguous().t()})
    for view in (half, turned):
        check_exact(view, x)


@pytest.mark.parametrize("two", [False, True])
def test_tokens_that_are_not_kept(two: bool) -> None:
    sae, x = dictionary(), inputs(2, 5, 24)
    stage = Bf16Prefilter(sae) if two else None
    keep = torch.tensor([[0, 1, 1, 0, 0], [1, 0, 0, 1, 0]]).bool()
    x[0, 0] = math.nan  # never looked at
    x.requires_grad_()
    made = encode_sparse(sae, x, keep=keep, two_stage=stage)
    wanted = encode(sae, torch.where(keep[..., None], x, 0.0)) * keep[..., None]
    torch.testing.assert_close(made.to_dense(), wanted)
    weight = inputs(2, 5, 60, seed=5)
    actual, reference = (
        torch.autograd.grad((acts * weight).sum(), x)[0] for acts in (made.to_dense(), wanted)
    )
    torch.testing.assert_close(actual, reference)
    assert bool((actual[~keep] == 0).all())
    assert encode_sparse(sae, x, keep=keep & False, two_stage=stage).l0 == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_types_decide_as_the_dense_encode(dtype: torch.dtype) -> None:
    sae, x = dictionary(dtype=dtype), inputs(6, 24)
    made = encode_sparse(sae, x)
    assert made.values.dtype == dtype
    torch.testing.assert_close(made.to_dense(), encode(sae, x), rtol=0, atol=0)


def test_inputs_are_cast_to_the_dictionary() -> None:
    sae, x = dictionary(), inputs(6, 24, dtype=torch.bfloat16).requires_grad_()
    made = encode_sparse(sae, x)
    torch.testing.assert_close(made.to_dense(), encode(sae, x))
    (grad,) = torch.autograd.grad(made.values.sum(), x)
    assert grad.dtype == torch.bfloat16


@pytest.mark.parametrize("two", [False, True])
def test_gradients_equal_those_of_the_dense_encode(two: bool) -> None:
    sae = dictionary()
    sae.W_enc = torch.nn.Parameter(sae.W_enc)
    stage = Bf16Prefilter(sae) if two else None
    x, weight = inputs(2, 5, 24).requires_grad_(), inputs(2, 5, 60, seed=3)
    (wanted,) = torch.autograd.grad((encode(sae, x) * weight).sum(), x)
    dense = encode_sparse(sae, x, two_stage=stage).to_dense()
    (dense * weight).sum().backward()
    assert x.grad is not None and sae.W_enc.grad is None
    torch.testing.assert_close(x.grad, wanted)


def test_finite_differences() -> None:
    sae, x = dictionary(6, 15, dtype=torch.float64), inputs(3, 6, dtype=torch.float64)
    x.requires_grad_()

    def values(x: torch.Tensor) -> torch.Tensor:
        return encode_sparse(sae, x).to_dense().square()

    assert torch.autograd.gradcheck(values, x)
    assert torch.autograd.gradgradcheck(values, x)


def test_without_gradients() -> None:
    sae, x = dictionary(), inputs(4, 24).requires_grad_()
    wanted = encode(sae, x).detach()
    with torch.inference_mode():
        inside = Bf16Prefilter(sae)
    for mode in (torch.no_grad, torch.inference_mode):
        for stage in (None, inside):
            with mode():
                made = encode_sparse(sae, x, two_stage=stage)
                assert not made.values.requires_grad
                torch.testing.assert_close(made.to_dense(), wanted)
    made = encode_sparse(sae, x, two_stage=inside)  # what was prepared there serves here
    assert torch.autograd.grad(made.values.sum(), x)[0].shape == x.shape


def test_shapes_that_do_not_fit() -> None:
    sae = dictionary()
    with pytest.raises(WidthMismatchError, match="reads width 24, the tensor has 23"):
        encode_sparse(sae, inputs(4, 23))
    # Behind the public function jaxtyping would refuse this first, here but not where users are.
    with pytest.raises(WidthMismatchError, match=r"keep has shape \[3\], the tokens have \[4\]"):
        _check_shapes(sae, inputs(4, 24), torch.ones(3, dtype=torch.bool))


def test_a_dictionary_of_saelens() -> None:
    sae, x = random_sae(24, 60, "blocks.0.hook_resid_post"), inputs(2, 5, 24).requires_grad_()
    wanted = encode(sae, x)
    for made in every_way(sae, x):
        torch.testing.assert_close(made.to_dense(), wanted)
        torch.testing.assert_close(write(made, sae.W_dec), wanted @ sae.W_dec)
        (grad,) = torch.autograd.grad(made.values.sum(), x)
        torch.testing.assert_close(grad, (wanted > 0).float() @ sae.W_enc.T)
