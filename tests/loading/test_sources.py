"""Where files come from, without a network; every refusal says what to type."""

import httpx
import pytest
from npz_files import arrays, save, spec

from gemmascope_plugin.arguments import is_offline
from gemmascope_plugin.catalog.spec import BUNDLED_PREFIX
from gemmascope_plugin.errors import BadFileError, MissingFileError
from gemmascope_plugin.loading.sources import locate

REMOTE = {"repo_id": "google/gemma-scope-test", "release": "gemma-scope-test"}
FILE = "layer_1/width_24/average_l0_7/params.npz"
COMMAND = f"hf download google/gemma-scope-test {FILE}"


def message(*args, **kwargs) -> str:
    with pytest.raises(MissingFileError) as error:
        locate(*args, **kwargs)
    return str(error.value)


def test_the_cache_is_used_without_a_request(hub_cache) -> None:
    path = hub_cache(spec(**REMOTE), **arrays())
    assert locate(spec(**REMOTE)) == {FILE: path}
    other = hub_cache(spec(**REMOTE), revision="v2", **arrays())
    assert locate(spec(**REMOTE), revision="v2") == {FILE: other} and other != path


def test_offline_says_which_command_fetches_the_file(hub_cache) -> None:
    assert message(spec(**REMOTE)) == (
        "gemma-scope-test layer_1/width_24/average_l0_7 (1.8 kB) is not in the cache and offline "
        f"mode is on. Try: {COMMAND}"
    )
    assert message(spec(**REMOTE), revision="v2").endswith(f"Try: {COMMAND} --revision v2")


