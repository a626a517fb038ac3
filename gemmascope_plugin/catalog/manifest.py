"""Folders of known repositories: what their names say, and which of them ``refresh()`` has seen.

``spec_of_folder``: from the name of a folder that no table lists to a spec.

1. ``layer_{L}/width_{W}/average_l0_{N}`` and ``embedding/...`` in the repositories of Gemma Scope 1.
2. ``{site}/layer_{L}_width_{W}_l0_{label}[_affine][_seed_{n}]`` in those of Gemma Scope 2; the families
   of several layers are complete by rule and are looked up.

Everything follows from the name; whether the folder exists is not known here, and the specs say
``provenance="derived"``.  A few microseconds per name.

The manifest, what the repositories were seen to hold, is a small file of the user:

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
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import gemmascope_plugin.catalog.community as community
import gemmascope_plugin.catalog.gemma_scope_1 as gemma_scope_1
import gemmascope_plugin.catalog.gemma_scope_2 as gemma_scope_2
from gemmascope_plugin.catalog.site_names import WIDTHS, hooks, raw_nbytes
from gemmascope_plugin.catalog.spec import SaeSpec, unchecked
from gemmascope_plugin.files.home import VARIABLE, home
from gemmascope_plugin.files.json_file import Record, read_json
from gemmascope_plugin.files.lock import file_lock
from gemmascope_plugin.files.whole import write_text_whole

_GEMMA_SCOPE_1 = re.compile(r"(?:layer_(\d+)|embedding)/width_(\w+)/average_l0_(\d+)")
_GEMMA_SCOPE_2 = re.compile(
    r"(\w+)/layer_(\d+)_width_([^_]+)_l0_(small|medium|big)((?:_affine)?(?:_seed_\d+)?)"
)


@cache
def repositories() -> dict[str, tuple[str, ...]]:
    """Repository to its releases, canonical ones not among them."""
    by_repository: dict[str, list[str]] = {}
    for release in gemma_scope_1.heads():
        by_repository.setdefault(f"google/{release}", []).append(release)
    for release in gemma_scope_2.heads():
        size, tuning, _ = gemma_scope_2.split_release(release)
        repo_id = f"google/{gemma_scope_2.PREFIX}{size}-{tuning}"
        by_repository.setdefault(repo_id, []).append(release)
    for release in community.heads():
        by_repository.setdefault(community.build(release)[0].repo_id, []).append(release)
    return {repo_id: tuple(names) for repo_id, names in by_repository.items()}


def spec_of_folder(repo_id: str, path: str) -> SaeSpec | None:
    """The derived spec of a folder, by its name; None where repository or pattern is unknown."""
    releases = repositories().get(repo_id, ())
    if not releases:
        return None
    if match := _GEMMA_SCOPE_1.fullmatch(path):
        if releases[0] in gemma_scope_1.heads():
            return _first_suite(releases[0], path, match[1], match[2], int(match[3]))
        return None
    if match := _GEMMA_SCOPE_2.fullmatch(path):
        folder, layer, width, label, ending = match.groups()
        for release in releases if releases[0] in gemma_scope_2.heads() else ():
            if gemma_scope_2.is_single_layer_folder(release, folder) and width in WIDTHS:
                is_layer = int(layer) < gemma_scope_2.n_layers(release)
                is_kind = "_affine" not in ending or folder.startswith("transcoder")
                if is_layer and is_kind:
                    return gemma_scope_2.unlisted_spec(release, int(layer), width, label, ending)
    return None


def _first_suite(release: str, path: str, layer: str | None, width: str, l0: int) -> SaeSpec | None:
    """A folder of Gemma Scope 1, by the example of another one of its release."""
    if width not in WIDTHS:
        return None
    like = gemma_scope_1.build(release)[0]
    if layer is None and (like.kind, like.site) != ("sae", "res"):
        return None
    site, number = (like.site, int(layer)) if layer is not None else ("embedding", 0)
    if number >= gemma_scope_1.N_LAYERS[like.model]:
        return None
    hook_in, hook_out = hooks(like.kind, site, number)
    return replace(
        like,
        sae_id=path,
        path=path,
        site=site,
        layer=number,
        width=width,
        d_sae=WIDTHS[width],
        nbytes=raw_nbytes(like.d_in, like.d_out, WIDTHS[width]),
        l0=float(l0),
        hook_in=hook_in,
        hook_out=hook_out,
        neuronpedia_id=None,
        provenance="derived",
        canonical=False,
    )


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
    """Repository to its listing; empty when nothing was ever refreshed."""
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


def update(additions: Mapping[str, Listing]) -> Path:
    """Adds listings to those that are there, which another process may have changed since."""
    path = manifest_path()
    lock = path.with_name(f".{FILE_NAME}.lock")
    with file_lock(lock, "a refresh of the catalog", shown=path, wait=WAIT):
        listings.cache_clear()
        return write({**listings(), **additions})


def write(entries: Mapping[str, Listing]) -> Path:
    """Write the file, whole or not at all."""
    path = manifest_path()
    rows = {repo_id: asdict(listing) for repo_id, listing in sorted(entries.items())}
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
    present = [
        unchecked({**vars(s), "provenance": "listed"}) for s in specs if s.path not in missing
    ]
    paths = {s.path for s in specs}
    for path in listing.added:
        spec = spec_of_folder(specs[0].repo_id, path)
        if spec is not None and spec.release == release and path not in paths:
            present.append(unchecked({**vars(spec), "provenance": "listed"}))
    return tuple(present)
