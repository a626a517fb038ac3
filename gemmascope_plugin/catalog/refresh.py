"""``refresh()``: ask the hub what the repositories hold, and remember how the tables differ.

1. Every repository of the catalog (or those named) is listed once; no file is downloaded.
2. A dictionary is there when all of its parameter files are.  Entries that are there become "listed",
   entries that are not are dropped, and folders of the known patterns that no table names are added.
3. The differences are written at the end, in one file that appears whole or not at all; interrupted
   runs change nothing.  ``find()`` uses it from then on, in every process.

Costs one listing per repository, some seconds each for the large ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath
from typing import Any

import gemmascope_plugin.catalog.manifest as manifest
import gemmascope_plugin.catalog.tables as tables
from gemmascope_plugin.arguments import is_offline
from gemmascope_plugin.catalog.manifest import Listing, spec_of_folder
from gemmascope_plugin.catalog.site_names import PARAMETER_FILES
from gemmascope_plugin.catalog.spec import SaeSpec
from gemmascope_plugin.errors import (
    BadFileError,
    MissingFileError,
    UnknownNameError,
    nearest,
    shorten,
)

COLUMNS = ("repository", "there", "confirmed", "missing", "added", "not understood")
_PARAMETERS = tuple(name.format(0) for name in PARAMETER_FILES.values())
_FIX = "gemmascope refresh on a machine with network; find() works without it"


@dataclass(frozen=True, kw_only=True)
class RepositoryReport:
    """What the listing of one repository showed."""

    repo_id: str
    present: int
    """Dictionaries that exist."""
    confirmed: int
    """Of these, entries that had been derived from the pattern only."""
    missing: tuple[str, ...]
    """Folders of the tables that do not exist."""
    added: tuple[str, ...]
    """Folders of a known pattern that the tables lack."""
    unknown: tuple[str, ...]
    """Folders with parameters whose names follow no known pattern; not used."""


@dataclass(frozen=True)
class RefreshReport:
    """All repositories, and where the differences were written."""

    repositories: tuple[RepositoryReport, ...]
    path: Path

    def rows(self) -> list[tuple[str, ...]]:
        """Cells for a table, in the order of ``COLUMNS``."""
        return [
            (
                r.repo_id,
                *map(str, (r.present, r.confirmed, len(r.missing), len(r.added), len(r.unknown))),
            )
            for r in self.repositories
        ]

    def __repr__(self) -> str:
        lines = [COLUMNS, *self.rows()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = "\n".join(
            "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )
        return f"{text}\nwritten to {self.path}"

    def _repr_html_(self) -> str:
        from gemmascope_plugin.figures.fragments import table

        return table(COLUMNS, self.rows(), f"written to {self.path}")


def refresh(*, repos: Sequence[str] | None = None, progress: bool = True) -> RefreshReport:
    """List the repositories on the hub, and correct the catalog of this user by what is there.

    Args:
        repos: Repositories to list, e.g. ``["google/gemma-scope-2-27b-pt"]``; all of them by default.
            What earlier runs found about others is kept.
        progress: Show a progress bar.

    Returns:
        Per repository, what is there, confirmed, missing and added.

    Raises:
        UnknownNameError: A repository that the catalog has nothing of.
        MissingFileError: The hub may not or could not be asked.
        BadFileError: A repository holds nothing that was expected, so its layout must have changed.

    Example:
        >>> gs.refresh()  # doctest: +SKIP
    """
    repositories = manifest.repositories()
    names = list(repositories) if repos is None else list(repos)
    for repo_id in names:
        if repo_id not in repositories:
            raise UnknownNameError(
                f"no repository {repo_id!r} in the catalog",
                exists=shorten(repositories, 12),
                nearest=nearest(repo_id, repositories),
            )
    api = _api()
    manifest.listings()  # a damaged file is said before the network is asked
    differences: dict[str, Listing] = {}
    reports = []
    for repo_id in _with_progress(names, progress):
        specs = [s for release in repositories[repo_id] for s in tables.built_in(release)]
        report = compare(repo_id, specs, _files_of(api, repo_id))
        reports.append(report)
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        differences[repo_id] = Listing(listed_at=now, missing=report.missing, added=report.added)
    path = manifest.update(differences)
    tables.clear_caches()
    return RefreshReport(tuple(reports), path)


def forget() -> bool:
    """Remove what refreshes found; False when there was nothing."""
    existed = manifest.remove()
    tables.clear_caches()
    return existed


def compare(repo_id: str, specs: Iterable[SaeSpec], files: Iterable[str]) -> RepositoryReport:
    """The tables' specs of a repository against the paths of all files in it; one must be there."""
    paths = set(files)
    complete = [spec for spec in specs if paths.issuperset(spec.filenames)]
    expected = {spec.path for spec in specs}
    present = {spec.path for spec in complete}
    if not complete:
        raise BadFileError(
            f"none of the {len(expected)} expected folders is in {repo_id}",
            exists=shorten(sorted(paths), 4) or "no file",
            fix="nothing was changed; a newer version of this package may know the new layout",
        )
    folders = {
        PurePosixPath(p).parent.as_posix() for p in paths if PurePosixPath(p).name in _PARAMETERS
    }
    unexpected = sorted(folders - expected)
    added = [path for path in unexpected if spec_of_folder(repo_id, path) is not None]
    return RepositoryReport(
        repo_id=repo_id,
        present=len(present) + len(added),
        confirmed=sum(spec.provenance == "derived" for spec in complete),
        missing=tuple(sorted(expected - present)),
        added=tuple(added),
        unknown=tuple(sorted(set(unexpected) - set(added))),
    )


def _api() -> Any:
    """huggingface_hub's client, if the network may be used."""
    from huggingface_hub import HfApi

    if is_offline():
        raise MissingFileError(
            "the repositories cannot be listed: offline mode is on (HF_HUB_OFFLINE)",
            fix=f"unset HF_HUB_OFFLINE, then {_FIX}",
        )
    return HfApi()


def _files_of(api: Any, repo_id: str) -> list[str]:
    """Paths of all files of a repository."""
    import httpx

    try:
        return list(api.list_repo_files(repo_id))
    except (OSError, ValueError, RuntimeError, httpx.HTTPError) as fault:
        reason = str(fault).strip().split("\n")[0].rstrip(".")
        raise MissingFileError(
            f"could not list {repo_id}: {type(fault).__name__} {reason}. Nothing was changed",
            fix=_FIX,
        ) from fault


def _with_progress(repos: Sequence[str], progress: bool) -> Iterable[str]:
    if not progress:
        return repos
    from tqdm.auto import tqdm

    return tqdm(repos, desc="listing", unit="repository")
