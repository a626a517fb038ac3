"""Unit rows, gradients along them, and folding."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemmascope_plugin.saes.training.step_parts import fold_decoder, fold_scale, tangent, unit_rows


def params(seed: int = 0, d_in: int = 5, d_sae: int = 9) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    shapes = {
        "W_enc": (d_in, d_sae),
        "b_enc": (d_sae,),
        "W_dec": (d_sae, d_in),
        "b_dec": (d_in,),
        "threshold": (d_sae,),
    }
    tensors = {n: torch.randn(s, generator=rng, dtype=torch.float64) for n, s in shapes.items()}
    return {**tensors, "threshold": tensors["threshold"].abs()}


def run(
    p: dict[str, torch.Tensor], x: torch.Tensor, *, subtracts: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    pre = (x - p["b_dec"] * subtracts) @ p["W_enc"] + p["b_enc"]
    acts = torch.where(pre > p["threshold"], pre, 0.0)
    return acts, acts @ p["W_dec"] + p["b_dec"]


def tokens(seed: int = 1) -> torch.Tensor:
    return torch.randn(40, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_unit_rows_keep_directions_and_zeros() -> None:
    W = params()["W_dec"]
    W[3] = 0
    unit = unit_rows(W)
    norms = unit.norm(dim=-1)
    assert norms[3] == 0 and torch.allclose(norms[norms > 0], torch.ones(8, dtype=torch.float64))
    for row, given_row in zip(unit, W, strict=True):
        torch.testing.assert_close(row * given_row.norm(), given_row)


def test_tangent_removes_the_part_along_each_row() -> None:
    W, gradient = unit_rows(params()["W_dec"]), params(2)["W_dec"]
    slow = torch.stack([g - (g @ w) * w for g, w in zip(gradient, W, strict=True)])
    projected = tangent(gradient, W)
    torch.testing.assert_close(projected, slow)
    assert (projected * W).sum(-1).abs().max() < 1e-12
    torch.testing.assert_close(tangent(projected, W), projected)


@settings(deadline=None)
@given(st.integers(0, 99), st.booleans())
def test_folding_the_decoder_changes_no_reconstruction(seed: int, subtracts: bool) -> None:
    p, x = params(seed), tokens(seed + 1)
    folded = fold_decoder(p, subtracts_b_dec=subtracts)
    acts, out = run(p, x, subtracts=subtracts)
    new_acts, new_out = run(folded, x, subtracts=False)
    torch.testing.assert_close(new_out, out)
    torch.testing.assert_close(new_acts, acts * p["W_dec"].norm(dim=-1))
    torch.testing.assert_close(folded["W_dec"], unit_rows(p["W_dec"]))


@settings(deadline=None)
@given(st.integers(0, 99), st.floats(1e-3, 1e4), st.booleans())
def test_folding_the_scale_scales_latents_and_output(
    seed: int, scale: float, subtracts: bool
) -> None:
    p, x = params(seed), tokens(seed + 1)
    acts, out = run(p, x, subtracts=subtracts)
    new_acts, new_out = run(fold_scale(p, scale), x * scale, subtracts=subtracts)
    torch.testing.assert_close(new_acts / scale, acts)
    torch.testing.assert_close(new_out / scale, out)
    back = fold_scale(fold_scale(p, scale), 1 / scale)
    assert all(torch.allclose(back[name], p[name]) for name in p)
