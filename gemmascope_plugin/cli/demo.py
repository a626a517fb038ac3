"""``gemmascope demo``: the whole main job on the bundled suite, written to one page."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from gemmascope_plugin.cli.task_options import BUNDLED, task_names
from gemmascope_plugin.errors import TaskError, check_choice

_TASK = "ioi"


def demo_command(
    model: Annotated[
        str | None,
        typer.Option(help="Another model, such as gemma-3-270m (extra [gemma]), and a page on it."),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="Built-in task, for --model: ioi (default), agreement, capitals, ..."),
    ] = None,
    local_dir: Annotated[
        str | None,
        typer.Option(help="Folder that mirrors the SAEs' repository, for --model."),
    ] = None,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("gemmascope_demo.html"),
    open_page: Annotated[
        bool | None,
        typer.Option("--open/--no-open", help="Open it; by default only from a terminal."),
    ] = None,
) -> None:
    """Find, load, splice, patch, rank and verify on the bundled model; write one HTML page.

    With --model the same on a real one: SAEs that are on this machine, a task of its own tokens,
    patching, a circuit that is checked:

    gemmascope demo --model gemma-3-270m
    """
    if model is None or model == BUNDLED:
        _refuse({"--task": task, "--local-dir": local_dir})
        from gemmascope_plugin.demo.bundled_run import run_demo

        report = run_demo(out, progress=True)
    else:
        check_choice("task", task or _TASK, task_names(model))
        from gemmascope_plugin.demo.on_model import run_on_model

        report = run_on_model(model, out, task=task or _TASK, local_dir=local_dir, progress=True)
    typer.echo(report.summary())
    typer.echo(f"page: {report.path}")
    if sys.stdout.isatty() if open_page is None else open_page:
        typer.launch(str(report.path))


def _refuse(options: dict[str, str | None]) -> None:
    """The demo on the bundled model has a task and dictionaries of its own.

    Raises:
        TaskError: Something else is asked for.
    """
    for option, value in options.items():
        if value is not None:
            raise TaskError(
                f"{option} {value} is for another model than the bundled one",
                fix=f"gemmascope demo --model gemma-3-270m {option} {value}",
            )
