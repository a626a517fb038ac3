"""Where the parameter file of a spec is, and how it gets there.

In this order, first match:

1. a bundled spec: inside this package;
2. ``local_dir``: a folder that mirrors the repository; a spec made from a folder: that folder;
3. the Hugging Face cache, for the revision asked for; no request is made;
4. the hub, unless ``offline`` or ``HF_HUB_OFFLINE=1``: one file, nothing else of the repository.

Costs nothing but step 4, which downloads up to ``spec.nbytes``.
"""

from __future__ import annotations

import os
from pathlib import Path

from gemmascope_plugin.catalog import SaeSpec
from gemmascope_plugin.catalog.sites import human_size
from gemmascope_plugin.catalog.spec import BUNDLED_PREFIX
from gemmascope_plugin.errors import MissingFileError, nearest, shorten

ASSETS = Path(__file__).parents[1] / "demo" / "assets"
_TRUE = {"1", "ON", "YES", "TRUE"}


def locate(
    spec: SaeSpec,
    *,
    local_dir: str | Path | None = None,
    revision: str | None = None,
    offline: bool | None = None,
    force_download: bool = False,
) -> Path:
    """The parameter file of a spec, downloaded if need be.

    Args:
        spec: Which dictionary.
        local_dir: Folder that mirrors the repository; looked at instead of cache and hub.
        revision: Branch, tag or commit of the repository.
        offline: Never use the network; None follows ``HF_HUB_OFFLINE``.
        force_download: Fetch again although the file is in the cache.

    Returns:
        Path of an existing file.

    Raises:
        MissingFileError: It is nowhere, and may not or could not be downloaded.
    """
    if local_dir is not None:
        return _in_folder(spec, Path(local_dir).expanduser(), "local_dir")
    if spec.bundled:
        return _in_folder(spec, ASSETS / spec.repo_id.removeprefix(BUNDLED_PREFIX), "the package")
    if spec.local:
        return _in_folder(spec, Path(spec.repo_id), "the folder of the spec")
    if not force_download and (cached := _in_cache(spec, revision)):
        return cached
    if is_offline(offline):
        raise MissingFileError(
            f"{spec.release} {spec.sae_id} ({human_size(spec.nbytes)}) is not in the cache and "
            "offline mode is on",
            fix=_advice(spec, revision),
        )
    return _from_hub(spec, revision, force_download)


def is_offline(offline: bool | None = None) -> bool:
    """Whether the network may not be used: the argument, else ``HF_HUB_OFFLINE``."""
    if offline is not None:
        return offline
    from huggingface_hub import constants

    asked = os.environ.get("HF_HUB_OFFLINE", "").upper() in _TRUE
    return asked or bool(constants.HF_HUB_OFFLINE)


def _advice(spec: SaeSpec, revision: str | None) -> str:
    at = f" --revision {revision}" if revision else ""
    return f"hf download {spec.repo_id} {spec.filename}{at}"


def _in_folder(spec: SaeSpec, folder: Path, what: str) -> Path:
    path = folder / spec.filename
    if path.is_file():
        return path
    there = sorted(p.parent.relative_to(folder).as_posix() for p in folder.glob("**/params.npz"))
    fix = f"put the file of {spec.release} {spec.sae_id} at {str(path)!r}"
    if spec.bundled:
        fix = "python -m gemmascope_plugin.demo.train makes the bundled files again"
    raise MissingFileError(
        f"no file {str(path)!r} in {what}",
        exists=shorten(there, 4) if there else "no params.npz in this folder",
        nearest=nearest(spec.path, there),
        fix=fix,
    )


def _in_cache(spec: SaeSpec, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(spec.repo_id, spec.filename, revision=revision)
    return Path(found) if isinstance(found, str) else None


def _from_hub(spec: SaeSpec, revision: str | None, force_download: bool) -> Path:
    """Fetch one file; huggingface_hub shows the progress and writes whole files only."""
    import httpx
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError

    try:
        return Path(
            hf_hub_download(
                spec.repo_id, spec.filename, revision=revision, force_download=force_download
            )
        )
    except GatedRepoError as fault:
        raise MissingFileError(
            f"{spec.repo_id} is gated and this machine has no access",
            fix=f"accept the terms at https://huggingface.co/{spec.repo_id}, then: hf auth login",
        ) from fault
    except (OSError, ValueError, RuntimeError, EntryNotFoundError, httpx.HTTPError) as fault:
        reason = str(fault).strip().split("\n")[0].rstrip(".")
        raise MissingFileError(
            f"could not download {spec.filename} of {spec.repo_id} "
            f"({human_size(spec.nbytes)}): {type(fault).__name__} {reason}",
            fix=_advice(spec, revision) + " on a machine with network, or load(..., local_dir=...)",
        ) from fault
