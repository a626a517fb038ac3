"""Checks that README.md can be followed by hand and by machine.

Rules: exactly two fenced bash blocks are marked, one ``<!-- setup: demo -->`` and one
``<!-- ci: test -->``, and there is no other bash block; each holds one command line; every
``gemmascope <command>`` in the README's code exists; the python example has at most 12 lines of
code and its output follows. ``--test-command`` prints the test command and checks nothing else.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"
MARKS = ("setup: demo", "ci: test")
MAX_EXAMPLE_LINES = 12

_FENCE = re.compile(
    r"^(?:<!--[ \t]*(?P<mark>[^\n]*?)[ \t]*-->[ \t]*\n(?:[ \t]*\n)?)?"
    r"^```(?P<language>\w*)[^\n]*\n(?P<body>.*?)^```[ \t]*$",
    re.MULTILINE | re.DOTALL,
)
_COMMAND = re.compile(r"(?<![\w./-])gemmascope[ \t]+([a-z][\w-]*)")
_INLINE_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


@dataclass(frozen=True)
class Block:
    """One fenced block: the comment before it, its language and its text."""

    mark: str
    language: str
    body: str

    @property
    def lines(self) -> list[str]:
        """Lines that are neither blank nor comments."""
        stripped = (line.strip() for line in self.body.splitlines())
        return [line for line in stripped if line and not line.startswith("#")]


def read_blocks(text: str) -> list[Block]:
    """All fenced blocks in order."""
    return [
        Block(fence["mark"] or "", fence["language"], fence["body"])
        for fence in _FENCE.finditer(text)
    ]


def test_command(blocks: list[Block]) -> str:
    """The one command line of the block marked ``ci: test``."""
    marked = [block for block in blocks if block.mark == "ci: test" and block.language == "bash"]
    if len(marked) != 1 or len(marked[0].lines) != 1:
        raise SystemExit("README.md: want one bash block of one line marked <!-- ci: test -->")
    return marked[0].lines[0]


def check_bash(blocks: list[Block]) -> list[str]:
    """Problems of the two set-up commands."""
    bash = [block for block in blocks if block.language in {"bash", "sh", "shell", "console"}]
    problems = []
    if sorted(block.mark for block in bash) != sorted(MARKS):
        marks = [block.mark or "no mark" for block in bash]
        problems.append(f"want exactly two bash blocks marked {MARKS}, found {marks}")
    for block in bash:
        if len(block.lines) != 1:
            problems.append(f"block {block.mark!r} has {len(block.lines)} command lines, want one")
    return problems


def check_commands(text: str, blocks: list[Block], commands: set[str]) -> list[str]:
    """``gemmascope`` commands in code that the program does not have."""
    inline = _INLINE_CODE.findall(_FENCE.sub("", text))
    shells = [block.body for block in blocks if block.language != "python"]
    used = {name for code in [*shells, *inline] for name in _COMMAND.findall(code)}
    return [f"gemmascope has no command {name!r}" for name in sorted(used - commands)]


def check_example(blocks: list[Block]) -> list[str]:
    """Problems of the python example."""
    places = [i for i, block in enumerate(blocks) if block.language == "python"]
    if not places:
        return ["there is no python example"]
    first = places[0]
    problems = []
    if len(blocks[first].lines) > MAX_EXAMPLE_LINES:
        count = len(blocks[first].lines)
        problems.append(f"the example has {count} lines of code, at most {MAX_EXAMPLE_LINES}")
    after = blocks[first + 1] if first + 1 < len(blocks) else None
    if after is None or after.language not in {"", "text"} or not after.body.strip():
        problems.append("the example is not followed by a block with its output")
    return problems


def cli_commands() -> set[str]:
    """Names of the commands that the installed program has."""
    from gemmascope_plugin.cli.app import app

    return {command.name for command in app.registered_commands if command.name}


def main() -> int:
    """Run the checks, print the problems, return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--test-command", action="store_true")
    options = parser.parse_args()
    if not README.is_file():
        print("README.md: missing", file=sys.stderr)
        return 1
    text = README.read_text(encoding="utf-8")
    blocks = read_blocks(text)
    if options.test_command:
        print(test_command(blocks))
        return 0
    problems = [
        *check_bash(blocks),
        *check_commands(text, blocks, cli_commands()),
        *check_example(blocks),
    ]
    for problem in problems:
        print(f"README.md: {problem}", file=sys.stderr)
    if not problems:
        print("README.md: commands and example are in order")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
