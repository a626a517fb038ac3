"""``gemmascope demo`` hands over to the demo floor; here only the hand-over is tested."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import typer
from typer.testing import CliRunner

from gemmascope_plugin.cli.app import app
from gemmascope_plugin.errors import BadFileError


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Pages that would have been opened; the demo itself is a stand-in."""
    pages: list[str] = []
    stand_in = ModuleType("gemmascope_plugin.demo.bundled_run")

    def run_demo(out: Path, progress: bool) -> SimpleNamespace:
        if out.name == "bad.html":
            raise BadFileError("the file\nis broken")
        assert progress
        return SimpleNamespace(path=out, summary=lambda: "faithfulness 0.9")

    vars(stand_in)["run_demo"] = run_demo
    monkeypatch.setitem(sys.modules, "gemmascope_plugin.demo.bundled_run", stand_in)
    monkeypatch.setattr(typer, "launch", pages.append)
    return pages


def test_summary_and_path_are_printed(opened: list[str]) -> None:
    result = CliRunner().invoke(app, ["demo"])
    assert result.exit_code == 0, result.output
    assert result.output == "faithfulness 0.9\npage: gemmascope_demo.html\n"
    assert opened == []


def test_page_is_opened_when_asked_for(opened: list[str]) -> None:
    result = CliRunner().invoke(app, ["demo", "--out", "a.html", "--open"])
    assert result.exit_code == 0, result.output
    assert opened == ["a.html"]


def test_error_is_one_line(opened: list[str]) -> None:
    result = CliRunner().invoke(app, ["demo", "--out", "bad.html"])
    assert result.exit_code == 1
    assert result.stderr == "error: the file is broken.\n"
