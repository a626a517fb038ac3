"""Sizes in bytes, as people write them."""

from __future__ import annotations

import operator
import re
from typing import SupportsIndex

from gemmascope_plugin.errors import UnknownNameError

UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}


def parse_size(size: SupportsIndex | float | str | None) -> int | None:
    """Bytes of a size such as ``"8 GB"`` or ``"512MiB"``; numbers and None pass through.

    Args:
        size: Number of bytes, or a number with a unit. A text without a unit is refused: nobody who
            writes ``"4"`` means four bytes.

    Returns:
        Bytes.

    Raises:
        UnknownNameError: It is not a positive size, or has no unit.
    """
    if size is None:
        return None
    exists = "a number of bytes, or a text with a unit: '8 GB', '512 MiB'"
    if not isinstance(size, str):
        number = None if isinstance(size, bool) else _whole(size)
        if number is None or number < 1:
            raise UnknownNameError(f"{size!r} is not a size", exists=exists)
        return number
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", size.lower())
    if match is None or match[2] not in UNITS | {"": 1} or not float(match[1]):
        raise UnknownNameError(f"{size!r} is not a size", exists=exists)
    if not match[2]:
        raise UnknownNameError(
            f"The size {size!r} has no unit", exists=exists, fix=f"'{match[1]} GB'"
        )
    number = int(float(match[1]) * UNITS[match[2]])
    if number < 1:
        raise UnknownNameError(f"{size!r} is less than one byte", exists=exists)
    return number


def _whole(size: object) -> int | None:
    """An int, numpy's integers, or a whole float such as ``4e9``."""
    try:
        return operator.index(size)  # pyright: ignore[reportArgumentType]
    except TypeError:
        return int(size) if isinstance(size, float) and size.is_integer() else None
