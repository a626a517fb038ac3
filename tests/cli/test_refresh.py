"""``gemmascope refresh``: prints the report, forgets on request, says when it is offline."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from gemmascope_plugin.catalog import manifest, tables
from gemmascope_plugin.cli.app import app

REPO = "google/gemma-scope-2-270m-it"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GEMMASCOPE_HOME", str(tmp_path))
    tables.clear_caches()
    yield tmp_path
    monkeypatch.undo()
    tables.clear_caches()


def test_a_report_per_repository_and_clear(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stub:
        def list_repo_files(self, repo_id: str) -> list[str]:
            specs = [s for r in manifest.repositories()[repo_id] for s in tables.built_in(r)]
            return [name for spec in specs for name in spec.filenames]

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Stub)
    result = CliRunner().invoke(app, ["refresh", REPO])
    assert result.exit_code == 0, result.output
    assert [line.split() for line in result.stdout.splitlines()[:2]] == [
        ["repository", "there", "confirmed", "missing", "added", "not", "understood"],
        [REPO, "572", "16", "0", "0", "0"],
    ]
    assert result.stdout.splitlines()[-1] == f"written to {home / 'manifest.json'}"
    assert CliRunner().invoke(app, ["refresh", "--clear"]).stdout == "forgotten\n"
    assert CliRunner().invoke(app, ["refresh", "--clear"]).stdout == "there was nothing to forget\n"
    assert list(home.iterdir()) == []


def test_offline_is_one_line(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = CliRunner().invoke(app, ["refresh"])
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.startswith("error: the repositories cannot be listed: offline mode is on")
