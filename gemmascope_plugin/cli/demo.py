"""``gemmascope demo``: the whole main job on the bundled suite, written to one page."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def demo_command(
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("gemmascope_demo.html"),
    open_page: Annotated[
        bool | None,
        typer.Option("--open/--no-open", help="Open it; by default only from a terminal."),
    ] = None,
) -> None:
    """Find, load, splice, patch, rank and verify on the bundled model; write one HTML page."""
    from gemmascope_plugin.demo.run import run_demo

    report = run_demo(out, progress=True)
    typer.echo(report.summary())
    typer.echo(f"page: {report.path}")
    if sys.stdout.isatty() if open_page is None else open_page:
        typer.launch(str(report.path))
