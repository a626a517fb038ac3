"""A folder of graphs for circuit-tracer's viewer, and their list.

A folder has a list of its graphs, ``graph-metadata.json``, one entry per name, written under a lock after
the graph: it never names one that is not there.

Cost: that of writing the graph.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemmascope_plugin.errors import GemmaScopeError, UnknownNameError
from gemmascope_plugin.files.json_file import Record, read_json
from gemmascope_plugin.files.lock import file_lock
from gemmascope_plugin.files.whole import write_whole

INDEX = "graph-metadata.json"
MAX_SLUG, MAX_INDEX_SIZE = 200, 1 << 26
_SLUG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
"""Names that Windows has for devices."""


def check_slug(slug: str) -> None:
    """Refuses a name of a graph that is not a plain file name, or is that of the list of graphs."""
    if not isinstance(slug, str) or not _SLUG.fullmatch(slug) or len(slug) > MAX_SLUG:
        raise UnknownNameError(
            f"The slug {slug!r} is not a file name", exists="letters, digits, '.', '_', '-'"
        )
    if f"{slug.lower()}.json" == INDEX or _RESERVED.fullmatch(slug):
        raise UnknownNameError(
            f"The slug {slug!r} names a file that is something else", fix=f"slug='my-{slug}'"
        )


def write_json(path: str | Path, content: Mapping[str, Any]) -> Path:
    """Writes a graph file, whole or not at all."""
    path = Path(path).expanduser()
    if path.is_dir():
        raise GemmaScopeError(f"{str(path)!r} is a folder", fix=f"{str(path / 'graph.json')!r}")
    data = json.dumps(content, allow_nan=False, separators=(",", ":")).encode()
    return write_whole(path, lambda file: file.write(data))


def add_to_folder(folder: str | Path, content: Mapping[str, Any]) -> Path:
    """Writes ``<slug>.json`` and enters it in ``graph-metadata.json``, in the place of an older one;
    waits a minute where another process writes into the folder.
    """
    folder, metadata = Path(folder).expanduser(), content["metadata"]
    check_slug(metadata["slug"])
    info = {**metadata["info"], "create_time_ms": time.time_ns() // 10**6}
    metadata = {**metadata, "info": info}
    index = folder / INDEX
    with file_lock(folder / f".{INDEX}.lock", "a graph", shown=folder, wait=60.0):
        listed = [each for each in _listed(index) if each.get("slug") != metadata["slug"]]
        path = write_json(folder / f"{metadata['slug']}.json", {**content, "metadata": metadata})
        listed.append({name: value for name, value in metadata.items() if name != "gemmascope"})
        write_json(index, {"graphs": listed})
    return path


def _listed(index: Path) -> list[dict[str, Any]]:
    """What the list of graphs has."""
    if not index.exists():
        return []
    fix = "mend it, delete it, or another folder"
    content = read_json(index, max_size=MAX_INDEX_SIZE, fix=fix)
    return Record(content, index, fix).list_of("graphs", dict)
