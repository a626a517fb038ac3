"""Running again from a layer and a position gives what the model itself gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gemmascope_plugin.models.arithmetic import Arithmetic
from gemmascope_plugin.models.block import gelu_times
from gemmascope_plugin.models.record import keeping
from gemmascope_plugin.models.replay import Replay
from gemmascope_plugin.models.replay_points import POINTS, Entry, replayable
from tests.factories import tiny_model
from tests.support.rounding import TINY
from tests.tiny_models import random_tokens

TOKENS = random_tokens(batch_size=3, length=22)
"""Longer than the sliding window of 16."""
AT = torch.tensor([21, 18, 12])
ROWS = torch.arange(3)
POINT_NAMES = sorted(POINTS - {"ln2.hook_in", "mlp.hook_pre", "mlp.hook_pre_linear"})


def replay(model: Any) -> tuple[Replay, torch.Tensor]:
    arithmetic = Arithmetic.of(model, TOKENS)
    assert arithmetic is not None
    run = Replay(arithmetic, TOKENS, AT)
    return run, run.record()


def logits(run: Replay, final: torch.Tensor) -> torch.Tensor:
    anatomy = run.arithmetic.anatomy
    out, cap = final @ anatomy.W_U, anatomy.soft_cap
    return out if cap is None else cap * torch.tanh(out / cap)


def test_the_logits_are_the_models(model) -> None:
    run, final = replay(model)
    with torch.no_grad():
        expected = model(TOKENS)[ROWS, AT]
    assert torch.allclose(logits(run, final), expected, atol=1e-5)


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_in_double_precision(family: str, backend: str) -> None:
    model = tiny_model(family, backend, double=True)
    run, final = replay(model)
    with torch.no_grad():
        expected = model(TOKENS)[ROWS, AT]
    # the norms of transformers are taken in float32 whatever the type
    assert torch.allclose(logits(run, final), expected, atol=1e-10 if backend == "hooked" else 1e-5)


@pytest.mark.parametrize("start", [0, 5, 12])
def test_every_start_gives_the_same_end(model, start: int) -> None:
    run, final = replay(model)
    for layer in range(4):
        again = run.run(Entry(layer, copies=2), run.window(start))
        assert torch.allclose(again, final.repeat(2, 1), atol=1e-5)
    for layer in range(3):
        for stage in ("mid", "post"):
            again = run.run(Entry(layer, stage), run.window(start))
            assert torch.allclose(again, final, atol=1e-5)


@pytest.mark.parametrize("name", POINT_NAMES)
def test_points_see_and_change_what_hooks_do(name: str, model) -> None:
    """The last layer included, where only the asked position goes on."""
    run, _ = replay(model)
    for layer in (1, 2):
        hook = f"blocks.{layer}.{name}"
        if hook not in model.hook_dict:
            continue
        seen: dict[str, torch.Tensor] = {}
        run.variant(TOKENS, 5, keeping(seen, [hook]))
        with torch.no_grad():
            expected = model.run_with_cache(TOKENS, names_filter=[hook])[1][hook]
        positions = 2 if name == "attn.hook_pattern" else 1
        assert torch.allclose(
            seen[hook], expected.narrow(positions, 5, len(TOKENS[0]) - 5), atol=5 * TINY
        )
        if name == "hook_resid_mid":
            continue  # what an edit reaches there differs between the model classes

        def change(x: torch.Tensor, hook: Any) -> torch.Tensor:
            return x + 0.1 * x.roll(1, -1)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.warn", lambda *args, **options: None)
            with torch.no_grad(), model.hooks(fwd_hooks=[(hook, change)]):
                whole = model(TOKENS)[ROWS, AT]
        late = run.run(Entry(0, hooks=[(hook, change)]), run.window(0))
        assert torch.allclose(logits(run, late), whole, atol=2e-5)


@pytest.mark.parametrize("name", ["attn.hook_z", "hook_attn_out", "mlp.hook_post", "hook_mlp_out"])
@pytest.mark.parametrize("layer", [1, 2])
def test_what_is_known_is_not_computed(model, name: str, layer: int) -> None:
    arithmetic = Arithmetic.of(model, TOKENS)
    assert arithmetic is not None
    run, hook = Replay(arithmetic, TOKENS, AT), f"blocks.{layer}.{name}"
    seen: dict[str, torch.Tensor] = {}
    final = run.record(keeping(seen, [hook]))
    window = run.window(7)
    values = {hook: seen[hook][:, window]}
    again = run.run(Entry(layer, values=values), window)
    assert torch.allclose(again, final, atol=1e-5)

    def roll(x: torch.Tensor, hook: Any) -> torch.Tensor:
        return x.roll(1, -1)

    with_hook = run.run(Entry(layer, hooks=[(hook, roll)], values=values), window)
    assert torch.allclose(with_hook, run.run(Entry(layer, hooks=[(hook, roll)]), window), atol=1e-5)
    assert not torch.allclose(with_hook, final, atol=1e-3)


def test_other_tokens_share_the_beginning(model) -> None:
    run, _ = replay(model)
    other = TOKENS.clone()
    other[:, 6:] = random_tokens(batch_size=3, length=17, seed=3)[:, 1:]
    final = run.variant(other, 6)
    with torch.no_grad():
        assert torch.allclose(logits(run, final), model(other)[ROWS, AT], atol=1e-5)


def test_gradients_are_the_models(model) -> None:
    run, _ = replay(model)
    stream = run.pre[1][:, 4:22].clone().requires_grad_(True)
    logits(run, run.run(Entry(1, stream=stream), run.window(4)))[:, 7].sum().backward()
    held = {}

    def leaf(x: torch.Tensor, hook: Any) -> torch.Tensor:
        held["x"] = x.detach().requires_grad_(True)
        return held["x"]

    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", leaf)]):
        model(TOKENS)[ROWS, AT][:, 7].sum().backward()
    expected = held["x"].grad[:, 4:22]
    assert torch.allclose(stream.grad, expected, atol=1e-5 * float(expected.abs().max()))


def test_bfloat16_agrees_as_far_as_its_digits(model) -> None:
    import copy

    half = copy.deepcopy(model).to(torch.bfloat16)
    if hasattr(half.cfg, "dtype"):
        half.cfg.dtype = torch.bfloat16
    arithmetic = Arithmetic.of(half, TOKENS)
    assert arithmetic is not None
    run = Replay(arithmetic, TOKENS, AT)
    final = run.record()
    assert final.dtype == torch.bfloat16
    _, exact = replay(model)
    assert float((final.float() - exact).norm() / exact.norm()) < 0.1


def test_a_model_that_is_more_than_its_weights_is_left_alone(model) -> None:
    """Somebody's module or hook takes part: the model has to run by itself."""
    handle = model.blocks[1].register_forward_hook(
        lambda module, args, out: (2 * out[0], *out[1:]) if isinstance(out, tuple) else 2 * out
    )
    try:
        assert Arithmetic.of(model, TOKENS) is None
    finally:
        handle.remove()
    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", lambda x, hook: x)]):
        assert Arithmetic.of(model, TOKENS) is None
    assert Arithmetic.of(model, TOKENS) is not None


def test_which_hooks_are_points() -> None:
    assert replayable(["hook_embed", "blocks.3.attn.hook_z", "ln_final.hook_scale"])
    assert not replayable(["blocks.3.attn.hook_rot_q"])
    assert not replayable(["unembed.hook_in"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gated_product_is_that_of_torch(dtype: torch.dtype) -> None:
    gate = torch.randn(70, 1000, generator=torch.Generator().manual_seed(0)).to(dtype) * 10
    gate[0, :4] = torch.tensor([0.0, 1e4, -1e4, -30.0])
    linear = torch.randn(70, 1000, generator=torch.Generator().manual_seed(1)).to(dtype)
    usual = torch.nn.functional.gelu(gate.double(), approximate="tanh") * linear.double()
    off = (gelu_times(gate, linear).double() - usual).abs()
    # torch rounds 1 + tanh, which is near 0 for large negative numbers, to the type's last digit at 1
    assert bool((off <= 8 * torch.finfo(dtype).eps * (gate * linear).double().abs()).all())
