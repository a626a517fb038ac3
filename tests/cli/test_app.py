"""The program as a whole: version, help, errors as one line, ``python -m``."""

from __future__ import annotations

import subprocess
import sys

import pytest
from typer.testing import CliRunner

import gemmascope_plugin
from gemmascope_plugin.cli import main
from gemmascope_plugin.cli.app import app


def test_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.output == f"gemmascope_plugin {gemmascope_plugin.__version__}\n"


def test_help_names_the_commands() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    for command in (
        "find",
        "info",
        "refresh",
        "steer",
        "patch",
        "discover",
        "train",
        "demo",
        "doctor",
    ):
        assert command in result.output


def test_a_mistake_is_one_line_on_stderr() -> None:
    result = CliRunner().invoke(app, ["find", "--model", "gemma-2-2c"])
    assert result.exit_code == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert "gemma-2-2c" in line
    assert "Did you mean 'gemma-2-2b'" in line


def test_main_exits_with_the_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gemmascope", "find", "--release", "gemma-scope-2b-pt-rse"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert "gemma-scope-2b-pt-res" in captured.err


def test_module_can_be_run() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gemmascope_plugin", "find", "--model", "nothing"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1
    assert "error: " in done.stderr
    assert "Traceback" not in done.stderr
