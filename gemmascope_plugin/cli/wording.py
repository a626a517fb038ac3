"""Errors in the words of the command line: ``find(layer=3)`` becomes ``--layer 3``.

The functions below the commands advise in Python. Of a line of theirs

1. ``name=value`` becomes ``--name value`` for every option that the command has;
2. calls that hold nothing but options lose their brackets, and ``find(...)`` with words behind it
   becomes ``gemmascope find ...``;
3. a metric that is called becomes ``--metric NAME``;
4. advice that remains a call is marked as Python.

Cost: a few regular expressions.
"""

from __future__ import annotations

import ast
import re
import shlex
from typing import Any

_VALUE = r"""'[^']*'|"[^"]*"|\[[^\[\]()]*\]|\([^()\[\]]*\)|-?[\w.:+-]*\w"""
_METRICS = "logit_diff|probability|margin|cross_entropy|kl_divergence|sequence_logprob"
_TRY = " Try: "


def on_the_command_line(line: str, command: Any, finder: Any) -> str:
    """The line of an error, in the words of a command.

    Args:
        line: Text of the error.
        command: The command, with its parameters; None for none.
        finder: The command ``find``, whose options stand in ``find(...)``.
    """
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
