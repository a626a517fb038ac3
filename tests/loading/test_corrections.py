"""What SAELens 6.54 gets wrong about Gemma Scope 2, and that it is right after register().

Each test shows the stock behaviour first.  SAELens reads shapes of Gemma Scope 2 files over HTTP even
when they are cached; where that is not the point, a stand-in gives it the local header.
"""

import copy
from dataclasses import replace

import pytest
import torch
from gemma_scope_2_files import put_single, skip
from npz_files import arrays

from gemmascope_plugin.catalog import find
from gemmascope_plugin.errors import GemmaScopeError
from gemmascope_plugin.loading import load, register, spec_of
from gemmascope_plugin.loading.arrays import safetensors_arrays

AFFINE = ("gemma-scope-2-270m-it-transcoders-all", "layer_3_width_16k_l0_small_affine")
ATTENTION = ("gemma-scope-2-270m-it-att-all", "layer_3_width_16k_l0_small")


@pytest.fixture
def stock():
    """SAELens as it comes; put back afterwards."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    get_pretrained_saes_directory.cache_clear()
    yield
    get_pretrained_saes_directory.cache_clear()


@pytest.fixture
def cached(hub_cache, tmp_path, monkeypatch):
    """Put a Gemma Scope 2 file of real width into the hub cache; SAELens may read its header."""
    from sae_lens.loading import pretrained_sae_loaders

    def put(release: str, sae_id: str, *, header: bool = True):
        sae_spec = next(spec for spec in find(release=release) if spec.sae_id == sae_id)
        commit = f"{4:040d}"
        repo = tmp_path / "hub" / f"models--{sae_spec.repo_id.replace('/', '--')}"
        (repo / "refs").mkdir(parents=True, exist_ok=True)
        (repo / "refs" / "main").write_text(commit)
        path = put_single(repo / "snapshots" / commit, sae_spec)

        def shapes(repo_id, filename):
            assert filename.endswith("params.safetensors")
            return {n: list(a.shape) for n, a in safetensors_arrays(path).items()}

        if header:
            monkeypatch.setattr(pretrained_sae_loaders, "get_safetensors_tensor_shapes", shapes)
        return sae_spec

    return put


def from_pretrained(release: str, sae_id: str):
    import warnings

    from sae_lens import SAE

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # SAELens' hint how to load the model
        return SAE.from_pretrained(release, sae_id)


def test_transcoders_read_the_norms_output_and_not_the_residual_stream(stock, cached) -> None:
    sae_spec = cached(*AFFINE)
    before = from_pretrained(*AFFINE).cfg.metadata
    assert before.hook_name == "blocks.3.hook_mlp_in"  # un-normalised, and off by default
    assert before.model_from_pretrained_kwargs is None
    register()
    after = from_pretrained(*AFFINE).cfg.metadata
    assert (after.hook_name, after.hook_name_out) == ("blocks.3.mlp.hook_in", sae_spec.hook_out)
    assert after.model_from_pretrained_kwargs == {"fold_ln": False}


def test_every_transcoder_that_saelens_lists_gets_its_hook(stock) -> None:
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    listed = copy.deepcopy(get_pretrained_saes_directory())
    specs = {(s.release, s.sae_id): s for s in find(kind="transcoder")}
    rows = [
        (release, sae_id)
        for release, row in listed.items()
        if release.startswith("gemma-scope-2-") and "transcoders" in release
        for sae_id in row.saes_map
    ]
    assert len(rows) == 3576
    for key in rows:
        sae_spec = specs[key]
        assert (
            sae_spec.hook_in == f"blocks.{sae_spec.layer}.mlp.hook_in" and sae_spec.gain == "with"
        )


def test_the_skip_keeps_its_orientation(stock, cached) -> None:
    sae_spec = cached(*AFFINE)
    register()
    sae, sliced = from_pretrained(*AFFINE), load(sae_spec)
    a = torch.from_numpy(skip(sae_spec.d_in))
    x = torch.randn(4, sae_spec.d_in, generator=torch.Generator().manual_seed(0))
    p = {
        n: torch.from_numpy(v)
        for n, v in arrays(sae_spec.d_in, sae_spec.d_sae, sae_spec.d_out).items()
    }
    pre = x @ p["W_enc"] + p["b_enc"]
    plain = (pre * (pre > p["threshold"])) @ p["W_dec"] + p["b_dec"]
    for each in (sae, sliced):
        torch.testing.assert_close(each(x), plain + x @ a, rtol=1e-3, atol=1e-2)
        assert not torch.allclose(each(x), plain + x @ a.T, rtol=1e-3, atol=1)
        # encode and decode alone, which is what SAELens' splice calls, lose the skip
        torch.testing.assert_close(each.decode(each.encode(x)), plain, rtol=1e-3, atol=1e-2)
    assert sae.W_skip.is_contiguous() and spec_of(sae) == sae_spec


def test_attention_dictionaries_take_the_heads_of_hook_z(stock, cached) -> None:
    sae_spec = cached(*ATTENTION)
    z = torch.randn(1, 3, 4, sae_spec.d_in // 4, generator=torch.Generator().manual_seed(0))
    before = from_pretrained(*ATTENTION)
    with pytest.raises(RuntimeError, match="size of tensor a"):
        before.encode(z)
    register()
    after = from_pretrained(*ATTENTION)
    torch.testing.assert_close(after.encode(z), before.encode(z.flatten(2)))
    assert after(z).shape == z.shape


def test_cached_files_load_offline(stock, cached, monkeypatch) -> None:
    import requests
    from sae_lens.loading import pretrained_sae_loaders

    def no_network(*args, **kwargs):
        raise requests.ConnectionError("no network in tests")

    monkeypatch.setattr(pretrained_sae_loaders, "_get_with_rate_limit_retry", no_network)
    sae_spec = cached(*ATTENTION, header=False)
    with pytest.raises(requests.ConnectionError):
        from_pretrained(*ATTENTION)
    register()
    assert spec_of(from_pretrained(*ATTENTION)) == sae_spec


def test_crosscoders_and_clts_are_listed_and_say_how_to_load_them(stock) -> None:
    with pytest.raises(ValueError, match="not found in pretrained SAEs directory"):
        from_pretrained("gemma-scope-2-1b-pt-clts", "width_262k_l0_big")
    register()
    first = find(release="gemma-scope-2-1b-pt-clts")[0]
    with pytest.raises(GemmaScopeError, match="SAELens has no class.*Try: gemmascope_plugin.load"):
        from_pretrained(first.release, first.sae_id)


def test_saelens_cannot_reconstruct_with_a_clt_and_we_can(tmp_path) -> None:
    """SAELens' branch for CLT files adds the decoders of all output layers up."""
    from gemma_scope_2_files import multi_spec, put_multi

    sae_spec = multi_spec("clt")
    files = put_multi(tmp_path, sae_spec)
    clt = load(sae_spec, local_dir=tmp_path)
    x = [
        torch.randn(2, sae_spec.d_in, generator=torch.Generator().manual_seed(i)) for i in range(3)
    ]
    f = clt.encode_layer(0, x[0])
    w_dec = torch.from_numpy(files[0]["w_dec"])
    summed = f @ w_dec.sum(dim=1) + torch.from_numpy(files[0]["b_dec"])
    sliced = f @ w_dec[:, 0] + torch.from_numpy(files[0]["b_dec"])
    torch.testing.assert_close(clt(x)[0], sliced)
    assert not torch.allclose(summed, sliced, atol=0.1)


def test_a_moved_field_is_named(monkeypatch) -> None:
    import dataclasses

    from sae_lens.loading import pretrained_saes_directory

    @dataclasses.dataclass
    class Row:
        release: str

    monkeypatch.setattr(pretrained_saes_directory, "PretrainedSAELookup", Row)
    with pytest.raises(
        GemmaScopeError, match="has moved the tables .*a release has no config_over"
    ):
        register()


def test_the_specs_of_folders_survive(tmp_path) -> None:
    from gemma_scope_2_files import single_spec

    sae_spec = single_spec("transcoder", "mlp", l0=None, levels=(8, 24))
    put_single(tmp_path, sae_spec)
    sae = load(sae_spec, local_dir=tmp_path)
    assert spec_of(sae) == sae_spec and list(sae.cfg.metadata.levels) == [8, 24]
    assert spec_of(sae) != replace(sae_spec, levels=())


def test_every_row_of_the_readme_has_its_test() -> None:
    import re
    from pathlib import Path

    tests = Path(__file__).parent
    readme = (tests.parents[1] / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+)` \|", readme)
    defined = "".join(path.read_text(encoding="utf-8") for path in tests.glob("test_*.py"))
    assert len(named) == 7 and all(f"def {name}(" in defined for name in named)
