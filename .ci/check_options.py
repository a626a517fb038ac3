"""Checks that somebody passes every optional parameter: else nobody knows whether it works.

1. Calls in the package and in its tests are noted: the name of what is called, with its keywords and how
   many arguments have none. What is handed to ``partial(f, ...)`` or ``unchecked(f)(...)`` counts for
   ``f``, what a subclass is made with for the class that has ``__init__``.
2. Options that stand in tables of tests are texts there, so a text of a test that is the name of an
   option counts as well.
3. Commands are left out: their options are those of the command line.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, TESTS = ROOT / "gemmascope_plugin", ROOT / "tests"
PASSED_ELSEWHERE = frozenset(("call", "cfg_overrides"))
"""Parameters that the gate for arguments passes, and SAELens."""
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class Calls:
    """What is passed to whom."""

    keywords: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    n_places: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    texts: set[str] = field(default_factory=set)
    subclasses: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))

    def read(self, tree: ast.AST, *, is_test: bool) -> None:
        """Notes the calls of a file."""
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                for name, n_places in _callees(node):
                    self.keywords[name] |= {word.arg for word in node.keywords if word.arg}
                    self.n_places[name] = max(self.n_places[name], n_places)
            elif isinstance(node, ast.ClassDef):
                for base in node.bases:
                    self.subclasses[_name(base)].add(node.name)
            elif is_test and isinstance(node, ast.Constant) and isinstance(node.value, str):
                self.texts.add(node.value)

    def passes(self, name: str, option: str, place: int | None) -> bool:
        """Whether somebody passes an option, by its name or at its place."""
        callees = {name} | (self._below(name) | {"__init__"} if name[:1].isupper() else set())
        by_place = place is not None and self.n_places[name] > place
        by_name = any(option in self.keywords[callee] for callee in callees)
        return by_name or by_place or option in self.texts

    def _below(self, name: str) -> set[str]:
        classes = set(self.subclasses[name])
        return classes.union(*(self._below(subclass) for subclass in classes))


def _callees(call: ast.Call) -> Iterator[tuple[str, int]]:
    """Names that a call may be of, each with the number of arguments without a keyword."""
    yield _name(call.func), len(call.args)
    if call.args:
        yield _name(call.args[0]), len(call.args) - 1
    if isinstance(call.func, ast.Call) and call.func.args:
        yield _name(call.func.args[0]), len(call.args)


def _name(node: ast.AST) -> str:
    if isinstance(node, ast.Name | ast.Attribute):
        return node.id if isinstance(node, ast.Name) else node.attr
    return ""


def functions(tree: ast.AST, owner: str = "") -> Iterator[tuple[str, Function]]:
    """Functions with the class that they belong to."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield from functions(node, node.name)
        elif isinstance(node, Function):
            yield owner, node


def options(function: Function, *, is_method: bool) -> Iterator[tuple[str, int | None]]:
    """Optional parameters, and the place of those that need no keyword."""
    places = function.args.posonlyargs + function.args.args
    is_bound = is_method and bool(places) and places[0].arg in ("self", "cls")
    n_required = len(places) - len(function.args.defaults)
    for place, parameter in enumerate(places[n_required:], n_required - is_bound):
        yield parameter.arg, place
    for parameter, default in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True):
        if default is not None:
            yield parameter.arg, None


def faults() -> Iterator[str]:
    """Options that nobody passes."""
    calls = Calls()
    for folder in (PACKAGE, TESTS):
        for path in folder.rglob("*.py"):
            calls.read(ast.parse(path.read_text(encoding="utf-8")), is_test=folder == TESTS)
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.is_relative_to(PACKAGE / "cli"):
            continue
        for owner, function in functions(ast.parse(path.read_text(encoding="utf-8"))):
            name = owner if function.name == "__init__" else function.name
            for option, place in options(function, is_method=bool(owner)):
                if option not in PASSED_ELSEWHERE and not calls.passes(name, option, place):
                    where = f"{path.relative_to(ROOT)}:{function.lineno}"
                    yield f"{where}: nobody passes {option!r} to {name}()"


def main() -> None:
    """Prints what is wrong, and fails if anything is."""
    lines = list(faults())
    print(*lines, sep="\n")
    raise SystemExit(1 if lines else 0)


if __name__ == "__main__":
    main()
