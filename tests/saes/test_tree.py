"""Tree SAE inference against a loop over tokens and features."""

import json
from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import SAE
from safetensors.torch import load_file, save_file

from gemmascope_plugin.errors import (
    FeatureIndexError,
    ModelError,
    UnknownNameError,
    WidthMismatchError,
)
from gemmascope_plugin.saes import TreeSAE, TreeSAEConfig
from gemmascope_plugin.saes.tree_config import from_digits, to_digits

D, SIZES, K = 6, (4, 6, 8), (2, 3, 2)
N = sum(SIZES)
PARENT = torch.tensor([-1] * 4 + [0, 0, 1, 2, 3, -1] + [4, 5, 0, -1, 9, 6, 7, 8])


def config(**changes: Any) -> TreeSAEConfig:
    fields: dict[str, Any] = {"d_in": D, "d_sae": N, "features_per_layer": SIZES, "k_per_layer": K}
    cfg = TreeSAEConfig(**{**fields, **changes})
    cfg.metadata.hook_name = "blocks.0.hook_resid_pre"
    return cfg


def tree(seed: int = 0, parent: torch.Tensor = PARENT, **changes: Any) -> TreeSAE:
    rng = torch.Generator().manual_seed(seed)
    sae = TreeSAE(config(**changes))
    decoder = torch.randn(N, D, generator=rng)
    state = {"W_enc": decoder.T, "W_dec": decoder, "parent": parent}
    state["b_dec"] = torch.randn(D, generator=rng) / 10
    if sae.cfg.has_thresholds:
        state["threshold"] = torch.rand(N, generator=rng)
    sae.load_state_dict(state)
    return sae.requires_grad_(False).eval()


def slow_encode(sae: TreeSAE, token: torch.Tensor) -> torch.Tensor:
    if sae.cfg.normalize_activations == "layer_norm":
        token = (token - token.mean()) / (token.std() + 1e-5)
    x = token - sae.b_dec if sae.cfg.apply_b_dec_to_input else token
    acts = torch.zeros(N)
    start = 0
    for size, k in zip(SIZES, sae.cfg.k_per_layer, strict=True):
        candidates = []
        for i in range(start, start + size):
            parent = int(sae.parent[i])
            value = float((x * sae.W_enc[:, i]).sum())
            is_open = parent == -1 or acts[parent] > 1e-3 or sae.cfg.gate == "none"
            if is_open and (k is not None or value > sae.threshold[i]):
                candidates.append((value, i))
        for value, i in sorted(candidates, reverse=True)[:k]:
            acts[i] = max(value, 0.0)
        start += size
    return acts


def tokens(n: int = 40) -> torch.Tensor:
    return 3 * torch.randn(n, D, generator=torch.Generator().manual_seed(1)) + 2


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gate": "none"},
        {"k_per_layer": (2, None, 2)},
        {"k_per_layer": (None, None, None), "normalize_activations": "none"},
        {"apply_b_dec_to_input": False},
    ],
)
def test_it_equals_the_loop(changes) -> None:
    sae, x = tree(**changes), tokens()
    acts = sae.encode(x)
    torch.testing.assert_close(acts, torch.stack([slow_encode(sae, token) for token in x]))
    assert (acts > 0).any()
    for (start, stop, k), size in zip(sae.cfg.layers, SIZES, strict=True):
        assert ((acts[:, start:stop] > 0).sum(-1) <= (k or size)).all()
    torch.testing.assert_close(sae.encode(x.reshape(5, 8, D)), acts.reshape(5, 8, -1))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), seed=st.integers(0, 1000), jumps=st.booleans())
def test_the_gate_is_never_violated(data, seed: int, jumps: bool) -> None:
    """Any tree, weights and tokens: whoever is active has active ancestors up to the root."""
    above = [-1] * SIZES[0]
    for start, size in ((4, 6), (10, 8)):
        above += [data.draw(st.integers(-1, start - 1)) for _ in range(size)]
    ks = (2, None, None) if jumps else K
    sae = tree(seed, torch.tensor(above), k_per_layer=ks)
    acts = sae.encode(tokens(20))
    for i in range(N):
        line, parent = [], above[i]
        while parent != -1:
            line.append(parent)
            parent = above[parent]
        assert sae.ancestors(i) == line
        assert (acts[:, line][acts[:, i] > 0] > 1e-3).all()