def test_the_argument_goes_before_the_environment(hub_cache, monkeypatch) -> None:
    from huggingface_hub import constants

    assert is_offline() and is_offline(True) and not is_offline(False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert is_offline()  # set after huggingface_hub was imported
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert not is_offline()
    assert "offline mode is on" in message(spec(**REMOTE), offline=True)


def test_a_failed_download_says_why_and_what_to_type(hub_cache) -> None:
    text = message(spec(**REMOTE), offline=False)  # huggingface_hub itself is offline here
    assert text.startswith(
        "could not download layer_1/width_24/average_l0_7/params.npz of google/gemma-scope-test "
        "(1.8 kB): LocalEntryNotFoundError "
    )
    assert text.endswith(f"Try: {COMMAND} on a machine with network, or load(..., local_dir=...)")


def test_hub_faults_become_one_kind_of_error(hub_cache, monkeypatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    request = httpx.Request("GET", "https://huggingface.co")

    def failing(fault):
        def download(*args, **kwargs):
            raise fault

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        return message(spec(**REMOTE), offline=False)

    response = httpx.Response(404, request=request)
    assert "RepositoryNotFoundError gone" in failing(
        RepositoryNotFoundError("gone", response=response)
    )
    assert "HfHubHTTPError 500" in failing(HfHubHTTPError("500 oops.\nmore", response=response))
    assert "ConnectError no route. Try: hf download" in failing(httpx.ConnectError("no route"))
    assert "OSError disk full" in failing(OSError("disk full"))
    assert failing(GatedRepoError("no", response=response)) == (
        "google/gemma-scope-test is gated and this machine has no access. Try: accept the terms at "
        "https://huggingface.co/google/gemma-scope-test, then: hf auth login"
    )


def test_only_the_needed_file_is_asked_for(hub_cache, monkeypatch, tmp_path) -> None:
    import huggingface_hub

    asked = []

    def download(repo_id, filename, **kwargs):
        asked.append((repo_id, filename, kwargs))
        return str(tmp_path / "x")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    paths = locate(spec(**REMOTE), revision="v2", offline=False)
    assert paths == {FILE: tmp_path / "x"}
    assert asked == [
        (
            "google/gemma-scope-test",
            "layer_1/width_24/average_l0_7/params.npz",
            {"revision": "v2", "force_download": False},
        )
    ]


def test_a_local_folder_lists_what_it_has(tmp_path) -> None:
    assert "no file " in message(spec(**REMOTE), local_dir=tmp_path)
    assert "There is: no params.npz in this folder." in message(spec(**REMOTE), local_dir=tmp_path)
    save(tmp_path / "layer_1/width_24/average_l0_9/params.npz", **arrays())
    text = message(spec(**REMOTE), local_dir=tmp_path)
    assert "Did you mean 'layer_1/width_24/average_l0_9'?" in text
    assert "Try: put the file of gemma-scope-test layer_1/width_24/average_l0_7 at '" in text


def test_a_missing_bundled_file_names_the_command_that_makes_it(suite) -> None:
    suite.file("res").unlink()
    text = message(suite.specs["res"])
    assert text.endswith(
        "Try: python -m gemmascope_plugin.demo.build makes the bundled files again"
    )


def test_an_interrupted_download_goes_on_with_what_is_missing(hub_cache, tmp_path, monkeypatch):
    import huggingface_hub
    from gemma_scope_2_files import multi_spec, put_multi

    sae_spec, asked, broken = multi_spec("clt"), [], ["params_layer_1.safetensors"]
    put_multi(tmp_path / "mirror", sae_spec)
    cache = tmp_path / "hub" / f"models--{sae_spec.repo_id.replace('/', '--')}"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)

    def download(repo_id, filename, **kwargs):
        asked.append(filename.rpartition("/")[2])
        if asked[-1] in broken:
            raise OSError(28, "No space left on device", str(cache / "blobs" / "x.incomplete"))
        target = cache / "snapshots" / ("0" * 40) / filename
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((tmp_path / "mirror" / filename).read_bytes())
        return str(target)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    text = message(sae_spec, offline=False)
    assert "No space left on device" in text and "x.incomplete'" in text
    assert "; 2 of its 3 files are missing" in message(sae_spec)
    broken.clear()
    asked.clear()
    assert set(locate(sae_spec, offline=False)) == {*sae_spec.filenames, sae_spec.config_filename}
    assert asked == ["params_layer_1.safetensors", "params_layer_2.safetensors"]


def test_a_bundled_dictionary_in_a_folder_of_the_user_says_where_its_file_belongs(tmp_path) -> None:
    bundled = spec()
    assert bundled.bundled
    text = message(bundled, local_dir=tmp_path)
    assert text.endswith(
        f"Try: put the file of {bundled.release} {bundled.sae_id} at {str(tmp_path / FILE)!r}"
    )


@pytest.mark.parametrize(
    "path",
    ["/etc", "../x", "a/../../x", "C:/x", "C:x", "a\\..\\x", "//host/share", "~/x", "a\0b", ".."],
)
def test_paths_that_leave_the_folder_are_refused(tmp_path, path) -> None:
    (tmp_path / "x").mkdir()
    save(tmp_path / "x" / "params.npz", **arrays())
    local = spec(repo_id=(tmp_path / "a").as_posix(), path=path)
    for options in ({"local_dir": tmp_path / "a"}, {}):
        for each in (spec(**REMOTE, path=path), local):
            with pytest.raises(BadFileError, match="which leads out of its folder"):
                locate(each, **options)


def test_a_bundled_name_that_leaves_the_package_is_refused(suite) -> None:
    bundled = spec(repo_id=f"{BUNDLED_PREFIX}../..", path="x")
    assert bundled.bundled
    with pytest.raises(BadFileError, match="which leads out of its folder"):
        locate(bundled)


def test_every_path_of_the_catalog_stays_inside() -> None:
    from gemmascope_plugin.catalog import find
    from gemmascope_plugin.loading.sources import _check_names

    for each in find():
        _check_names(each)


def test_links_lead_out_of_a_folder_into_caches_only(tmp_path, monkeypatch) -> None:
    from huggingface_hub import constants

    real = save(tmp_path / "elsewhere" / "params.npz", **arrays())
    link = tmp_path / "mirror" / FILE
    link.parent.mkdir(parents=True)
    link.symlink_to(real)
    with pytest.raises(BadFileError, match="is a link to .*elsewhere.*the file itself"):
        locate(spec(**REMOTE), local_dir=tmp_path / "mirror")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    assert locate(spec(**REMOTE), local_dir=tmp_path / "mirror") == {FILE: link}
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "none"))
    blob = save(tmp_path / "models--x" / "blobs" / "abc.npz", **arrays())
    inside = tmp_path / "models--x" / "snapshots" / "main" / FILE
    inside.parent.mkdir(parents=True)
    inside.symlink_to(blob)
    paths = locate(spec(**REMOTE), local_dir=tmp_path / "models--x" / "snapshots" / "main")
    assert paths == {FILE: inside}
    whole = tmp_path / "link"
    whole.symlink_to(tmp_path / "models--x" / "snapshots" / "main")
    assert locate(spec(**REMOTE), local_dir=whole) == {FILE: whole / FILE}
