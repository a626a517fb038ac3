"""Crosscoders and CLTs as SAELens classes: causal, equal to a loop over layers, saved and read back."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from planted import step_input
from sae_lens import SAE

from gemmascope_plugin.errors import ModelError, UnknownNameError, WidthMismatchError
from gemmascope_plugin.saes import (
    CLTSAE,
    CLTSAEConfig,
    CLTTrainingConfig,
    CLTTrainingSAE,
    CrossCoderSAE,
    CrossCoderSAEConfig,
    CrossCoderTrainingConfig,
    CrossCoderTrainingSAE,
)

N, D_IN, D_OUT, BLOCK = 3, 5, 4, 6
KINDS = pytest.mark.parametrize("kind", ["crosscoder", "clt", "skip clt"])
INFERENCE: dict[str, Any] = {
    "crosscoder": (CrossCoderSAE, CrossCoderSAEConfig),
    "clt": (CLTSAE, CLTSAEConfig),
}
TRAINING: dict[str, Any] = {
    "crosscoder": (CrossCoderTrainingSAE, CrossCoderTrainingConfig),
    "clt": (CLTTrainingSAE, CLTTrainingConfig),
}


def values(kind: str, **changes: Any) -> dict[str, Any]:
    d_out = D_IN if kind == "crosscoder" else D_OUT
    settings = {"d_in": N * D_IN, "d_out": N * d_out, "d_sae": N * BLOCK, "layers": [1, 2, 4]}
    hooks = {"hooks_in": ["a", "b", "c"], "hooks_out": ["d", "e", "f"]}
    return {**settings, **hooks, "affine": kind == "skip clt", **changes}


def inference(kind: str, seed: int = 0) -> Any:
    sae_class, config = INFERENCE[kind.rpartition(" ")[2]]
    sae = sae_class(config(**values(kind)))
    return randomised(sae, seed)


def training(kind: str, **changes: Any) -> Any:
    sae_class, config = TRAINING[kind.rpartition(" ")[2]]
    jump = {"jumprelu_bandwidth": 0.5, "jumprelu_init_threshold": 0.05}
    torch.manual_seed(0)
    return sae_class(config(**values(kind), **{**jump, **changes}))


def randomised(sae: Any, seed: int) -> Any:
    """Random values where there may be any; what features write below their layer stays zero."""
    rng = torch.Generator().manual_seed(seed)
    d_out = sae.cfg.widths[1]
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) / 2)
            if name == "threshold":
                parameter.abs_()
        for i in range(N):
            sae.W_dec[i * BLOCK : (i + 1) * BLOCK, : i * d_out] = 0
    return sae


def slow(sae: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and reconstructions, layer by layer and block by block."""
    d_in, d_out = sae.cfg.widths
    acts, out = [], []
    for i in range(N):
        block = slice(i * BLOCK, (i + 1) * BLOCK)
        pre = x[:, i * d_in : (i + 1) * d_in] @ sae.W_enc[:, block] + sae.b_enc[block]
        acts.append(torch.where((pre > sae.threshold[block]) & (pre > 0), pre, 0))
    for j in range(N):
        here = slice(j * d_out, (j + 1) * d_out)
        y = sae.b_dec[here] + torch.zeros(len(x), d_out)
        for i in range(j + 1):
            y = y + acts[i] @ sae.W_dec[i * BLOCK : (i + 1) * BLOCK, here]
        if sae.W_skip is not None:
            y = y + x[:, j * d_in : (j + 1) * d_in] @ sae.W_skip[j].T
        out.append(y)
    return torch.cat(acts, -1), torch.cat(out, -1)


def tokens(n: int = 20, width: int = N * D_IN) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(1))


@KINDS
@torch.no_grad()
def test_it_is_the_loop_over_layers(kind: str) -> None:
    sae, x = inference(kind), tokens()
    acts, out = slow(sae, x)
    torch.testing.assert_close(sae.encode(x), acts)
    torch.testing.assert_close(sae(x), out)
    torch.testing.assert_close(sae.decode(acts, like=x), out)
    opened = sae.dictionary()
    layers = list(x.split(D_IN, -1))
    torch.testing.assert_close(torch.cat(opened.encode(layers), -1), acts)
    torch.testing.assert_close(torch.cat(opened(layers), -1), out)
    assert opened.cfg.hooks_in == ("a", "b", "c") and opened.cfg.layers == (1, 2, 4)
    twin = training(kind)
    twin.load_state_dict(sae.state_dict())
    torch.testing.assert_close(twin(x), out)


@KINDS
def test_nothing_is_ever_written_below_a_features_layer(kind: str) -> None:
    sae = training(kind, pre_act_loss_coefficient=1e-3, jumprelu_sparsity_loss_mode="tanh")
    d_out = sae.cfg.widths[1]
    width = N * (D_IN if kind == "crosscoder" else D_IN + D_OUT)
    adam = torch.optim.Adam(sae.parameters(), lr=1e-2)
    dead = torch.zeros(N * BLOCK, dtype=torch.bool)
    dead[::3] = True
    for _ in range(5):
        settings = step_input(tokens(64, width), l0=0.1)
        settings.dead_neuron_mask = dead
        adam.zero_grad()
        sae.training_forward_pass(settings).loss.backward()
        for i in range(N):
            below = (slice(i * BLOCK, (i + 1) * BLOCK), slice(0, i * d_out))
            assert not sae.W_dec.grad[below].any() and not sae.W_dec[below].any()
            assert sae.W_dec.grad[below[0], i * d_out :].any()
        adam.step()
    # A later layer's input changes nothing that is written before it.
    x = tokens()
    moved = x.clone()
    moved[:, 2 * D_IN :] += 1
    with torch.no_grad():
        before, after = sae(x), sae(moved)
    assert torch.equal(before[:, : 2 * d_out], after[:, : 2 * d_out])
    assert not torch.equal(before, after)