def test_decoding_puts_mean_and_deviation_back_and_prefixes_add_up() -> None:
    sae, x = tree(), tokens()
    acts = sae.encode(x)
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    torch.testing.assert_close(sae(x), (acts @ sae.W_dec + sae.b_dec) * std + mean)
    torch.testing.assert_close(sae.decode(acts, x, layers=3), sae(x))
    difference = sae.decode(acts, x, layers=2) - sae.decode(acts, x, layers=1)
    torch.testing.assert_close(difference, acts[:, 4:10] @ sae.W_dec[4:10] * std)


def test_another_tokens_deviation_is_never_used() -> None:
    sae, x, other = tree(), tokens(), 7 * tokens() + 3
    acts = sae.encode(x)
    sae.encode(other)  # SAELens' layer_norm would decode with this one's
    torch.testing.assert_close(sae.decode(acts), sae.decode(acts, x))
    torch.testing.assert_close(sae.decode(acts), sae.decode(acts))
    for unknown in (acts.clone(), acts[:3], torch.zeros(40, N)):
        with pytest.raises(ModelError, match=r"not the tensor that encode returned.*like=x"):
            sae.decode(unknown)
    plain = tree(normalize_activations="none")
    torch.testing.assert_close(plain.decode(acts.clone()), acts @ plain.W_dec + plain.b_dec)


def test_a_hook_that_puts_back_old_activations_is_decoded_at_the_new_tokens() -> None:
    sae, x, other = tree(), tokens(), 7 * tokens() + 3
    old = sae.encode(x)
    with sae.hooks(fwd_hooks=[("hook_sae_acts_post", lambda acts, hook: old)]):
        out = sae(other)
    torch.testing.assert_close(out, sae.decode(old, other))
    torch.testing.assert_close(sae.decode(old), sae.decode(old, x))


