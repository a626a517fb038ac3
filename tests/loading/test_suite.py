"""Suites open lazily and stay under the budget; footprints are right on models of known size."""

import pytest
import torch
from npz_files import D_IN, arrays, save, spec

from gemmascope_plugin.catalog import find
from gemmascope_plugin.errors import (
    AmbiguousSpecError,
    EmptySelectionError,
    GemmaScopeError,
    MissingFileError,
    UnknownNameError,
)
from gemmascope_plugin.loading import footprint, load_suite
from gemmascope_plugin.loading import sae_suite as suite_module

SIZE = spec().nbytes


@pytest.fixture
def specs(tmp_path):
    made = [spec(layer=layer, repo_id=str(tmp_path)) for layer in range(4)]
    for sae_spec in made:
        save(tmp_path / sae_spec.filename, **arrays())
    return made


@pytest.fixture
def opened(monkeypatch) -> list:
    layers, real = [], suite_module.load

    def counted(sae_spec, **options):
        layers.append(sae_spec.layer)
        return real(sae_spec, **options)

    monkeypatch.setattr(suite_module, "load", counted)
    return layers


def test_it_opens_when_asked_and_once(specs, opened) -> None:
    suite = load_suite(specs)
    assert len(suite) == 4 and list(suite) == specs and opened == []
    first = suite[2]
    assert suite["blocks.2.hook_resid_post"] is first and suite[specs[2]] is first
    assert suite[specs[2].release, specs[2].sae_id] is first and opened == [2]
    assert first.cfg.metadata.layer == 2 and first.W_enc.shape[0] == D_IN
    assert 3 in suite and 7 not in suite and "blocks.9.hook_resid_post" not in suite
    assert [sae.cfg.metadata.layer for sae in suite.values()] == [0, 1, 2, 3]
    suite.close()
    assert suite.open_specs == ()


def test_least_recently_used_ones_go_first(specs, opened) -> None:
    suite = load_suite(specs, memory_budget=2 * SIZE)
    suite[0], suite[1], suite[0], suite[2]
    assert suite.open_specs == (specs[0], specs[2]) and suite.open_nbytes == 2 * SIZE
    suite[0], suite[1]
    assert suite.open_specs == (specs[0], specs[1]) and opened == [0, 1, 2, 1]
    half = load_suite(specs, memory_budget=2 * SIZE, dtype=torch.bfloat16)
    assert [half[layer].W_enc.dtype for layer in range(4)] == [torch.bfloat16] * 4
    assert len(half.open_specs) == 4


def test_it_says_what_it_is(specs) -> None:
    suite = load_suite(specs, memory_budget="4 kB")
    suite[0]
    assert repr(suite) == (
        "SaeSuite(4 dictionaries of gemma-2-test, 7.0 kB; 1 open, 1.8 kB; budget: 4.0 kB)"
    )


def test_a_suite_of_one_is_singular(specs) -> None:
    assert repr(load_suite(specs[:1])).startswith("SaeSuite(1 dictionary of gemma-2-test")


def test_files_come_from_where_it_is_told(hub_cache, tmp_path) -> None:
    """``local_dir``, ``revision`` and ``offline`` are those of ``load``, for every dictionary."""
    remote = spec(repo_id="google/gemma-scope-test", release="gemma-scope-test")
    for seed, revision in enumerate(("main", "v2")):
        hub_cache(remote, revision=revision, **arrays(seed=seed))
    save(tmp_path / "mirror" / remote.filename, **arrays(seed=2))
    options = ({}, {"revision": "v2"}, {"local_dir": tmp_path / "mirror", "offline": True})
    for seed, where in enumerate(options):
        (sae,) = load_suite([remote], **where).values()
        assert torch.equal(sae.W_enc, torch.from_numpy(arrays(seed=seed)["W_enc"]))
    suite = load_suite([remote], revision="v3", offline=True)  # looked for at the first use
    with pytest.raises(MissingFileError, match="offline mode is on.*--revision v3"):
        suite[remote]
    with pytest.raises(MissingFileError, match="in local_dir"):
        load_suite([remote], local_dir=tmp_path / "nowhere")[remote]


def test_refusals(specs) -> None:
    suite = load_suite([*specs, spec("transcoder", "mlp", layer=1)])
    with pytest.raises(AmbiguousSpecError, match="1 means 2 dictionaries of the suite"):
        suite[1]
    with pytest.raises(UnknownNameError, match="Did you mean 'blocks.1.hook_resid_post'"):
        suite["blocks.1.hook_resid_pots"]
    with pytest.raises(
        UnknownNameError, match="7 is not in the suite. There is: layers 0, 1, 2, 3"
    ):
        suite[7]
    with pytest.raises(GemmaScopeError, match=r"has 1.8 kB of weights, the budget is 1.0 kB"):
        load_suite(specs, memory_budget=1000)
    with pytest.raises(EmptySelectionError):
        load_suite([])
    with pytest.raises(GemmaScopeError, match="twice"):
        load_suite([specs[0], specs[0]])


def test_published_sizes_of_models() -> None:
    billions = {"gemma-2-2b": 2.61, "gemma-2-9b": 9.24, "gemma-2-27b": 27.23, "gemma-3-4b": 3.88}
    from gemmascope_plugin.loading.footprint import MODELS

    for name, size in billions.items():
        assert MODELS[name].n_parameters / 1e9 == pytest.approx(size, abs=0.01)
    assert MODELS["gemma-3-270m"].n_parameters / 1e6 == pytest.approx(268, abs=1)
    assert MODELS["gemma-3-1b"].n_parameters / 1e6 == pytest.approx(1000, abs=1)


def test_a_footprint() -> None:
    sae_spec = find(model="2b", site="res", layer=20, width="16k", l0="canonical").one()
    made = footprint("google/gemma-2-2b", [sae_spec, sae_spec], torch.bfloat16, 100)
    assert made.dictionaries == 2 * sae_spec.nbytes // 2
    assert made.activations == 100 * 2 * 2 * (2 * 16384 + 2 * 2304)
    assert made.model == 2 * (2_614_341_888 + 256_000 * 2304)
    assert made.logits == 100 * 256_000 * 4
    assert made.total == made.model + made.dictionaries + made.activations + made.logits
    assert repr(made).splitlines()[0] == "Footprint in bfloat16"
    assert repr(made).splitlines()[2].split() == ["2", "dictionaries", "302.1", "MB"]
    alone = footprint(None, sae_spec)
    assert alone.total == alone.dictionaries + alone.activations
    with pytest.raises(UnknownNameError, match="Did you mean 'gemma-2-2b'"):
        footprint("gemma-2-2c", sae_spec)


def test_a_loaded_model_is_measured() -> None:
    class Model(torch.nn.Linear):
        cfg = type("Cfg", (), {"d_vocab": 11})()

    made = footprint(Model(3, 5), [], torch.float32, 7)
    assert (made.model, made.logits) == (4 * 20, 4 * 7 * 11)
