"""Matryoshka dictionaries for inference."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import randomised
from sae_lens import SAE, JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.saes.sae import SAEMetadata

from gemmascope_plugin import saes
from gemmascope_plugin.errors import ModelError, UnknownNameError, WidthMismatchError
from gemmascope_plugin.saes import MatryoshkaSAE, MatryoshkaSAEConfig
from gemmascope_plugin.saes.registration import register_class
from gemmascope_plugin.splice import HookedSAE, splice
from tests import factories
from tests.tiny_models import random_tokens

D, LEVELS = 6, (3, 8, 20)
SITE = "blocks.1.hook_resid_post"


def config(**changes: Any) -> MatryoshkaSAEConfig:
    fields = {"d_in": D, "d_sae": LEVELS[-1], "levels": LEVELS, "apply_b_dec_to_input": False}
    return MatryoshkaSAEConfig(**{**fields, **changes})


def matryoshka(**changes: Any) -> MatryoshkaSAE:
    return randomised(MatryoshkaSAE(config(**changes)))


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(1))


def plain(sae: MatryoshkaSAE) -> JumpReLUSAE:
    """SAELens' own class on the same parameters."""
    cfg = sae.cfg
    peer = JumpReLUSAE(
        JumpReLUSAEConfig(
            d_in=cfg.d_in, d_sae=cfg.d_sae, apply_b_dec_to_input=cfg.apply_b_dec_to_input
        )
    )
    peer.load_state_dict(sae.state_dict())
    return peer


@pytest.mark.parametrize("subtracts", [False, True])
@pytest.mark.parametrize("level", [None, -1, 2])
def test_the_last_level_is_saelens_jumprelu(subtracts: bool, level: int | None) -> None:
    sae, x = matryoshka(apply_b_dec_to_input=subtracts), tokens(2, 5)
    acts = sae.encode(x, level)
    assert torch.equal(acts, plain(sae).encode(x)) and (acts > 0).any()
    assert torch.equal(sae.decode(acts, level), plain(sae).decode(acts))
    assert torch.equal(sae(x), plain(sae)(x))


@pytest.mark.parametrize("level", [0, 1, -2])
def test_a_level_is_the_dictionary_of_its_first_features(level: int) -> None:
    sae, x = matryoshka(apply_b_dec_to_input=True), tokens(2, 5)
    width = LEVELS[level]
    acts = sae.encode(x, level=level)
    torch.testing.assert_close(acts, sae.encode(x)[..., :width])
    expected = acts @ sae.W_dec[:width] + sae.b_dec
    torch.testing.assert_close(sae.decode(acts, level=level), expected)
    torch.testing.assert_close(sae.decode(sae.encode(x), level=level), expected)
    small = sae.truncate(level)
    assert type(small) is JumpReLUSAE and small.cfg.d_sae == width
    torch.testing.assert_close(small.encode(x), acts)
    torch.testing.assert_close(small(x), expected)


@settings(deadline=None, max_examples=25)
@given(st.sets(st.integers(1, 19)).map(lambda s: (*sorted(s), 20)), st.integers(0, 99))
def test_prefix_additivity(levels: tuple[int, ...], seed: int) -> None:
    sae = randomised(MatryoshkaSAE(config(levels=levels, dtype="float64")), seed)
    x = tokens(7).double()
    acts = sae.encode(x)
    for i in range(len(levels) - 1):
        step = sae.decode(acts, i + 1) - sae.decode(acts, i)
        between = slice(levels[i], levels[i + 1])
        torch.testing.assert_close(step, acts[:, between] @ sae.W_dec[between])
    torch.testing.assert_close(sae.decode(acts, len(levels) - 1), sae(x))


def test_truncating_copies_and_says_what_is_left(tmp_path) -> None:
    metadata = SAEMetadata(hook_name=SITE, l0=40, gemmascope_spec={"d_sae": 20})
    sae = matryoshka(metadata=metadata).eval().requires_grad_(False)
    small = sae.truncate(1)
    assert small.cfg.metadata.levels == [3, 8] and small.cfg.metadata.hook_name == SITE
    assert small.cfg.metadata.l0 is None and small.cfg.metadata.gemmascope_spec is None
    assert not small.training and not any(p.requires_grad for p in small.parameters())
    whole = sae.W_enc.clone()
    small.W_enc.zero_()
    assert torch.equal(sae.W_enc, whole)
    small.save_model(tmp_path)
    again = SAE.load_from_disk(tmp_path)
    assert type(again) is JumpReLUSAE and torch.equal(again.W_dec, small.W_dec)
    assert saes.level_width(again, 0) == 3