@KINDS
def test_a_step_sums_the_squared_errors_of_all_layers(kind: str) -> None:
    sae = training(kind, jumprelu_sparsity_loss_mode="quadratic", target_l0=3.0)
    batch = tokens(16, N * (D_IN if kind == "crosscoder" else D_IN + D_OUT))
    output = sae.training_forward_pass(step_input(batch, l0=0.2))
    x, target = batch[:, : N * D_IN], batch[:, -sae.cfg.d_out :]
    acts, out = slow(sae, x)
    n_active = (acts > 0).sum(-1).float()
    squares = (out - target).pow(2).sum(-1).mean()
    penalty = (0.2 * (2 / 3) * (n_active - 3).pow(2)).mean()
    torch.testing.assert_close(output.losses["mse_loss"], squares)
    torch.testing.assert_close(output.loss, squares + penalty)
    assert torch.equal(output.sae_in, target)


@KINDS
def test_saelens_reads_what_was_saved(kind: str, tmp_path) -> None:
    sae, x = inference(kind), tokens()
    sae.save_model(tmp_path)
    read = SAE.load_from_disk(tmp_path)
    assert type(read) is type(sae) and read.cfg.layers == (1, 2, 4)
    assert torch.equal(read(x), sae(x))
    path = tmp_path / "cfg.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "layer": 3}))
    with pytest.raises(UnknownNameError, match="no setting 'layer'.*Did you mean 'layers'"):
        type(sae).load_from_disk(tmp_path)


@KINDS
@torch.no_grad()
def test_scales_and_norms_are_folded_exactly(kind: str) -> None:
    sae, x = training(kind), tokens()
    randomised(sae, 3)
    scales_in, scales_out = torch.tensor([0.5, 2.0, 4.0]), torch.tensor([3.0, 0.25, 1.0])
    if kind == "crosscoder":
        scales_out = scales_in
    d_out = sae.cfg.widths[1]
    expected = sae(x * scales_in.repeat_interleave(D_IN)) / scales_out.repeat_interleave(d_out)
    sae.fold_scales(scales_in, scales_out)
    torch.testing.assert_close(sae(x), expected, rtol=1e-4, atol=1e-5)
    sae.fold_W_dec_norm()
    torch.testing.assert_close(sae(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(N * BLOCK))


def test_a_skip_is_never_dropped() -> None:
    sae, x = inference("skip clt"), tokens()
    with pytest.raises(ModelError, match=r"affine skip, so decoding needs.*decode\(acts, like=x\)"):
        sae.decode(sae.encode(x))
    with pytest.raises(ModelError, match="A crosscoder has no affine skip"):
        CrossCoderSAEConfig(**values("crosscoder", affine=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": [2, 1, 4]}, r"layers \[2, 1, 4\] do not increase.*layers=\[1, 2, 4\]"),
        ({"layers": [1, 1, 4]}, "do not increase from 0"),
        ({"layers": [-1, 2, 4]}, "do not increase from 0"),
        ({"layers": []}, r"layers \[\] do not increase"),
        ({"hooks_in": ["a"]}, "3 layers with 1 hooks to read and 3 to write"),
        ({"d_sae": 20}, "d_sae is 20, which 3 layers do not divide.*a multiple of 3"),
        ({"normalize_activations": "layer_norm"}, "A clt neither normalises its input"),
    ],
)
def test_what_cannot_be(changes: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        CLTSAEConfig(**values("clt", **changes))


def test_tensors_of_another_width() -> None:
    with pytest.raises(
        WidthMismatchError, match="reads 3 tensors of width 5 side by side.*width 5"
    ):
        inference("clt").encode(tokens(2, 5))


def test_weights_that_write_below_their_layer_are_refused() -> None:
    sae = inference("clt")
    state = {name: value.clone() for name, value in sae.state_dict().items()}
    state["W_dec"][BLOCK, 0] = 1.0
    with pytest.raises(ModelError, match="features of layer 2 write to a layer before it"):
        sae.load_state_dict(state)


def test_batches_and_activations_of_another_width() -> None:
    sae = training("clt")
    with pytest.raises(
        WidthMismatchError, match="learns from batches of width 27, this one has 15"
    ):
        sae.training_forward_pass(step_input(tokens(), l0=0.1))
    with pytest.raises(WidthMismatchError, match="has 18 features over 3 layers.*width 6"):
        inference("clt").decode(torch.zeros(2, BLOCK))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # booleans: of a list, the type checker of the tests looks at one item only
        ({"layers": [False, True, 2]}, "are not all whole numbers"),
        ({"reshape_activations": "hook_z"}, "does not reshape its input"),
        ({"d_out": 30}, "writes what it reads, and has d_in 15 and d_out 30.*d_out=15"),
    ],
)
def test_crosscoders_that_cannot_be(changes: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        CrossCoderSAEConfig(**values("crosscoder", **changes))
