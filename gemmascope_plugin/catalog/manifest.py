"""What the repositories were seen to hold, as ``refresh()`` last found them: a small file of the user.

    {"format": 1, "repositories": {repo_id: {"listed_at": ..., "missing": [folder, ...],
                                             "added": [folder, ...]}}}

1. Only differences from the built-in tables are kept: folders that are not there, and folders that no
   table names.  All others of a repository in the file are confirmed.
2. The file is written under a temporary name and renamed, so that it is whole or not there.
3. ``corrected`` applies a listing to the specs of one release: what is missing goes, what is there is
   "listed", what was added follows at the end.

Reading costs a millisecond; without the file nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from gemmascope_plugin.catalog.home import VARIABLE, home
from gemmascope_plugin.catalog.patterns import spec_of_folder
from gemmascope_plugin.catalog.spec import SaeSpec, unchecked
from gemmascope_plugin.files.json_file import Record, read_json
from gemmascope_plugin.files.lock import file_lock
from gemmascope_plugin.files.whole import write_text_whole

FORMAT = 1
FILE_NAME = "manifest.json"
MAX_SIZE = 1 << 26
WAIT = 30.0
"""Seconds to wait for another process that writes the file."""
FIX = "gemmascope refresh --clear, then gemmascope refresh"


@dataclass(frozen=True, kw_only=True)
class Listing:
    """How one repository differs from the tables."""

    listed_at: str
    """When, in UTC."""
    missing: tuple[str, ...] = ()
    added: tuple[str, ...] = ()


def manifest_path() -> Path:
    """Where the file is, if it exists."""
    return home() / FILE_NAME


@cache
def listings() -> dict[str, Listing]:
    """Repository to its listing; empty when nothing was ever refreshed.

    Raises:
        BadFileError: The file is not what ``write`` writes.
    """
    path = manifest_path()
    if not path.exists():
        return {}
    content = Record(read_json(path, max_size=MAX_SIZE, fix=FIX), path, FIX)
    if content.content.get("format") != FORMAT:
        content.bad(f"it has format {content.content.get('format')!r}")
    repositories = content.dict_of("repositories", dict)
    rows = {repo_id: Record(row, path, FIX) for repo_id, row in repositories.items()}
    return {
        repo_id: Listing(
            listed_at=row.get("listed_at", str),
            missing=tuple(row.list_of("missing", str)),
            added=tuple(row.list_of("added", str)),
        )
        for repo_id, row in rows.items()
    }


def update(found: Mapping[str, Listing]) -> Path:
    """Adds listings to those that are there, which another process may have changed since.

    Raises:
        GemmaScopeError: The folder cannot be written to, or somebody else writes for long.
    """
    path = manifest_path()
    lock = path.with_name(f".{FILE_NAME}.lock")
    with file_lock(lock, "a refresh of the catalog", shown=path, wait=WAIT):
        listings.cache_clear()
        return write({**listings(), **found})


def write(found: Mapping[str, Listing]) -> Path:
    """Write the file, whole or not at all.

    Raises:
        GemmaScopeError: The folder cannot be written to.
    """
    path = manifest_path()
    rows = {repo_id: asdict(listing) for repo_id, listing in sorted(found.items())}
    text = json.dumps({"format": FORMAT, "repositories": rows}, indent=1)
    write_text_whole(path, text + "\n", fix=f"set {VARIABLE} to a folder that you may write to")
    listings.cache_clear()
    return path


def remove() -> bool:
    """Forget everything that was listed; False when there was nothing."""
    path = manifest_path()
    existed = path.exists()
    path.unlink(missing_ok=True)
    listings.cache_clear()
    return existed


def corrected(release: str, specs: Sequence[SaeSpec]) -> tuple[SaeSpec, ...]:
    """The specs of one release as its repository was last seen."""
    listing = listings().get(specs[0].repo_id)
    if listing is None:
        return tuple(specs)
    missing = set(listing.missing)
    there = [unchecked({**vars(s), "provenance": "listed"}) for s in specs if s.path not in missing]
    known = {s.path for s in specs}
    for path in listing.added:
        spec = spec_of_folder(specs[0].repo_id, path)
        if spec is not None and spec.release == release and path not in known:
            there.append(unchecked({**vars(spec), "provenance": "listed"}))
    return tuple(there)
