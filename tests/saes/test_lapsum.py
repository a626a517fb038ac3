"""The soft top-k against bisection in float64, its gradient against finite differences, its limits."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemmascope_plugin.errors import BadFileError, ModelError
from gemmascope_plugin.saes import keep_top, lapsum, soft_topk

ALPHAS = (1e-4, 0.02, 0.5, 3.0, 1e4)


def slow(scores: torch.Tensor, k: torch.Tensor | float, alpha: float) -> torch.Tensor:
    """300 halvings of the interval that must hold ``b``."""
    z = scores.double()
    k = torch.as_tensor(k, dtype=torch.float64).expand(z.shape[:-1])[..., None]

    def weights(b: torch.Tensor) -> torch.Tensor:
        u = (z - b) / alpha
        return torch.where(u <= 0, u.clamp(max=0).exp() / 2, 1 - (-u).clamp(max=0).exp() / 2)

    low, high = (z.amin(-1, keepdim=True) - 60 * alpha, z.amax(-1, keepdim=True) + 60 * alpha)
    for _ in range(300):
        b = (low + high) / 2
        over = weights(b).sum(-1, keepdim=True) > k
        low, high = torch.where(over, b, low), torch.where(over, high, b)
    return weights((low + high) / 2)


def some_scores(*shape: int, kind: str = "normal", dtype: torch.dtype = torch.float64):
    z = 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return {"normal": z, "relu": z.relu(), "ties": z.round(), "equal": torch.ones_like(z)}[kind]


@pytest.mark.parametrize("kind", ["normal", "relu", "ties", "equal"])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_it_equals_bisection_for_every_budget(kind: str, alpha: float) -> None:
    z = some_scores(6, 5, 40, kind=kind)
    for k in (0.01, 1.0, 3.7, 19.5, 20.0, 20.5, 39.0, 39.9):
        p = soft_topk(z, k, alpha)
        torch.testing.assert_close(p, slow(z, k, alpha), rtol=0, atol=1e-9)
        assert (p.sum(-1) - k).abs().max() < 1e-9
        single = soft_topk(z.float(), k, alpha)
        assert single.dtype == torch.float32
        torch.testing.assert_close(single, slow(z.float(), k, alpha).float(), rtol=0, atol=2e-6)
        assert (single.double().sum(-1) - k).abs().max() < 1e-5


def test_every_row_may_have_its_own_budget() -> None:
    z, k = some_scores(3, 7, 30), torch.linspace(0.1, 29.9, 21, dtype=torch.float64).reshape(3, 7)
    p = soft_topk(z, k, 0.3)
    torch.testing.assert_close(p, slow(z, k, 0.3))
    torch.testing.assert_close(p[1, 2], soft_topk(z[1, 2], float(k[1, 2]), 0.3))
    torch.testing.assert_close(p[1, 2], soft_topk(z[1, 2], k[1, 2], 0.3))


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    z, k = some_scores(11, 30, dtype=torch.float32), torch.linspace(1, 9, 11)
    whole = both_ways(z, k, 0.2)
    monkeypatch.setattr(lapsum, "BLOCK", 4 * 30)
    for part, all_at_once in zip(both_ways(z, k, 0.2), whole, strict=True):
        torch.testing.assert_close(part, all_at_once)


def both_ways(
    z: torch.Tensor, k: torch.Tensor, alpha: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights and the gradients of a fixed weighting of them, from a gradient with holes in memory."""
    z, k = z.clone().requires_grad_(), k.clone().requires_grad_()
    p = soft_topk(z, k, alpha)
    weighting = torch.arange(p.numel(), dtype=p.dtype).sin().reshape(p.shape[::-1]).T
    dz, dk = torch.autograd.grad(p, (z, k), weighting)
    return p.detach(), dz, dk


