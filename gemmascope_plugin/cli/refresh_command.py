"""``gemmascope refresh``: list the repositories on the hub and correct the catalog of this user.

Needs a network; no file is downloaded. ``--clear`` goes back to the tables of the package.
"""

from __future__ import annotations

from typing import Annotated

import typer

from gemmascope_plugin.cli.find_command import table


def refresh_command(
    repos: Annotated[
        list[str] | None, typer.Argument(help="Repositories; all of the catalog by default.")
    ] = None,
    clear: Annotated[
        bool, typer.Option("--clear", help="Forget what earlier runs found; needs no network.")
    ] = False,
) -> None:
    """Confirm or correct the catalog by what the repositories hold."""
    from gemmascope_plugin.catalog.refresh import COLUMNS, forget, refresh

    if clear:
        typer.echo("forgotten" if forget() else "there was nothing to forget")
        return
    report = refresh(repos=repos or None)
    for line in table(COLUMNS, report.rows(), right=COLUMNS[1:]):
        typer.echo(line)
    typer.echo(f"\nwritten to {report.path}")
