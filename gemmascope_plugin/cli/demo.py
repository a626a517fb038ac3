"""``gemmascope demo``: the whole main job on the bundled suite, written to one page."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def demo_command(
    model: Annotated[
        str | None,
        typer.Option(help="Another model, such as gemma-3-270m (extra [gemma]), and a page on it."),
    ] = None,
    task: Annotated[
        str, typer.Option(help="Built-in task, for --model: ioi, agreement, capitals, ...")
    ] = "ioi",
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("gemmascope_demo.html"),
    open_page: Annotated[
        bool | None,
        typer.Option("--open/--no-open", help="Open it; by default only from a terminal."),
    ] = None,
) -> None:
    """Find, load, splice, patch, rank and verify on the bundled model; write one HTML page.

    With --model the same on a real one: SAEs that are on this machine, a task of its own tokens,
    patching, a circuit that is checked.
    """
    if model is None:
        from gemmascope_plugin.demo.run import run_demo

        report = run_demo(out, progress=True)
    else:
        from gemmascope_plugin.demo.on_model import run_on_model

        report = run_on_model(model, out, task=task, progress=True)
    typer.echo(report.summary())
    typer.echo(f"page: {report.path}")
    if sys.stdout.isatty() if open_page is None else open_page:
        typer.launch(str(report.path))