@pytest.mark.parametrize("alpha", [0.05, 0.4, 3.0])
@pytest.mark.parametrize("kind", ["normal", "equal"])
def test_gradients_of_scores_and_budget_pass_finite_differences(alpha: float, kind: str) -> None:
    z = some_scores(2, 2, 9, kind=kind).requires_grad_()
    k = torch.tensor([[0.4, 2.0], [3.3, 8.6]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z, k: soft_topk(z, k, alpha), (z, k))
    assert torch.autograd.gradcheck(lambda z: soft_topk(z, 2.5, alpha), (z,))


def test_the_gradient_is_the_formula() -> None:
    z = some_scores(60)
    k = torch.tensor(7.3, dtype=torch.float64)
    jacobian, by_k = torch.autograd.functional.jacobian(lambda z, k: soft_topk(z, k, 0.3), (z, k))
    p = slow(z, 7.3, 0.3)
    phi = torch.minimum(p, 1 - p) / 0.3
    q = phi / phi.sum()
    torch.testing.assert_close(jacobian, torch.diag(phi) - phi[:, None] * q)
    torch.testing.assert_close(by_k, q)


def test_second_derivatives_are_refused_not_wrong() -> None:
    z = some_scores(9).requires_grad_()
    (dz,) = torch.autograd.grad(soft_topk(z, 2.0, 0.5).square().sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dz.sum().backward()


def test_small_alpha_is_the_hard_top_k_and_large_alpha_is_uniform() -> None:
    z = some_scores(20, 50)
    hard = (keep_top(z.exp(), 7) > 0).double()
    distance = [float((soft_topk(z, 7, alpha) - hard).abs().max()) for alpha in (1.0, 0.1, 1e-6)]
    assert distance == sorted(distance, reverse=True) and distance[-1] < 1e-9
    torch.testing.assert_close(soft_topk(z, 7, 1e9), torch.full_like(z, 7 / 50), atol=1e-8, rtol=0)


def test_ties_share_what_is_left() -> None:
    z = torch.tensor([5.0, 1.0, 1.0, 1.0, -5.0])
    expected = torch.tensor([1.0, 0.5, 0.5, 0.5, 0.0])
    torch.testing.assert_close(soft_topk(z, 2.5, 1e-3), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e4, 1e30])
@pytest.mark.parametrize("alpha", [1e-30, 1e-4, 1.0])
def test_float32_never_overflows_and_keeps_its_sum(scale: float, alpha: float) -> None:
    z = scale * some_scores(8, 4096, dtype=torch.float32)
    for k in (1.0, 64.0, 128.5):
        p, dz, dk = both_ways(z, torch.full((8,), k), alpha)
        assert ((p >= 0) & (p <= 1)).all()
        assert (p.double().sum(-1) - k).abs().max() < 1e-5
        assert dz.isfinite().all() and dk.isfinite().all()


def test_the_budget_has_a_gradient_where_every_weight_has_saturated() -> None:
    """It goes to the scores that would be next, on both sides, whether or not ``phi`` underflows."""
    z = torch.tensor([9.0, 6.0, 3.0, 1.0])
    for alpha in (0.5, 0.1, 1e-3, 1e-6):
        _, dz, dk = both_ways(z[None], torch.tensor([2.0]), alpha)
        q = torch.autograd.functional.jacobian(
            lambda k, alpha=alpha: soft_topk(z, k, alpha), torch.tensor(2.0)
        )
        assert q.sum() == pytest.approx(1, abs=1e-5) and dz.isfinite().all() and dk.isfinite().all()
        if alpha < 0.2:
            torch.testing.assert_close(q, torch.tensor([0, 0.5, 0.5, 0]), rtol=0, atol=1e-5)


def test_minus_infinity_is_allowed_far_below_the_choice() -> None:
    z = torch.cat([some_scores(20), torch.full((20,), -math.inf, dtype=torch.float64)])
    p = soft_topk(z, 4, 0.3)
    torch.testing.assert_close(p[:20], soft_topk(z[:20], 4, 0.3))
    assert not p[20:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_worked_on_in_float32(dtype: torch.dtype) -> None:
    z = some_scores(5, 300).to(dtype).requires_grad_()
    p = soft_topk(z, 20, 0.1)
    assert p.dtype == dtype
    torch.testing.assert_close(p, soft_topk(z.float(), 20, 0.1).to(dtype))
    p.sum().backward()
    assert z.grad is not None and z.grad.dtype == dtype


finite = st.floats(-50, 50, allow_subnormal=False)


@st.composite
def problems(draw: st.DrawFn) -> tuple[torch.Tensor, float, float]:
    rows = draw(st.lists(finite, min_size=2, max_size=40))
    share = draw(st.floats(0.001, 0.999))
    alpha = 10 ** draw(st.floats(-4, 2))
    return torch.tensor(rows, dtype=torch.float64), share * len(rows), alpha


@settings(max_examples=60, deadline=None)
@given(problems())
def test_the_sum_is_k_and_larger_scores_weigh_no_less(problem) -> None:
    z, k, alpha = problem
    p = soft_topk(z, k, alpha)
    assert abs(float(p.sum()) - k) < 1e-8
    assert (p[z.argsort()].diff() >= -1e-12).all()
    torch.testing.assert_close(p, slow(z, k, alpha), rtol=0, atol=1e-7)


@settings(max_examples=30, deadline=None)
@given(problems(), st.randoms(use_true_random=False), st.floats(-20, 20))
def test_order_shift_and_unit_do_not_matter(problem, random, shift: float) -> None:
    z, k, alpha = problem
    order = torch.tensor(random.sample(range(len(z)), len(z)))
    p, close = soft_topk(z, k, alpha), {"rtol": 0, "atol": 1e-8}
    torch.testing.assert_close(soft_topk(z[order], k, alpha), p[order], **close)
    torch.testing.assert_close(soft_topk(z + shift, k, alpha), p, **close)
    torch.testing.assert_close(soft_topk(3 * z, k, 3 * alpha), p, **close)
    # What is not chosen is chosen from the other end.
    torch.testing.assert_close(1 - soft_topk(-z, len(z) - k, alpha), p, **close)


@settings(max_examples=30, deadline=None)
@given(problems(), st.floats(0.01, 0.9))
def test_a_larger_budget_takes_from_nobody(problem, share: float) -> None:
    z, k, alpha = problem
    more = k + share * (len(z) - k)
    assert (soft_topk(z, more, alpha) >= soft_topk(z, k, alpha) - 1e-9).all()


def test_keep_top_equals_sorting_and_passes_its_gradient() -> None:
    x, k = some_scores(4, 5, 12), torch.arange(20).reshape(4, 5) % 13
    x.requires_grad_()
    top = keep_top(x, k)
    for row, out, n in zip(x.reshape(20, 12), top.reshape(20, 12), k.flatten(), strict=True):
        chosen = set(row.argsort(descending=True)[:n].tolist())
        assert out.tolist() == [v if i in chosen else 0.0 for i, v in enumerate(row.tolist())]
    torch.testing.assert_close(keep_top(x, 3), keep_top(x, torch.full((4, 5), 3)))
    top.sum().backward()
    assert torch.equal(x.grad, (top != 0).double())


def test_no_rows_are_no_mistake() -> None:
    assert soft_topk(torch.zeros(0, 9), 3, 0.1).shape == (0, 9)
    assert soft_topk(torch.zeros(2, 0, 9), torch.zeros(2, 0), 0.1).shape == (2, 0, 9)
    assert keep_top(torch.zeros(0, 9), torch.zeros(0, dtype=torch.long)).shape == (0, 9)


@pytest.mark.parametrize("k", [0, -1.5, 9, 9.5, math.nan])
def test_budgets_without_weights_are_refused(k: float) -> None:
    message = rf"k is {float(k)}, for 9 scores\. There is: weights .* between 0 and 9\."
    with pytest.raises(ModelError, match=message):
        soft_topk(torch.randn(2, 9), k, 0.1)
    with pytest.raises(ModelError, match=message):
        soft_topk(torch.randn(2, 9), torch.tensor([3.0, k]), 0.1)


def test_other_mistakes_are_refused() -> None:
    z = torch.randn(2, 9)
    for alpha in (0.0, -1.0, math.inf, math.nan, 1e-40):
        with pytest.raises(ModelError, match=r"alpha is .*Try: a positive number"):
            soft_topk(z, 3, alpha)
    for bad in (math.nan, math.inf):
        z[1, 4] = bad
        with pytest.raises(BadFileError, match="scores hold values that are not finite"):
            soft_topk(z, 3, 0.1)
    with pytest.raises(ModelError, match=r"k is 10, for 9 values\. There is: k from 0 to 9"):
        keep_top(z, 10)
    with pytest.raises(ModelError, match="k is -1, for 9 values"):
        keep_top(z, torch.tensor([3, -1]))


def test_a_learned_budget_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        soft_topk(torch.randn(2, 9), torch.tensor([2.0, 3.0], requires_grad=True), 0.1)
