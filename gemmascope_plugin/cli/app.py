"""Wires the commands together; mistakes a user can mend become one red line and exit status 1.

Commands import the floors they need when they run, so that ``find`` starts without torch or pandas.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import gemmascope_plugin
from gemmascope_plugin.cli.catalog_commands import find_command, info_command, refresh_command
from gemmascope_plugin.cli.demo import demo_command
from gemmascope_plugin.cli.discover_command import discover_command
from gemmascope_plugin.cli.doctor import doctor_command
from gemmascope_plugin.cli.patch import patch_command
from gemmascope_plugin.cli.steer import steer_command
from gemmascope_plugin.cli.trace_command import trace_command
from gemmascope_plugin.cli.train_command import train_command
from gemmascope_plugin.cli.wording import on_the_command_line
from gemmascope_plugin.errors import GemmaScopeError


class ErrorLineGroup(TyperGroup):
    """Prints a `GemmaScopeError` as one line, in the words of the command, instead of a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        try:
            return super().invoke(ctx)
        except GemmaScopeError as error:
            command = self.commands.get(ctx.invoked_subcommand or "")
            line = " ".join(str(error).split())
            line = on_the_command_line(line, command, self.commands["find"])
            typer.secho(f"error: {line}", fg=typer.colors.RED, err=True)
            raise typer.Exit(code=1) from error


app = typer.Typer(
    cls=ErrorLineGroup,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Gemma Scope for SAELens and TransformerLens.",
)


def _print_version(wanted: bool) -> bool:
    """Print and stop; what is returned is what `options` gets."""
    if wanted:
        typer.echo(f"gemmascope_plugin {gemmascope_plugin.__version__}")
        raise typer.Exit()
    return wanted


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Gemma Scope for SAELens and TransformerLens."""


app.command("find")(find_command)
app.command("info")(info_command)
app.command("refresh")(refresh_command)
app.command("steer")(steer_command)
app.command("patch")(patch_command)
app.command("discover")(discover_command)
app.command("trace")(trace_command)
app.command("train")(train_command)
app.command("demo")(demo_command)
app.command("doctor")(doctor_command)