def test_scaled_and_shifted_tokens_have_the_same_features() -> None:
    sae, x = tree(), tokens()
    torch.testing.assert_close(sae.encode(2 * x + 5), sae.encode(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("k", [K, (2, None, 2)])
def test_it_is_saved_and_loaded_by_saelens(tmp_path, k) -> None:
    sae, x = tree(k_per_layer=k), tokens()
    sae.W_enc.data = sae.W_enc.data.T.contiguous().T  # as a mapped file has it
    sae.save_model(tmp_path)
    for loaded in (SAE.load_from_disk(tmp_path), TreeSAE.load_from_disk(tmp_path)):
        assert type(loaded) is TreeSAE
        assert loaded.cfg.to_dict() == sae.cfg.to_dict()
        assert loaded.parent.dtype == torch.int64
        for name, value in sae.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name
        assert torch.equal(loaded(x), sae(x))
    half = SAE.load_from_disk(tmp_path, dtype="bfloat16")
    assert half.W_enc.dtype == torch.bfloat16 and torch.equal(half.parent, sae.parent)


@given(parents=st.lists(st.integers(-1, 2**32 - 2), max_size=20))
def test_digits_survive_every_type(parents: list[int]) -> None:
    given_parents = torch.tensor(parents, dtype=torch.int64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(from_digits(to_digits(given_parents).to(dtype)), given_parents)
    assert torch.tensor([1001]).bfloat16().long() == 1000


def test_the_tree_is_an_attention_dictionary_too() -> None:
    sae = tree()
    sae.cfg.metadata.hook_name = "blocks.0.attn.hook_z"
    sae.turn_on_forward_pass_hook_z_reshaping()
    x = tokens()
    heads = x.reshape(4, 10, 3, 2)
    torch.testing.assert_close(sae(heads).flatten(-2).flatten(0, 1), tree()(x))
    torch.testing.assert_close(sae.decode(sae.encode(heads).clone(), heads), sae(heads))


def test_families_and_export() -> None:
    sae = tree()
    assert sae.parent_of(10) == 4 and sae.parent_of(13) == -1
    assert sae.children_of(0) == [4, 5, 12] and sae.children_of(10) == []
    assert sae.children_of(-1) == [0, 1, 2, 3, 9, 13]
    assert sae.ancestors(10) == [4, 0] and sae.ancestors(13) == []
    edges = sae.edges().tolist()
    assert edges == [[p, c] for c, p in enumerate(PARENT.tolist()) if p != -1]
    frame = sae.to_frame()
    assert isinstance(frame, pd.DataFrame) and list(frame.parent) == PARENT.tolist()
    assert list(frame.depth) == [len(sae.ancestors(i)) for i in range(N)]
    assert list(frame.n_children) == [len(sae.children_of(i)) for i in range(N)]
    assert list(frame.layer) == [0] * 4 + [1] * 6 + [2] * 8
    for look in (sae.parent_of, sae.children_of, sae.ancestors):
        with pytest.raises(FeatureIndexError, match="Feature 18 does not exist.*0 to 17"):
            look(18)


@pytest.mark.parametrize(
    ("child", "parent", "match"),
    [
        (5, 7, "feature 5 of layer 1 has parent 7, which is in no earlier layer.*0 to 3"),
        (5, 5, "feature 5 of layer 1 has parent 5, which is in no earlier layer"),
        (5, 12, "which is in no earlier layer"),
        (5, 18, "has parent 18, which does not exist"),
        (17, -2, "feature 17 of layer 2 has parent -2, which does not exist"),
        (0, 1, "feature 0 of layer 0 has parent 1.*-1 for the root, in the first layer"),
    ],
)
def test_cycles_and_orphans(child: int, parent: int, match: str) -> None:
    wrong = PARENT.clone()
    wrong[child] = parent
    with pytest.raises(ModelError, match=match):
        tree(parent=wrong)


def test_what_is_no_tree_is_not_loaded_from_a_file_either(tmp_path) -> None:
    sae = tree()
    sae.save_model(tmp_path)
    weights = tmp_path / "sae_weights.safetensors"
    state = load_file(weights)
    sae.parent[4] = 10
    save_file({**state, "parent_digits": to_digits(sae.parent)}, weights)
    with pytest.raises(ModelError, match="feature 4 of layer 1 has parent 10"):
        SAE.load_from_disk(tmp_path)
    with pytest.raises(ModelError, match="feature 4 of layer 1 has parent 10"):
        sae.save_model(tmp_path)
    with pytest.raises(WidthMismatchError, match=r"parent has shape \[17\].*18 features"):
        tree(parent=PARENT[:-1])
    with pytest.raises(ModelError, match="parent has type torch.float32"):
        tree(parent=PARENT.float())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"k_per_layer": (2, 7, 2)}, "layer 1 has 6 features and k = 7.*1 to 6"),
        ({"k_per_layer": (2, 0, 2)}, "layer 1 has 6 features and k = 0"),
        ({"k_per_layer": (2, 3)}, "3 layers of features and 2 values of k"),
        ({"features_per_layer": (4, 6, 0)}, "not a positive number of features"),
        ({"features_per_layer": (), "k_per_layer": ()}, "not a positive number of features"),
        ({"features_per_layer": (4, 6, 9)}, "are 19, but d_sae is 18"),
        ({"normalize_activations": "expected_average_only_in"}, "'layer_norm' .* and 'none'"),
    ],
)
def test_impossible_configs(changes, match: str) -> None:
    with pytest.raises(ModelError, match=match):
        config(**changes)


def test_unknown_config_keys_are_errors(tmp_path) -> None:
    tree().save_model(tmp_path)
    path = tmp_path / "cfg.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "k_per_layr": [1]}))
    with pytest.raises(
        UnknownNameError, match="no setting 'k_per_layr'.*Did you mean 'k_per_layer'"
    ):
        TreeSAE.load_from_disk(tmp_path)


def test_refusals() -> None:
    with pytest.raises(WidthMismatchError, match="has width 6, the tensor has 5"):
        tree().encode(torch.ones(1, 5))
    with pytest.raises(UnknownNameError, match="no prefix of 4 layers"):
        tree().decode(torch.zeros(1, N), torch.ones(1, 6), layers=4)
    with pytest.raises(ModelError, match="would change which features"):
        tree().fold_W_dec_norm()
