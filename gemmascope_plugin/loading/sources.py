"""Where the files of a spec are, and how they get there.

In this order, first match:

1. a bundled spec: inside this package;
2. ``local_dir``: a folder that mirrors the repository, out of which neither the spec's path nor a link
   may lead; a spec made from a folder: that folder;
3. the Hugging Face cache, for the revision asked for; no request is made;
4. the hub, unless ``offline`` or ``HF_HUB_OFFLINE=1``: the parameter files and the config beside them,
   nothing else of the repository.  The size is announced on stderr first; the hub's library shows
   the progress, locks against parallel downloads, and lets a file appear only when it is whole.

Costs nothing but step 4, which downloads up to ``spec.nbytes``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath

from gemmascope_plugin.arguments import human_size, is_offline
from gemmascope_plugin.catalog import SaeSpec
from gemmascope_plugin.catalog.spec import BUNDLED_PREFIX
from gemmascope_plugin.errors import BadFileError, InputError, MissingFileError, nearest, shorten

ASSETS = Path(__file__).parents[1] / "demo" / "assets"
_NEEDS_CONFIG = ("sae_lens", "tree")
"""Formats that cannot be read without their JSON file."""


def locate(
    spec: SaeSpec,
    *,
    local_dir: str | Path | None = None,
    revision: str | None = None,
    offline: bool | None = None,
    force_download: bool = False,
) -> dict[str, Path]:
    """Path in the repository to path here, of a spec's parameter files and its config, if there is one.

    ``local_dir`` mirrors the repository and is looked at instead of cache and hub. Files that are nowhere
    are downloaded, unless ``offline``; ``force_download`` fetches again what is in the cache.
    """
    _check_names(spec)
    if local_dir is not None:
        if not isinstance(local_dir, (str, os.PathLike)):
            raise InputError(f"local_dir={local_dir!r} is not a path", fix='local_dir="~/saes"')
        return _in_folder(spec, Path(local_dir).expanduser(), "local_dir")
    if spec.bundled:
        return _in_folder(spec, ASSETS / spec.repo_id.removeprefix(BUNDLED_PREFIX), "the package")
    if spec.local:
        return _in_folder(spec, Path(spec.repo_id), "the folder of the spec")
    paths: dict[str, Path] = {}
    if not force_download:
        paths = {n: path for n in _names(spec) if (path := _in_cache(spec, n, revision))}
    missing = [name for name in _required(spec) if name not in paths]
    if not missing:
        return paths
    names = [name for name in _names(spec) if name not in paths]
    if is_offline(offline):
        raise MissingFileError(
            f"{spec.release} {spec.sae_id} ({human_size(spec.nbytes)}) is not in the cache and "
            "offline mode is on" + _how_many(spec, missing),
            fix=_advice(spec, revision),
        )
    return paths | _from_hub(spec, names, revision, force_download)


def is_here(spec: SaeSpec, local_dir: str | Path | None = None) -> bool:
    """Whether the parameter files of a spec are on this machine; nothing is downloaded."""
    if local_dir is not None:
        folder = Path(local_dir).expanduser()
        return all((folder / name).is_file() for name in spec.filenames)
    try:
        locate(spec, offline=True)
    except MissingFileError:
        return False
    return True


def _names(spec: SaeSpec) -> tuple[str, ...]:
    """All files that are of use."""
    config = spec.config_filename
    return (*spec.filenames, config) if config else spec.filenames


def _required(spec: SaeSpec) -> tuple[str, ...]:
    return _names(spec) if spec.format in _NEEDS_CONFIG else spec.filenames


def _check_names(spec: SaeSpec) -> None:
    """Refuses a spec whose files would lie outside its repository."""
    bundled = [spec.repo_id.removeprefix(BUNDLED_PREFIX)] if spec.bundled else []
    for name in (*_names(spec), *bundled):
        windows = PureWindowsPath(name)
        is_odd = any(c in name for c in "\\:\0") or windows.is_absolute() or windows.drive
        if is_odd or name.startswith(("/", "~")) or ".." in PurePosixPath(name).parts:
            raise BadFileError(
                f"{spec.release} {spec.sae_id} has the path {spec.path!r}, which leads out of its folder",
                exists="paths inside the repository, such as 'layer_20/width_16k/average_l0_71'",
                fix="SaeSpec.from_folder(folder, ...) for a folder elsewhere",
            )


def _check_links(spec: SaeSpec, folder: Path, paths: Iterable[Path]) -> None:
    """Refuses links that lead out of a folder, other than into a cache of the hub."""
    from huggingface_hub.constants import HF_HUB_CACHE

    real = folder.resolve()
    places = [real, Path(HF_HUB_CACHE).resolve()]
    if real.parent.name == "snapshots":
        places.append(real.parents[1] / "blobs")
    for path in paths:
        target = path.resolve()
        if not any(target.is_relative_to(place) for place in places):
            raise BadFileError(
                f"{str(path)!r} of {spec.release} {spec.sae_id} is a link to {str(target)!r}, outside "
                f"{str(folder)!r}",
                fix="put the file itself there, or SaeSpec.from_folder(folder, ...)",
            )


def _how_many(spec: SaeSpec, missing: list[str]) -> str:
    n = len(_required(spec))
    return "" if n == 1 else f"; {len(missing)} of its {n} files are missing"


def _advice(spec: SaeSpec, revision: str | None) -> str:
    at = f" --revision {revision}" if revision else ""
    if len(_names(spec)) == 1:
        return f"hf download {spec.repo_id} {spec.filename}{at}"
    folder = spec.filename.rpartition("/")[0]
    ending = spec.filename.rpartition(".")[2]
    stem = spec.filename.rpartition("/")[2].partition("_layer_")[0].partition(".")[0]
    # The pattern leaves examples.safetensors out, which is larger than many dictionaries.
    return (
        f"hf download {spec.repo_id} --include '{folder}/{stem}*.{ending}' "
        f"--include '{folder}/*.json'{at}"
    )


def _in_folder(spec: SaeSpec, folder: Path, place: str) -> dict[str, Path]:
    paths = {name: folder / name for name in _names(spec) if (folder / name).is_file()}
    missing = [name for name in _required(spec) if name not in paths]
    if place == "local_dir":
        _check_links(spec, folder, paths.values())
    if not missing:
        return paths
    path, name = folder / missing[0], missing[0].rpartition("/")[2]
    folders = sorted(p.parent.relative_to(folder).as_posix() for p in folder.glob(f"**/{name}"))
    fix = f"put the file of {spec.release} {spec.sae_id} at {str(path)!r}"
    if folder.is_relative_to(ASSETS):
        fix = "python -m gemmascope_plugin.demo.build makes the bundled files again"
    raise MissingFileError(
        f"no file {str(path)!r} in {place}",
        exists=shorten(folders, 4) if folders else f"no {name} in this folder",
        nearest=nearest(spec.path, folders),
        fix=fix,
    )


def _in_cache(spec: SaeSpec, name: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(spec.repo_id, name, revision=revision)
    return Path(path) if isinstance(path, str) else None


def _from_hub(
    spec: SaeSpec, names: list[str], revision: str | None, force_download: bool
) -> dict[str, Path]:
    """Fetch files one by one, the config first: it is small and may be absent."""
    from tqdm import tqdm

    n_large = sum(name in spec.filenames for name in names)
    share = spec.nbytes * n_large // len(spec.filenames)
    tqdm.write(f"downloading {spec.release} {spec.sae_id}, {human_size(share)}", file=sys.stderr)
    paths: dict[str, Path] = {}
    for name in sorted(names, key=lambda name: (name in spec.filenames, names.index(name))):
        optional = name not in _required(spec)
        if path := _fetch(spec, name, revision, force_download, optional):
            paths[name] = path
    return paths


def _fetch(
    spec: SaeSpec, name: str, revision: str | None, force: bool, optional: bool
) -> Path | None:
    """Fetch one file; huggingface_hub shows the progress and writes whole files only."""
    import httpx
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
    )

    try:
        return Path(hf_hub_download(spec.repo_id, name, revision=revision, force_download=force))
    except GatedRepoError as fault:
        raise MissingFileError(
            f"{spec.repo_id} is gated and this machine has no access",
            fix=f"accept the terms at https://huggingface.co/{spec.repo_id}, then: hf auth login",
        ) from fault
    except (OSError, ValueError, RuntimeError, EntryNotFoundError, httpx.HTTPError) as fault:
        absent = isinstance(fault, EntryNotFoundError)
        if optional and absent and not isinstance(fault, LocalEntryNotFoundError):
            return None
        reason = str(fault).strip().split("\n")[0].rstrip(".")
        path = getattr(fault, "filename", None)
        where = f" at {path!r}" if path else ""
        raise MissingFileError(
            f"could not download {name} of {spec.repo_id} "
            f"({human_size(spec.nbytes)}): {type(fault).__name__} {reason}{where}",
            fix=_advice(spec, revision) + " on a machine with network, or load(..., local_dir=...)",
        ) from fault