@pytest.mark.parametrize("load", [SAE.load_from_disk, MatryoshkaSAE.load_from_disk])
def test_saving_and_loading_is_exact(tmp_path, load: Any) -> None:
    sae = matryoshka(metadata=SAEMetadata(hook_name=SITE))
    sae.save_model(tmp_path)
    again = load(tmp_path)
    assert type(again) is MatryoshkaSAE
    assert again.cfg.levels == LEVELS and again.cfg.metadata.levels == list(LEVELS)
    assert again.cfg == sae.cfg
    for name, value in sae.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    assert torch.equal(again.encode(tokens(4), 0), sae.encode(tokens(4), 0))


def test_unknown_and_contradicting_settings(tmp_path) -> None:
    matryoshka().save_model(tmp_path)
    path = tmp_path / "cfg.json"
    good = json.loads(path.read_text())
    path.write_text(json.dumps({**good, "lvels": [20]}))
    with pytest.raises(UnknownNameError, match="no setting 'lvels'.*mean 'levels'"):
        MatryoshkaSAE.load_from_disk(tmp_path)
    path.write_text(json.dumps({k: v for k, v in good.items() if k != "levels"}))
    with pytest.raises(ModelError, match="needs levels"):
        SAE.load_from_disk(tmp_path)
    path.write_text(json.dumps({**good, "levels": [3, 20]}))
    with pytest.raises(ModelError, match=r"has levels \[3, 20\], its metadata say \[3, 8, 20\]"):
        SAE.load_from_disk(tmp_path)
    with pytest.raises(ModelError, match="exceeds the 20 features"):
        config(levels=(3, 21))


def test_levels_and_widths_that_do_not_exist() -> None:
    sae = matryoshka()
    with pytest.raises(UnknownNameError, match="no level 3.*level 0: 3 features"):
        sae.encode(tokens(1), 3)
    with pytest.raises(UnknownNameError, match="no level -4"):
        sae.truncate(-4)
    with pytest.raises(WidthMismatchError, match="have 3 features, level 1 has 8 of 20"):
        sae.decode(torch.zeros(1, 3), 1)
    with pytest.raises(WidthMismatchError, match="have 8 features, level None has 20"):
        sae.decode(sae.encode(tokens(1), 1))


def test_registering_twice_changes_nothing_and_a_foreign_class_is_refused(monkeypatch) -> None:
    name = MatryoshkaSAEConfig.architecture()
    register_class(MatryoshkaSAE, MatryoshkaSAEConfig)
    assert SAE_CLASS_REGISTRY[name] == (MatryoshkaSAE, MatryoshkaSAEConfig)
    monkeypatch.setitem(SAE_CLASS_REGISTRY, name, (JumpReLUSAE, JumpReLUSAEConfig))
    with pytest.raises(ModelError, match="already has a class.*JumpReLUSAE"):
        register_class(MatryoshkaSAE, MatryoshkaSAEConfig)


def test_lazy_names_resolve_and_others_are_errors() -> None:
    assert all(getattr(saes, name) is not None for name in saes.__all__)
    with pytest.raises(AttributeError, match="no attribute 'MatryoshkaSEA'"):
        _ = saes.MatryoshkaSEA


@torch.no_grad()
@pytest.mark.parametrize("level", [0, 1, None])
def test_it_splices_at_a_level(hooked2, level: int | None) -> None:
    flat = factories.residual(hooked2, 1)
    sae = saes.with_levels(flat, (8, 32, factories.D_SAE))
    saes.check_architecture(sae)
    x = factories.activations(hooked2, random_tokens(), SITE)
    with splice(hooked2, HookedSAE(sae, error="drop", level=level)) as spliced:
        _, cache = spliced.run_with_cache(random_tokens(), names_filter=lambda n: SITE in n)
    acts = cache[f"{SITE}.hook_sae_acts_post"][:, 1:]
    torch.testing.assert_close(acts, sae.encode(x, level)[:, 1:], rtol=1e-4, atol=1e-5)
    out = sae.decode(acts, level)
    recons = cache[f"{SITE}.hook_sae_recons"][:, 1:]
    torch.testing.assert_close(recons, out, rtol=1e-4, atol=1e-5)
