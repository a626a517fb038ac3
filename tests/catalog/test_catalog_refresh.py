"""refresh(): a stubbed client lists files; the catalog follows, and nothing is left half-written."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import httpx
import huggingface_hub
import pytest
from huggingface_hub import constants

from gemmascope_plugin.catalog import find, get, manifest, refresh, releases, tables
from gemmascope_plugin.catalog.refresh import compare, forget
from gemmascope_plugin.errors import (
    BadFileError,
    GemmaScopeError,
    MissingFileError,
    UnknownNameError,
)
from gemmascope_plugin.files.lock import FolderInUseError, file_lock

PT_27B = "google/gemma-scope-2-27b-pt"
IT_270M = "google/gemma-scope-2-270m-it"
TRANSCODERS = "google/gemma-scope-2b-pt-transcoders"


def files_of(repo_id: str, but: Callable[[str], bool] = lambda path: False) -> list[str]:
    """What a repository that holds everything but some folders would list."""
    specs = [s for r in manifest.repositories()[repo_id] for s in tables.built_in(r)]
    names = [name for s in specs if not but(s.path) for name in s.filenames]
    return ["README.md", ".gitattributes", *names]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, home: Path) -> dict[str, object]:
    """Repository to the files it lists, or to an exception; the network is on."""
    listed: dict[str, object] = {}

    class Stub:
        def list_repo_files(self, repo_id: str) -> list[str]:
            answer = listed[repo_id]
            if isinstance(answer, BaseException):
                raise answer
            assert isinstance(answer, list)
            return answer

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Stub)
    return listed


def test_what_is_there_becomes_listed(hub: dict[str, object], home: Path) -> None:
    hub[PT_27B] = files_of(PT_27B)
    assert len(find(model="gemma-3-27b-pt", provenance="derived")) == 645 + 8
    report = refresh(repos=[PT_27B], progress=False)
    (row,) = report.repositories
    assert (row.confirmed, row.missing, row.added, row.unknown) == (653, (), (), ())
    assert row.present == 1436 + 8 and report.path == home / "manifest.json"
    assert all(s.provenance == "listed" for s in find(model="gemma-3-27b-pt"))
    assert len(find(model="gemma-3-27b-pt")) == 1444
    assert "653" in repr(report) and "653" in report._repr_html_()
    row = json.loads(report.path.read_text())["repositories"][PT_27B]
    assert (row["missing"], row["added"]) == ([], [])
    assert report.path.stat().st_size < 1000


def test_what_is_not_there_is_dropped(hub: dict[str, object]) -> None:
    hub[PT_27B] = files_of(PT_27B, but=lambda path: path.startswith(("mlp_out/", "attn_out_all/")))
    report = refresh(repos=[PT_27B], progress=False)
    assert len(report.repositories[0].missing) == 36 + 248
    assert "gemma-scope-2-27b-pt-mlp" not in releases()
    with pytest.raises(UnknownNameError, match="no release 'gemma-scope-2-27b-pt-mlp'"):
        get("gemma-scope-2-27b-pt-mlp", "layer_16_width_16k_l0_big")
    with pytest.raises(UnknownNameError, match="together"):
        find(model="gemma-3-27b-pt", site="att", variant="all")


def test_a_part_of_a_multi_layer_dictionary_is_not_there(hub: dict[str, object]) -> None:
    files = files_of(IT_270M)
    files.remove("clt/width_262k_l0_medium_affine/params_layer_7.safetensors")
    hub[IT_270M] = files
    report = refresh(repos=[IT_270M], progress=False)
    assert report.repositories[0].missing == ("clt/width_262k_l0_medium_affine",)
    assert len(find(model="270m-it", kind="clt")) == 7


def test_new_folders_of_a_known_pattern_are_added(hub: dict[str, object]) -> None:
    new = ["layer_12/width_16k/average_l0_604", "layer_6/width_16k/average_l0_76"]
    odd = ["extra/width_16k", "layer_12/width_3k/average_l0_5"]
    hub[TRANSCODERS] = files_of(TRANSCODERS) + [f"{f}/params.npz" for f in (*new, *odd)]
    report = refresh(repos=[TRANSCODERS], progress=False)
    assert report.repositories[0].added == tuple(sorted(new))
    assert report.repositories[0].unknown == tuple(sorted(odd))
    spec = find(model="2b", site="transcoder", layer=12, l0=604).one()
    assert (spec.provenance, spec.gain) == ("listed", "without")
    assert spec.hook_in == "blocks.12.ln2.hook_normalized"
    assert len(find(model="2b", site="transcoder")) == 28
    hub[IT_270M] = [*files_of(IT_270M), "attn_out/layer_9_width_1m_l0_big/params.safetensors"]
    refresh(repos=[IT_270M], progress=False)
    assert find(model="270m-it", site="att", width="1m").one().d_in == 1024
    assert len(find(model="2b", site="transcoder")) == 28  # what was found before is kept


def test_everything_is_listed_by_default(
    hub: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    hub.update({repo_id: files_of(repo_id) for repo_id in manifest.repositories()})
    report = refresh()
    assert len(report.repositories) == 9 + 10 + 3 + 1
    assert sum(r.confirmed for r in report.repositories) == 720 + 112
    assert "listing" in capsys.readouterr().err
    assert {s.provenance for s in find()} == {"listed"}
    assert report.path.stat().st_size < 10_000


@pytest.mark.parametrize(
    "fault",
    [httpx.ConnectError("no route"), OSError("broken"), ValueError("odd"), KeyboardInterrupt()],
)
def test_a_failed_run_changes_nothing(
    hub: dict[str, object], home: Path, fault: BaseException
) -> None:
    hub[IT_270M], hub[PT_27B] = files_of(IT_270M), fault
    before = find()
    with pytest.raises((MissingFileError, KeyboardInterrupt)) as error:
        refresh(repos=[IT_270M, PT_27B], progress=False)
    if isinstance(error.value, MissingFileError):
        assert f"could not list {PT_27B}: {type(fault).__name__}" in str(error.value)
        assert "Nothing was changed" in str(error.value)
    assert not home.exists() and find() == before


def test_what_another_process_lists_meanwhile_is_kept(
    hub: dict[str, object], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub[IT_270M] = files_of(IT_270M)
    other = manifest.Listing(listed_at="2026-01-01T00:00:00+00:00", missing=("x",))
    at_once = manifest.update

    def late(additions: dict[str, manifest.Listing]) -> Path:
        at_once({PT_27B: other})  # the other one was quicker
        return at_once(additions)

    monkeypatch.setattr(manifest, "update", late)
    refresh(repos=[IT_270M], progress=False)
    assert manifest.listings().keys() == {IT_270M, PT_27B}
    assert manifest.listings()[PT_27B] == other
    assert [f.name for f in home.iterdir()] == ["manifest.json"]


def test_one_process_at_a_time_writes(
    hub: dict[str, object], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub[IT_270M] = files_of(IT_270M)
    monkeypatch.setattr(manifest, "WAIT", 0.0)
    home.mkdir()
    with (
        file_lock(home / ".manifest.json.lock", "a test"),
        pytest.raises(FolderInUseError, match="manifest.json.*written to by.*a test"),
    ):
        refresh(repos=[IT_270M], progress=False)
    assert not list(home.iterdir())


def test_a_write_that_fails_leaves_no_file(
    hub: dict[str, object], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub[IT_270M] = files_of(IT_270M)
    refresh(repos=[IT_270M], progress=False)
    before = manifest.manifest_path().read_text()

    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(GemmaScopeError, match=r"cannot write '.*manifest.json': No space left"):
        refresh(repos=[IT_270M], progress=False)
    assert [f.name for f in home.iterdir()] == ["manifest.json"]
    assert manifest.manifest_path().read_text() == before


def test_offline_is_said_clearly(hub: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(MissingFileError) as error:
        refresh(progress=False)
    assert str(error.value) == (
        "the repositories cannot be listed: offline mode is on (HF_HUB_OFFLINE). Try: unset "
        "HF_HUB_OFFLINE, then gemmascope refresh on a machine with network; find() works without it"
    )


def test_unknown_repositories_and_changed_layouts_are_refused(hub: dict[str, object]) -> None:
    with pytest.raises(
        UnknownNameError, match=r"no repository .* Did you mean 'google/gemma-scope"
    ):
        refresh(repos=["google/gemma-scope-2-27b-ptt"], progress=False)
    hub[IT_270M] = ["README.md", "v2/x.bin"]
    with pytest.raises(BadFileError, match=r"none of the 572 expected folders is in google/gemma"):
        refresh(repos=[IT_270M], progress=False)
    with pytest.raises(BadFileError, match="There is: no file"):
        compare(IT_270M, tables.built_in("gemma-scope-2-270m-it-res"), [])


def test_it_can_be_forgotten(hub: dict[str, object]) -> None:
    hub[IT_270M] = files_of(IT_270M, but=lambda path: path.startswith("clt/"))
    refresh(repos=[IT_270M], progress=False)
    assert "gemma-scope-2-270m-it-clts" not in releases()
    assert forget() is True and forget() is False
    assert len(find(model="270m-it", kind="clt")) == 8


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 2, "repositories": {}}', '{"format": 1}', "\x00"]
)
def test_a_damaged_manifest_is_an_error_that_says_how_to_mend_it(home: Path, text: str) -> None:
    home.mkdir()
    (home / "manifest.json").write_text(text)
    tables.clear_caches()
    with pytest.raises(BadFileError, match=r"manifest.json.* Try: gemmascope refresh --clear"):
        find(model="2b")
    assert forget() and find(model="2b")


def test_home_follows_the_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    from gemmascope_plugin.files import home as module

    monkeypatch.delenv(module.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.setattr(module.sys, "platform", "linux")
    assert module.home() == Path("/x/gemmascope")
    monkeypatch.setattr(module.sys, "platform", "darwin")
    assert module.home() == Path.home() / "Library" / "Caches" / "gemmascope"
    monkeypatch.setenv("LOCALAPPDATA", "/l")
    monkeypatch.setattr(module.sys, "platform", "win32")
    assert module.home() == Path("/l/gemmascope")
