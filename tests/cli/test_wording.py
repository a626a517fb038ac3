"""Errors of functions are printed in the words of the command that met them."""

from __future__ import annotations

import pytest
import typer
from typer.testing import CliRunner

from gemmascope_plugin.cli.app import app, on_the_command_line

TINY = ("--model", "gemma-2-tiny", "--site", "res", "--layer", "2", "--l0", "canonical")


@pytest.mark.parametrize(
    ("command", "text", "typed"),
    [
        ("find", "find(layer=17)", "--layer 17"),
        ("find", "find(width='16k')", "--width 16k"),
        (
            "find",
            "find(release='some') lists all of them",
            "gemmascope find --release some lists all",
        ),
        (
            "find",
            "find() without release= searches all",
            "gemmascope find without --release searches",
        ),
        ("info", "find(release='some') lists all of them", "gemmascope find --release some lists"),
        ("find", "l0=71, l0=(50, 100) or l0=[38, 71]", "--l0 71, --l0 50-100 or --l0 38"),
        ("find", "model='a-b' or model='c'", "--model a-b or --model c"),
        ("find", "find(affine=False)", "--no-affine"),
        ("train", "options={...} for further fields", "--set options.KEY=VALUE for further"),
        ("trace", "find(site='mlp')", "gemmascope find --site mlp"),
        ("trace", "memory_budget='3 GB', or shorter prompts", "--memory-budget '3 GB', or shorter"),
        ("steer", "kind=one of 'sae', 'clt' or width='16k'", "--kind (sae, clt) or --width 16k"),
        (
            "steer",
            "strength=8.0, or strength=[4.0, 8.0]",
            "--strength 8.0, or --strength 4.0 --strength",
        ),
        ("steer", "max_new_tokens=124, or less", "--max-new-tokens 124, or less"),
        ("steer", "suite.labels_of(sae)", "in Python, suite.labels_of(sae)"),
        ("patch", 'axes=("layer", "pos")', "--axes layer,pos"),
        ("patch", "sequence_logprob(['a b']) for several", "--metric sequence_logprob for several"),
        ("patch", 'load_model(..., backend="bridge")', "--backend bridge"),
        (
            "discover",
            'method="ig", mode="denoising", or metric=logit_diff(answer, wrong)',
            "--method ig, or --metric logit_diff",
        ),
        (
            "discover",
            "in Python, discover(model, nodes='x')",
            "in Python, discover(model, nodes='x')",
        ),
        ("discover", "a number from 0 up", "a number from 0 up"),
    ],
)
def test_advice_is_typed_as_an_option(command: str, text: str, typed: str) -> None:
    commands = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    line = on_the_command_line(f"Wrong. Try: {text}", commands[command], commands["find"])
    assert line.startswith(f"Wrong. Try: {typed}")


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (("find", "--model", "270m", "--layer", "99"), ("has --layer 99", "Try: --layer 17")),
        (("find", "--model", "27b"), ("Try: --model gemma-2-27b or --model gemma-3-27b-pt",)),
        (
            ("steer", "--prompt", "today", "--feature", "3", "--strength", "nan", *TINY),
            ("--strength nan is not a finite number", "Try: --strength 8.0"),
        ),
    ],
)
def test_errors_of_functions_name_options(typed: tuple[str, ...], words: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, list(typed))
    assert result.exit_code == 1
    for each in words:
        assert each in result.stderr
