"""Crosscoders and CLTs find features that were planted; how they begin, and what they never forget."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from planted import fvu, l0, step_input

from gemmascope_plugin.errors import ModelError
from gemmascope_plugin.saes import (
    CLTSAE,
    CLTTrainingConfig,
    CLTTrainingSAE,
    CrossCoderTrainingConfig,
    CrossCoderTrainingSAE,
)

N, WIDTH, PLANTED, BLOCK, ACTIVE, BATCH = 2, 16, 20, 24, 2, 256
"""Layers, width of a tensor, features planted in a layer, learnt for it, active of each layer."""
KINDS = pytest.mark.parametrize("kind", ["crosscoder", "clt", "skip clt"])


def built(kind: str, **changes: Any) -> Any:
    names = [f"layer {i}" for i in range(N)]
    sizes = {"d_in": N * WIDTH, "d_out": N * WIDTH, "d_sae": N * BLOCK, "layers": range(N)}
    values: dict[str, Any] = {**sizes, "hooks_in": names, "hooks_out": names, **changes}
    torch.manual_seed(0)
    if kind == "crosscoder":
        return CrossCoderTrainingSAE(CrossCoderTrainingConfig(**values))
    return CLTTrainingSAE(CLTTrainingConfig(**values, affine=kind == "skip clt"))


def unit(*shape: int, seed: int) -> torch.Tensor:
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=-1)


READ, WRITTEN, SKIP = unit(N, PLANTED, WIDTH, seed=1), unit(N, N, PLANTED, WIDTH, seed=2), 0.3
"""``READ[i]`` is seen at layer ``i`` by a CLT; ``WRITTEN[i, j]`` is what layer ``i`` writes to ``j``."""


def batch(kind: str, seed: int, tokens: int = BATCH) -> torch.Tensor:
    """The sums of what two features of each layer write to it and to all later ones."""
    rng = torch.Generator().manual_seed(seed)
    codes = []
    for _ in range(N):
        chosen = torch.rand(tokens, PLANTED, generator=rng).topk(ACTIVE).indices
        amounts = 1 + torch.rand(tokens, ACTIVE, generator=rng)
        codes.append(torch.zeros(tokens, PLANTED).scatter(1, chosen, amounts))
    y = [sum(codes[i] @ WRITTEN[i, j] for i in range(j + 1)) for j in range(N)]
    if kind == "crosscoder":
        return torch.cat(y, -1)
    x = [codes[i] @ READ[i] for i in range(N)]
    if kind == "skip clt":
        y = [y_i + SKIP * x_i for y_i, x_i in zip(y, x, strict=True)]
    return torch.cat([*x, *y], -1)


def trained(kind: str, steps: int = 600) -> Any:
    quadratic = {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": float(N * ACTIVE)}
    jump = {"jumprelu_init_threshold": 0.1, "jumprelu_bandwidth": 0.2}
    sae = built(kind, **quadratic, **jump, pre_act_loss_coefficient=1e-3)
    adam = torch.optim.Adam(sae.parameters(), lr=1e-2)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for step in range(steps):
        adam.zero_grad()
        batch_input = step_input(batch(kind, step), l0=0.3 * min(1.0, 4 * step / steps))
        sae.training_forward_pass(batch_input).loss.backward()
        adam.step()
        decay.step()
    return sae


def likeness(sae: Any, layer: int, first: int) -> float:
    """Mean over a layer's planted features of the best cosine of what is written from ``first`` on."""
    planted = torch.cat([WRITTEN[layer, j] for j in range(first, N)], -1)
    written = sae.W_dec.detach()[layer * BLOCK : (layer + 1) * BLOCK, first * WIDTH :]
    cosines = torch.nn.functional.cosine_similarity(planted[:, None], written[None], dim=-1)
    return float(cosines.max(1).values.mean())


@KINDS
def test_planted_features_are_found_in_their_layer(kind: str) -> None:
    sae, held_out = trained(kind), batch(kind, 10_000, 2048)
    x, y = held_out[:, : N * WIDTH], held_out[:, -N * WIDTH :]
    with torch.no_grad():
        assert fvu(y, sae(x)) < 0.13
        assert 3.4 < l0(sae.encode(x)) < 5.2  # planted: 4, shared by the layers
    # With a skip, what features write to their own layer is not determined: x is a sum of planted
    # directions too, and any linear map of it may be moved from the features into the skip.
    determined = [(0, 1, 0.93)] if kind == "skip clt" else [(0, 0, 0.93), (1, 1, 0.78)]
    for layer, first, bar in determined:
        assert likeness(built(kind), layer, first) < 0.65 < bar < likeness(sae, layer, first)


@KINDS
def test_how_it_begins(kind: str) -> None:
    sae = built(kind, decoder_init_norm=0.5, jumprelu_init_threshold=0.25)
    layer_rows = torch.cat(
        [sae.W_dec[i * BLOCK : (i + 1) * BLOCK, i * WIDTH : (i + 1) * WIDTH] for i in range(N)]
    )
    torch.testing.assert_close(layer_rows.norm(dim=1), torch.full((N * BLOCK,), 0.5))
    torch.testing.assert_close(sae.W_dec.norm(dim=1), layer_rows.norm(dim=1))
    torch.testing.assert_close(sae.W_enc.norm(dim=0), layer_rows.norm(dim=1))
    assert torch.allclose(sae.W_enc.T, layer_rows, atol=1e-6) == (kind == "crosscoder")
    assert torch.equal(sae.threshold, torch.full((N * BLOCK,), 0.25))
    assert not sae.b_enc.any() and not sae.b_dec.any()
    assert (sae.W_skip is None) == (kind != "skip clt")
    assert sae.W_skip is None or not sae.W_skip.any()
    for norm in (None, 0.0):
        with pytest.raises(ModelError, match=f"decoder_init_norm is {norm}, not a norm.*=1.0"):
            built(kind, decoder_init_norm=norm)


def test_the_training_class_never_drops_the_skip_either() -> None:
    sae = built("skip clt")
    x = batch("skip clt", 0)[:, : N * WIDTH]
    with torch.no_grad():
        sae.W_skip.copy_(torch.randn(N, WIDTH, WIDTH))
        with pytest.raises(ModelError, match=r"affine skip, so decoding needs.*like=x"):
            sae.decode(sae.encode(x))
        assert torch.equal(sae.decode(sae.encode(x), like=x), sae(x))


@KINDS
def test_an_error_term_is_refused(kind: str) -> None:
    sae = built(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # SAELens' own, on setting it
        sae.use_error_term = True
    with pytest.raises(ModelError, match="has no error term of its own.*error='keep'"):
        sae(batch(kind, 0)[:, : N * WIDTH])


def test_what_is_spliced_are_views(tmp_path) -> None:
    training = built("skip clt")
    training.threshold.data[0] = -1e-3  # what a last step may leave
    training.save_inference_model(tmp_path)
    sae = CLTSAE.load_from_disk(tmp_path)
    assert sae.threshold.min() == 0 and training.threshold.min() < 0
    opened = sae.dictionary()
    for i in range(N):
        layer = opened.weights(i)
        assert layer.A is not None and sae.W_skip is not None
        pairs = [
            (layer.W_enc, sae.W_enc),
            (layer.W_dec, sae.W_dec),
            (layer.A, sae.W_skip),
        ]
        pairs += [
            (layer.b_enc, sae.b_enc),
            (layer.threshold, sae.threshold),
            (layer.b_dec, sae.b_dec),
        ]
        for view, whole in pairs:
            assert view.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
