"""Wires the commands together; mistakes a user can mend become one red line and exit status 1.

Commands import the floors they need when they run, so that ``find`` starts without torch or pandas.

The functions below the commands advise in Python; the line is in the words of the command line:
``find(layer=3)`` becomes ``--layer 3``. Of an error

1. ``name=value`` becomes ``--name value`` for every option that the command has;
2. calls that hold nothing but options lose their brackets, and ``find(...)`` with words behind it
   becomes ``gemmascope find ...``;
3. a metric that is called becomes ``--metric NAME``, options of an architecture ``--set``;
4. advice that remains a call is marked as Python.
"""

from __future__ import annotations

import ast
import re
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import gemmascope_plugin
from gemmascope_plugin.cli.catalog_commands import find_command, info_command, refresh_command
from gemmascope_plugin.cli.discover_command import discover_command
from gemmascope_plugin.cli.doctor import doctor_command
from gemmascope_plugin.cli.options import BUNDLED, LocalDir, task_names
from gemmascope_plugin.cli.patch import patch_command
from gemmascope_plugin.cli.steer import steer_command
from gemmascope_plugin.cli.trace_command import trace_command
from gemmascope_plugin.cli.train_command import train_command
from gemmascope_plugin.errors import GemmaScopeError, TaskError, check_choice

_TASK = "ioi"
_VALUE = r"""'[^']*'|"[^"]*"|\[[^\[\]()]*\]|\([^()\[\]]*\)|-?[\w.:+-]*\w"""
_METRICS = "logit_diff|probability|margin|cross_entropy|kl_divergence|sequence_logprob"
_TRY = " Try: "


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


def demo_command(
    model: Annotated[
        str | None,
        typer.Option(help="Another model, such as gemma-3-270m (extra gemma), and a page on it."),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="Built-in task, for --model: ioi (default), agreement, capitals, ..."),
    ] = None,
    local_dir: LocalDir = None,
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
    """The demo on the bundled model has a task and dictionaries of its own; refuses others."""
    for option, value in options.items():
        if value is not None:
            raise TaskError(
                f"{option} {value} is for another model than the bundled one",
                fix=f"gemmascope demo --model gemma-3-270m {option} {value}",
            )


def on_the_command_line(line: str, command: Any, finder: Any) -> str:
    """The line of an error in the words of a command; ``finder`` is ``find``, which errors quote."""
    if command is None:
        return line
    problem, mark, fix = line.partition(_TRY)
    names = _options(command)
    advice = _translated(fix, names, _options(finder))
    if re.search(r"[\w\]]\(", advice):
        advice = fix if fix.startswith("in Python") else f"in Python, {fix}"
    return _translated(problem, names, _options(finder)) + mark + advice


def _translated(text: str, names: dict[str, Any], of_find: dict[str, Any]) -> str:
    def searched(match: re.Match[str]) -> str:
        arguments = _with_options(match[1], of_find)
        flags = {flag for each in names.values() for flag in (*each.opts, *each.secondary_opts)}
        here = set(re.findall(r"--[\w-]+", arguments)) <= flags
        return arguments if arguments and here and not match[2] else _find(arguments) + match[2]

    if "metric" in names:
        text = re.sub(rf"(?:\bmetric=)?\b({_METRICS})\([^()]*\)", r"--metric \1", text)
    if "settings" in names:
        text = text.replace("options={...}", "--set options.KEY=VALUE")
    text = re.sub(r"\bfind\(((?:\w+=[^()=.]+)?)\)((?: (?!or )[a-z]+)?)", searched, text)
    text = _with_options(text, names)
    text = re.sub(r"\bwithout (\w+)=", r"without --\1", text)
    text = re.sub(r"\b[\w.]+\((?:\.\.\., )?(--[^()]*)\)", r"\1", text)
    # Alternatives of other functions, beside options that are here.
    return re.sub(rf"(?<=, )\w+=(?:{_VALUE}), (?=or --|--)", "", text)


def _find(arguments: str) -> str:
    return " ".join(["gemmascope find", *([arguments] if arguments else [])])


def _options(command: Any) -> dict[str, Any]:
    return {each.name: each for each in command.params if each.opts[0].startswith("--")}


def _with_options(line: str, options: dict[str, Any]) -> str:
    """``name=value`` as it is typed, ``name=`` as the option's name."""

    def typed(match: re.Match[str]) -> str:
        option = options.get(match["name"])
        if option is None:
            return match[0]
        flag = option.opts[0]
        if option.is_flag:
            off = option.secondary_opts
            return off[0] if match["value"] == "False" and off else flag
        if match["choices"] is not None:
            return f"{flag} ({match['choices'].replace(chr(39), '')})"
        values = _values(match["value"], option)
        return " ".join(f"{flag} {value}" for value in values)

    choices = r"one of (?P<choices>(?:'[^']*'|[\w.]+)(?:, (?:'[^']*'|[\w.]+))*)"
    return re.sub(rf"(?<![\w.-])(?P<name>\w+)=(?:{choices}|(?P<value>{_VALUE}))", typed, line)


def _values(text: str, option: Any) -> list[str]:
    """A value as it is typed: several for an option that may be given several times."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return [text]
    if not isinstance(value, list | tuple):
        return [shlex.quote(str(value))]
    words = [str(each) for each in value]
    if option.multiple:
        return words
    if option.name == "l0":
        # An interval; of several numbers one can be typed.
        return ["-".join(words)] if isinstance(value, tuple) else words[:1]
    return [",".join(words)]


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
