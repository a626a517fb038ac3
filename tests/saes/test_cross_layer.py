"""Dictionaries over several layers: edits, gradients, and errors that name the layer."""

import pytest
import torch

from gemmascope_plugin.errors import ModelError, UnknownNameError
from gemmascope_plugin.saes import CrossLayerConfig, CrossLayerTranscoder, LayerWeights

N, D, F = 3, 5, 7


def clt(affine: bool = False) -> CrossLayerTranscoder:
    rng = torch.Generator().manual_seed(0)

    def fetch(i: int) -> LayerWeights:
        decoder = torch.randn(F, N, D, generator=rng)
        decoder[:, :i] = 0
        return LayerWeights(
            W_enc=torch.randn(D, F, generator=rng),
            b_enc=torch.randn(F, generator=rng),
            threshold=torch.rand(F, generator=rng),
            W_dec=decoder,
            b_dec=torch.randn(D, generator=rng),
            A=torch.randn(D, D, generator=rng) if affine else None,
        )

    cfg = CrossLayerConfig(
        kind="clt",
        layers=(0, 1, 2),
        hooks_in=tuple(f"blocks.{i}.mlp.hook_in" for i in range(N)),
        hooks_out=tuple(f"blocks.{i}.hook_mlp_out" for i in range(N)),
        d_in=D,
        d_out=D,
        d_sae=(F,) * N,
        affine=affine,
    )
    return CrossLayerTranscoder(cfg, fetch)


def x(*shape: int) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, D, generator=rng) for _ in range(N)]


def dense(made: CrossLayerTranscoder, acts, inputs) -> list[torch.Tensor]:
    outs = []
    for j in range(N):
        out = made.weights(j).b_dec
        for i in range(j + 1):
            out = out + acts[i] @ made.weights(i).W_dec[:, j]
        skip = made.weights(j).A
        outs.append(out if skip is None else out + inputs[j] @ skip)
    return outs


@pytest.mark.parametrize("affine", [False, True])
def test_gathered_decoding_equals_dense_decoding(affine: bool, monkeypatch) -> None:
    made, inputs = clt(affine), x(4)
    acts = made.encode(inputs)
    for actual, expected in zip(made.decode(acts, inputs), dense(made, acts, inputs), strict=True):
        torch.testing.assert_close(actual, expected)
    nothing = [torch.zeros_like(a) for a in acts]
    for actual, expected in zip(
        made.decode(nothing, inputs), dense(made, nothing, inputs), strict=True
    ):
        torch.testing.assert_close(actual, expected.expand_as(actual))


def test_an_edit_reaches_its_own_and_all_later_layers() -> None:
    made, inputs = clt(), x(2)
    acts = list(made.encode(inputs))
    before = made.decode(acts)
    acts[1] = acts[1] + torch.nn.functional.one_hot(torch.tensor(3), F) * 2.0
    after = made.decode(acts)
    torch.testing.assert_close(after[0], before[0])
    for j in (1, 2):
        torch.testing.assert_close(
            after[j] - before[j], (2 * made.weights(1).W_dec[3, j]).expand(2, D)
        )


def test_gradients_reach_inputs_through_active_features() -> None:
    made, inputs = clt(True), x(3)
    leaf = [x_i.clone().requires_grad_(True) for x_i in inputs]
    sum(out.square().sum() for out in made(leaf)).backward()
    again = [x_i.clone().requires_grad_(True) for x_i in inputs]
    sum(out.square().sum() for out in dense(made, made.encode(again), again)).backward()
    for a, b in zip(leaf, again, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_one_layer_needs_the_features_up_to_it_only() -> None:
    made, inputs = clt(), x(3)
    acts = made.encode(inputs)
    torch.testing.assert_close(made.decode_layer(1, acts[:2]), made.decode(acts)[1])
    with pytest.raises(ModelError, match="layer 2 needs the features of layers 0 to 2, got 2"):
        made.decode_layer(2, acts[:2])
    with pytest.raises(ModelError, match="affine skip, so decoding layer 0 needs its input"):
        clt(True).decode(acts)
    with pytest.raises(UnknownNameError, match="no layer at position 3"):
        made.weights(3)


def test_there_is_nothing_to_train_or_save() -> None:
    made = clt()
    made(x(1))
    assert not list(made.parameters()) and not made.state_dict()
