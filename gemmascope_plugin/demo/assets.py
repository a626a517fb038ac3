"""Where the files of the bundled suite lie inside the package, and how they are written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gemmascope_plugin.files.whole import write_text_whole
from gemmascope_plugin.loading.sources import ASSETS

__all__ = ["ASSETS", "LABELS_FILE", "MODEL_FOLDER", "SUITE_FILE", "read_json", "write_json"]

MODEL_FOLDER = "model"
SUITE_FILE = "suite.json"
LABELS_FILE = "labels.json"


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Writes JSON, whole or not at all."""
    write_text_whole(path, json.dumps(content, indent=1) + "\n")
