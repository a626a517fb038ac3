"""Sparse activations: the same numbers and gradients as dense ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemmascope_plugin.errors import FeatureIndexError, WidthMismatchError
from gemmascope_plugin.saes import SparseActs, sparse, write


def random_acts(*shape: int, density: float = 0.2, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    shown = torch.rand(*shape, generator=rng) < density
    return torch.where(shown, torch.rand(*shape, generator=rng, dtype=torch.float64) + 0.1, 0.0)


shapes = st.lists(st.integers(0, 5), min_size=0, max_size=3)


@settings(deadline=None)
@given(shapes, st.integers(1, 9), st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.integers(0, 99))
def test_dense_to_sparse_and_back(tokens: list[int], d_sae: int, density: float, seed: int) -> None:
    acts = random_acts(*tokens, d_sae, density=density, seed=seed)
    made = SparseActs.from_dense(acts)
    assert torch.equal(made.to_dense(), acts)
    flat = acts.reshape(-1, d_sae)
    where = flat.nonzero()
    assert torch.equal(made.rows, where[:, 0]) and torch.equal(made.indices, where[:, 1])
    assert torch.equal(made.offsets.diff(), flat.ne(0).sum(1))
    assert made.l0 == pytest.approx(len(where) / max(len(flat), 1))
    assert made.density == pytest.approx(len(where) / max(acts.numel(), 1))
    chosen = torch.tensor([d_sae - 1, 0, d_sae - 1])
    assert torch.equal(made.columns(chosen), acts[..., chosen])


def test_gradients_flow_through_the_values() -> None:
    acts = random_acts(2, 3, 7).requires_grad_()
    weight = torch.rand(2, 3, 7, dtype=torch.float64)
    chosen = torch.tensor([4, 1, 4])
    for dense, made in (
        (acts, SparseActs.from_dense(acts).to_dense()),
        (acts[..., chosen], SparseActs.from_dense(acts).columns(chosen)),
    ):
        scale = weight[..., : dense.shape[-1]]
        (expected,) = torch.autograd.grad((dense * scale).sum(), acts)
        (actual,) = torch.autograd.grad((made * scale).sum(), acts)
        torch.testing.assert_close(actual, expected * (acts != 0))
    assert not SparseActs.from_dense(acts).detach().values.requires_grad


def test_values_can_be_replaced() -> None:
    made = SparseActs.from_dense(random_acts(3, 7))
    torch.testing.assert_close(made.with_values(2 * made.values).to_dense(), 2 * made.to_dense())


def test_what_it_says_of_itself() -> None:
    made = SparseActs.from_dense(torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 0.0]]))
    assert repr(made) == "SparseActs([2, 3], 2 active, L0 1, 4.8e-05 MB, float32)"
    assert made.nbytes == 3 * 8 + 2 * 8 + 2 * 4


def test_features_that_do_not_exist() -> None:
    made = SparseActs.from_dense(random_acts(3, 7))
    for wrong in (7, -1):
        with pytest.raises(FeatureIndexError, match=f"Feature {wrong} .*features 0 to 6"):
            made.columns(torch.tensor([3, wrong]))
    assert made.columns(torch.empty(0, dtype=torch.long)).shape == (3, 0)


def layout(name: str, dtype: torch.dtype, d_sae: int = 40, d_out: int = 6) -> torch.Tensor:
    rng = torch.Generator().manual_seed(1)
    made = torch.randn(d_sae, 3, d_out, generator=rng).to(dtype)
    if name == "contiguous":
        return made[:, 1].contiguous()
    return made[:, 1] if name == "strided" else made[:, 1].t().contiguous().t()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["contiguous", "strided", "transposed"])
@pytest.mark.parametrize("density", [0.0, 0.03, 0.9])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_writing_equals_a_dense_product(
    name: str,
    dtype: torch.dtype,
    kind: torch.dtype,
    density: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sparse, "BLOCK_BYTES", 700)  # several blocks
    acts = random_acts(4, 5, 40, density=density).to(kind)
    W_dec = layout(name, dtype)
    made = SparseActs.from_dense(acts)
    actual, expected = write(made, W_dec), acts.double() @ W_dec.double()
    assert actual.dtype == kind and actual.shape == expected.shape
    close = 3e-2 if kind == torch.bfloat16 else 1e-5
    torch.testing.assert_close(actual.double(), expected, rtol=close, atol=close)


@pytest.mark.parametrize("name", ["contiguous", "strided", "transposed"])
@pytest.mark.parametrize("density", [0.03, 0.9])
def test_gradients_equal_those_of_a_dense_product(name: str, density: float) -> None:
    acts = random_acts(4, 5, 40, density=density).requires_grad_()
    W_dec = layout(name, torch.float64).requires_grad_()
    weight = torch.rand(4, 5, 6, dtype=torch.float64)
    expected = torch.autograd.grad(((acts @ W_dec) * weight).sum(), (acts, W_dec))
    actual = torch.autograd.grad(
        (write(SparseActs.from_dense(acts), W_dec) * weight).sum(), (acts, W_dec)
    )
    torch.testing.assert_close(actual[0], expected[0] * (acts != 0))
    torch.testing.assert_close(actual[1], expected[1])


def test_a_strided_decoder_is_never_copied_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    bag = torch.nn.functional.embedding_bag

    def spy(indices: torch.Tensor, weight: torch.Tensor, *rest, **named) -> torch.Tensor:
        seen.append(tuple(weight.shape))
        return bag(indices, weight, *rest, **named)

    monkeypatch.setattr(torch.nn.functional, "embedding_bag", spy)
    acts = torch.zeros(3, 40)
    acts[0, 5] = acts[2, 5] = acts[1, 7] = 1.0
    write(SparseActs.from_dense(acts), layout("strided", torch.float32))
    assert seen == [(2, 6)]


def test_no_tokens_write_nothing() -> None:
    for name in ("contiguous", "strided", "transposed"):
        made = SparseActs.from_dense(torch.zeros(2, 0, 40))
        assert write(made, layout(name, torch.float32)).shape == (2, 0, 6)


def test_a_decoder_of_another_width() -> None:
    with pytest.raises(WidthMismatchError, match="40 features, the decoder 39 rows"):
        write(SparseActs.from_dense(torch.zeros(2, 40)), torch.zeros(39, 6))
