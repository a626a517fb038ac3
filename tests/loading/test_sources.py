"""Where files come from, without a network; every refusal says what to type."""

import httpx
import pytest
from npz_files import arrays, save, spec

from gemmascope_plugin.errors import MissingFileError
from gemmascope_plugin.loading.sources import is_offline, locate

REMOTE = {"repo_id": "google/gemma-scope-test", "release": "gemma-scope-test"}
COMMAND = "hf download google/gemma-scope-test layer_1/width_24/average_l0_7/params.npz"


def message(*args, **kwargs) -> str:
    with pytest.raises(MissingFileError) as error:
        locate(*args, **kwargs)
    return str(error.value)


def test_the_cache_is_used_without_a_request(hub_cache) -> None:
    path = hub_cache(spec(**REMOTE), **arrays())
    assert locate(spec(**REMOTE)) == path
    other = hub_cache(spec(**REMOTE), revision="v2", **arrays())
    assert locate(spec(**REMOTE), revision="v2") == other != path


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
    assert locate(spec(**REMOTE), revision="v2", offline=False) == tmp_path / "x"
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
        "Try: python -m gemmascope_plugin.demo.train makes the bundled files again"
    )
