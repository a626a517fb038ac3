"""The one reader of JSON: what it returns is plain, finite and unambiguous, or the file is named as bad.

1. Only plain files are opened: a device never ends, a pipe waits for ever.
2. A file above its limit is refused unread. Real configs have a few kB; graphs have limits of their own.
3. The text is UTF-8; NaN, infinities (``1e999`` too), a key that appears twice in an object, and nesting
   beyond 64 levels are refused: readers disagree about what they mean, or break.
4. ``Record`` gives the entries of an object by type, so that a wrong one is named, with its file.

Costs about twice ``json.loads``.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from gemmascope_plugin.errors import BadFileError, GemmaScopeError

MAX_SIZE = 1 << 20
MAX_LINE = 1 << 16
MAX_DEPTH = 64
FIX = "fetch it again"
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
T = TypeVar("T")


def read_json(path: Path, *, max_size: int = MAX_SIZE, fix: str = FIX) -> dict[str, Any]:
    """The JSON object in a small file."""
    content = parse_json(read_plain(path, max_size=max_size, fix=fix), path, fix=fix)
    if not isinstance(content, dict):
        raise BadFileError(f"{str(path)!r} is not a JSON object", fix=fix)
    return content


def read_plain(path: Path, *, max_size: int = MAX_SIZE, fix: str = FIX) -> bytes:
    """The bytes of a plain file."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        with os.fdopen(os.open(path, flags), "rb") as file:
            state = os.fstat(file.fileno())
            if not stat.S_ISREG(state.st_mode):
                raise bad_file(path, "it is not a plain file", fix)
            if state.st_size > max_size:
                raise bad_file(path, f"{state.st_size} bytes are more than {max_size}", fix)
            return file.read(max_size + 1)[:max_size]
    except (OSError, ValueError) as fault:  # ValueError: a zero byte in the name
        raise bad_file(path, getattr(fault, "strerror", None) or str(fault), fix) from fault


def parse_json(text: bytes | str, path: Path | str, *, fix: str = FIX) -> Any:
    """The value that a JSON text, or its bytes in UTF-8, stands for; ``path`` is for errors."""
    try:
        text = text if isinstance(text, str) else text.decode()
        content = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_refuse,
            parse_float=_number,
        )
        _check_depth(content)
        _check_text(text, content)
    except RecursionError as fault:
        raise bad_file(path, f"it is nested more than {MAX_DEPTH} deep", fix) from fault
    except ValueError as fault:
        raise bad_file(path, str(fault), fix) from fault
    return content


def read_json_lines(path: Path, *, fix: str = FIX) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of a file with a JSON object on each, with what they hold.

    A last line without its end, which a killed writer leaves, is left out.
    """
    if not path.is_file():
        raise bad_file(path, "it is not a plain file", fix)
    try:
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE), b""), start=1):
                where = f"{path}, line {number}"
                if not line.endswith(b"\n"):
                    if len(line) >= MAX_LINE:
                        raise bad_file(where, f"it has more than {MAX_LINE} bytes", fix)
                    return
                content = parse_json(line, where, fix=fix)
                if not isinstance(content, dict):
                    raise bad_file(where, "it is not a JSON object", fix)
                yield line.decode(), content
    except OSError as fault:
        raise bad_file(path, fault.strerror or str(fault), fix) from fault


@dataclass(frozen=True)
class Record:
    """An object of a JSON file whose entries are asked for by type."""

    content: dict[str, Any]
    path: Path | str
    """Where it comes from, for errors."""
    fix: str = FIX
    """What to do when an entry is wrong."""

    def bad(self, why: str) -> NoReturn:
        """Refuses the file."""
        raise bad_file(self.path, why, self.fix)

    def get(self, name: str, of: type[T]) -> T:
        """An entry; a whole number counts as ``float``, a truth value as neither number."""
        if name not in self.content:
            self.bad(f"{name!r} is missing")
        return self._typed(self.content[name], of, repr(name))

    def list_of(self, name: str, of: type[T]) -> list[T]:
        """An entry that is a list of values of one type."""
        return [
            self._typed(value, of, f"{name}[{i}]") for i, value in enumerate(self.get(name, list))
        ]

    def dict_of(self, name: str, of: type[T]) -> dict[str, T]:
        """An entry that is an object whose values are of one type."""
        entries = self.get(name, dict)
        return {key: self._typed(value, of, f"{name}[{key!r}]") for key, value in entries.items()}

    def size(self, name: str, *, low: int = 0, high: int = 1 << 53) -> int:
        """An entry that is a whole number within bounds."""
        value = self.get(name, int)
        if not low <= value <= high:
            self.bad(f"{name!r} is {_shown(value)}, not within {low} and {high}")
        return value

    def _typed(self, value: object, of: type[T], where: str) -> T:
        if of is float and type(value) is int:
            return of(value)  # type: ignore[call-arg]
        if type(value) is not of:
            self.bad(f"{where} is {_shown(value)}, not {_KINDS.get(of, of.__name__)}")
        return value


_KINDS: dict[type, str] = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


def check_plain(content: object, noun: str) -> None:
    """Refuses to write what this module would not read; errors call it ``noun``."""
    try:
        _check_depth(content)
        json.dumps(content, ensure_ascii=False).encode()
    except (RecursionError, ValueError) as fault:
        why = str(fault) or f"it is nested more than {MAX_DEPTH} deep"
        raise GemmaScopeError(f"{noun} cannot be saved: {why}") from fault


def bad_file(path: Path | str, why: str, fix: str = FIX) -> BadFileError:
    """The refusal of a file."""
    return BadFileError(f"cannot read {str(path)!r}: {why}", fix=fix)


def _shown(value: object) -> str:
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        keys: set[str] = set()
        twice = next(key for key, _ in pairs if key in keys or keys.add(key))
        raise ValueError(f"the key {_shown(twice)} appears twice in one object")
    return content


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"it holds {word}, which is not a number")


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"it holds {text[:40]}, which is beyond all numbers")
    return value


def _check_depth(content: object) -> None:
    """Level by level, so that depth costs no stack."""
    kinds = (dict, list, tuple)
    level = [content] if isinstance(content, kinds) else []
    for _ in range(MAX_DEPTH):
        level = [
            value
            for parent in level
            for value in (parent.values() if type(parent) is dict else parent)
            if type(value) in kinds
        ]
    if level:
        raise RecursionError


def _check_text(text: str, content: object) -> None:
    """Halves of surrogate pairs are not text, and cannot be written again."""
    if _SURROGATE.search(text):
        json.dumps(content, ensure_ascii=False).encode()
