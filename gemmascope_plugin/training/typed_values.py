"""Are the values of a mapping of the types that a dataclass declares?

1. Literals, numbers, text, booleans, tuples and mappings are compared with the annotation; an integer is
   a float, as in Python, a boolean is not a number.
2. Lists become tuples, which is what JSON made of them.
3. Text from a command line is read as JSON where it is JSON, else kept.

Costs nothing.
"""

from __future__ import annotations

import json
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from gemmascope_plugin.errors import GemmaScopeError, UnknownNameError, nearest, shorten


def check_types(owner: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, lists as tuples, integers as floats where only a float is declared."""
    hints = get_type_hints(owner)
    result = {}
    for name, value in values.items():
        value = tuple(value) if isinstance(value, list) else value
        if hints[name] in (float, float | None) and type(value) is int:
            value = float(value)
        if not _fits(value, hints[name]):
            raise _wrong(name, value, hints[name])
        result[name] = value
    return result


def read_text(text: str) -> Any:
    """A value typed on a command line: ``0.01``, ``true``, ``null``, ``[64, 256]``, or plain text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _fits(value: object, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in inner
    if origin in (Union, types.UnionType):
        return any(_fits(value, each) for each in inner)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, inner[0]) for item in value)
    plain = origin or hint
    if plain is int or plain is float:
        return type(value) is plain
    return isinstance(value, plain)


def _wrong(name: str, value: object, hint: Any) -> GemmaScopeError:
    if get_origin(hint) is Literal:
        options = [str(option) for option in get_args(hint)]
        return UnknownNameError(
            f"Unknown {name} {value!r}",
            exists=shorten(options),
            nearest=nearest(str(value), options),
        )
    type_name = str(hint).removeprefix("<class '").removesuffix("'>")
    return GemmaScopeError(f"{name}={value!r} is of type {type(value).__name__}, not {type_name}")
