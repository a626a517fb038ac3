"""Checks what linters do not: names of variables, names of files, and the drawing of the floors.

1. No variable, argument or attribute is called by a determiner (``own``, ``found``, ``kept``, ...): it
   says nothing about what it holds, and cannot be searched for.
2. No two files of the package share a name, ``__init__`` and ``__main__`` aside, and none is longer than
   350 lines.
3. The floors in CONTRIBUTING.md are those of the import contract in pyproject.toml; ``--draw`` prints
   them.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "gemmascope_plugin"
TESTS = ROOT / "tests"
CONTRIBUTING = ROOT / ".github" / "CONTRIBUTING.md"
DETERMINERS = frozenset("own given found known kept one there what theirs ours".split())
SAME_NAME = ("__init__.py", "__main__.py")
MAX_LINES = 350
_LAYERS = re.compile(r"^layers = \[\n(.*?)^\]", re.MULTILINE | re.DOTALL)
_DRAWN = re.compile(r"<!-- floors -->\n```\n(.*?)```", re.DOTALL)
ROOMS = {
    "cli": "gemmascope ...: thin commands",
    "demo": "the bundled suite and the demo on a real model; demo/build.py trains the suite",
    "pages": "one-file HTML pages",
    "circuits": "discover (a class for each method), select, ablate, evaluate",
    "tracing": "attribution graphs of prompts; linear/ holds the adjoint sweep",
    "causes": "tasks, metrics, effects; exact/ by running the model, gradient/ to first order",
    "measures": "how good dictionaries are",
    "training": "learning them",
    "features": "what is active on a text",
    "splice": "dictionaries inside a model: splice, edits, steering, verify",
    "graphs": "pure data: graphs, their files, JSON, influence, sums, groups",
    "models": "one vocabulary over HookedTransformer and TransformerBridge",
    "loading": "bytes to dictionary, SAELens' registry",
    "saes": "encode and decode; training/ has the classes that SAELens' trainer trains",
    "catalog": "which dictionaries exist; no torch, no network",
    "figures": "arrays and frames to figures and HTML",
}
"""What is on a floor, in a few words."""


def stored_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of everything that a file stores under a name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id if isinstance(node, ast.Name) else node.attr
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg


def determiners() -> Iterator[str]:
    """Places where something is called by a determiner."""
    for folder in (PACKAGE, TESTS, ROOT / ".ci"):
        for path in sorted(folder.rglob("*.py")):
            if ".ci-venv" in path.parts:
                continue
            for line, name in stored_names(ast.parse(path.read_text(encoding="utf-8"))):
                if name.strip("_") in DETERMINERS:
                    yield f"{path.relative_to(ROOT)}:{line}: {name!r} does not say what it holds"


def shared_file_names() -> Iterator[str]:
    """File names that stand at two places in the package."""
    places: dict[str, list[str]] = defaultdict(list)
    for path in PACKAGE.rglob("*.py"):
        places[path.name].append(str(path.relative_to(ROOT)))
    for name, paths in sorted(places.items()):
        if len(paths) > 1 and name not in SAME_NAME:
            yield f"{name} stands at {' and '.join(sorted(paths))}"


def long_files() -> Iterator[str]:
    """Files that should be two."""
    for path in sorted(PACKAGE.rglob("*.py")):
        n_lines = len(path.read_text(encoding="utf-8").splitlines())
        if n_lines > MAX_LINES:
            yield f"{path.relative_to(ROOT)} has {n_lines} lines, more than {MAX_LINES}"


def drawing() -> str:
    """The floors of the import contract, one line each, the highest first."""
    contract = _LAYERS.search((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert contract is not None, "pyproject.toml has a contract of layers"
    rows = []
    for floor in re.findall(r'"([^"]+)"', contract[1]):
        siblings = floor.split(" | ")
        texts = [ROOMS[sibling] for sibling in siblings if sibling in ROOMS]
        rows.append(f"{floor:22} {' | '.join(texts)}".rstrip())
    return "\n".join(rows) + "\n"


def drawn_otherwise() -> Iterator[str]:
    """Whether CONTRIBUTING.md draws other floors than the contract has."""
    drawn = _DRAWN.search(CONTRIBUTING.read_text(encoding="utf-8"))
    if drawn is None or drawn[1] != drawing():
        yield "the floors in CONTRIBUTING.md differ from the contract: .ci/check_house.py --draw"


def main() -> None:
    """Prints what is wrong, and fails if anything is."""
    if "--draw" in sys.argv:
        print(drawing(), end="")
        return
    faults = [*determiners(), *shared_file_names(), *long_files(), *drawn_otherwise()]
    print(*faults, sep="\n")
    raise SystemExit(1 if faults else 0)


if __name__ == "__main__":
    main()
