"""Tree SAE inference against a loop over tokens and features."""

import pytest
import torch

from gemmascope_plugin.errors import ModelError, UnknownNameError, WidthMismatchError
from gemmascope_plugin.saes import TreeSAE, TreeSAEConfig

D, SIZES, K = 6, (4, 6, 8), (2, 3, 2)


def tree(**changes) -> TreeSAE:
    rng = torch.Generator().manual_seed(0)
    decoder = torch.randn(sum(SIZES), D, generator=rng)
    parent = torch.tensor([-1] * 4 + [0, 0, 1, 2, 3, -1] + [4, 5, 0, -1, 9, 6, 7, 8])
    cfg = TreeSAEConfig(
        d_in=D, features_per_layer=SIZES, k_per_layer=K, hook_name="blocks.0.hook_resid_pre"
    )
    given = {
        "W_enc": decoder.T.clone(),
        "W_dec": decoder,
        "b_dec": torch.randn(D, generator=rng) / 10,
        "parent": parent,
    }
    return TreeSAE(cfg, **{**given, **changes})


def slow_encode(sae: TreeSAE, token: torch.Tensor) -> torch.Tensor:
    x = (token - token.mean()) / (token.std() + 1e-5) - sae.b_dec
    acts = torch.zeros(sum(SIZES))
    start = 0
    for size, k in zip(SIZES, K, strict=True):
        candidates = []
        for i in range(start, start + size):
            parent = int(sae.parent[i])
            if parent == -1 or acts[parent] > 1e-3:
                candidates.append((float((x * sae.W_enc[:, i]).sum()), i))
        for value, i in sorted(candidates, reverse=True)[:k]:
            acts[i] = max(value, 0.0)
        start += size
    return acts


def tokens() -> torch.Tensor:
    return 3 * torch.randn(40, D, generator=torch.Generator().manual_seed(1)) + 2


def test_it_equals_the_loop() -> None:
    sae, x = tree(), tokens()
    acts = sae.encode(x)
    torch.testing.assert_close(acts, torch.stack([slow_encode(sae, token) for token in x]))
    assert ((acts > 0).sum(-1) <= sum(K)).all() and (acts > 0).any()
    torch.testing.assert_close(sae.encode(x.reshape(5, 8, D)), acts.reshape(5, 8, -1))


def test_every_active_feature_has_active_ancestors() -> None:
    sae = tree()
    acts = sae.encode(tokens())
    assert sae.ancestors(10) == [4, 0] and sae.ancestors(13) == []
    for i in range(sum(SIZES)):
        for above in sae.ancestors(i):
            assert (acts[:, above][acts[:, i] > 0] > 1e-3).all()


def test_decoding_puts_mean_and_deviation_back_and_prefixes_add_up() -> None:
    sae, x = tree(), tokens()
    acts = sae.encode(x)
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    torch.testing.assert_close(sae(x), (acts @ sae.W_dec + sae.b_dec) * std + mean)
    torch.testing.assert_close(sae.decode(acts, x, layers=3), sae(x))
    difference = sae.decode(acts, x, layers=2) - sae.decode(acts, x, layers=1)
    torch.testing.assert_close(difference, acts[:, 4:10] @ sae.W_dec[4:10] * std)


def test_scaled_and_shifted_tokens_have_the_same_features() -> None:
    sae, x = tree(), tokens()
    torch.testing.assert_close(sae.encode(2 * x + 5), sae.encode(x), rtol=1e-4, atol=1e-4)


def test_refusals() -> None:
    with pytest.raises(ModelError, match="feature 5 of layer 1 has parent 7"):
        parent = tree().parent.clone()
        parent[5] = 7
        tree(parent=parent)
    with pytest.raises(WidthMismatchError, match="has width 6, the tensor has 5"):
        tree().encode(torch.ones(1, 5))
    with pytest.raises(UnknownNameError, match="no prefix of 4 layers"):
        tree().decode(torch.zeros(1, 18), torch.ones(1, 6), layers=4)
