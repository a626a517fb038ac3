"""Reads a JSON object from a small file, or says which file is damaged.

Costs nothing; files above 1 MB, which no config of a dictionary has, are refused unread.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gemmascope_plugin.errors import BadFileError

MAX_SIZE = 1 << 20


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of at most 1 MB.

    Raises:
        BadFileError: It is damaged, too large, or not an object.
    """
    try:
        if path.stat().st_size > MAX_SIZE:
            raise ValueError(f"{path.stat().st_size} bytes are too many")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as fault:
        raise BadFileError(f"cannot read {str(path)!r}: {fault}", fix="fetch it again") from fault
    if not isinstance(content, dict):
        raise BadFileError(f"{str(path)!r} is not a JSON object")
    return content
