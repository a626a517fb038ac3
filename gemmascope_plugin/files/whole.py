"""Files and folders that appear whole or not at all.

1. A file is written under a temporary name of its own in the same folder, flushed to disk, and renamed:
   readers and parallel writers see the old file or the new one, never a part.
2. A folder is written as ``.NAME.part`` under a lock, flushed, and renamed. Where there is an older one
   it becomes ``.NAME.old`` just before, and is deleted after; a folder can be replaced in two renames
   only, and a writer that was killed between them is seen by the next, which puts the older one back.
3. What is not of the new folder's kind is not deleted: an older folder with files that the new one does
   not have is refused.

Costs one flush per file.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from gemmascope_plugin.errors import GemmaScopeError, shorten
from gemmascope_plugin.files.lock import file_lock

FIX = "free space, mend the permissions, or write elsewhere"
WAIT = 60.0
"""Seconds to wait for another writer of the same folder."""


def write_whole(path: Path, write: Callable[[BinaryIO], object], *, fix: str = FIX) -> Path:
    """Writes a file that appears under its name only when complete; its folder is made."""
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(6)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        try:
            with os.fdopen(os.open(temporary, flags, 0o666), "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        _sync_names(path.parent)
    except OSError as fault:
        raise _cannot_write(path, fault, fix) from fault
    return path


def write_text_whole(path: Path, text: str, *, fix: str = FIX) -> Path:
    """Writes a text, in UTF-8, that appears only when complete."""
    data = text.encode()
    return write_whole(path, lambda file: file.write(data), fix=fix)


@contextmanager
def whole_folder(path: Path, purpose: str, *, fix: str = FIX) -> Iterator[Path]:
    """A folder to fill, which appears under its name when the block ends without an error.

    An older one is replaced. ``purpose`` says what is done, for a second writer's error.
    """
    part, old = path.with_name(f".{path.name}.part"), path.with_name(f".{path.name}.old")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(path.with_name(f".{path.name}.lock"), purpose, shown=path, wait=WAIT):
            recover_folder(path)
            remove(part)
            part.mkdir()
            try:
                yield part
                _check_same_kind(path, part)
                sync_folder(part)
                if path.is_dir():
                    os.replace(path, old)
                os.replace(part, path)
            except BaseException:
                with suppress(OSError):
                    recover_folder(path)
                    remove(part)
                raise
            _sync_names(path.parent)
            with suppress(OSError):  # the next writer deletes it
                remove(old)
    except OSError as fault:
        raise _cannot_write(path, fault, fix) from fault


def recover_folder(path: Path) -> None:
    """Puts back the older folder that a killed writer had set aside; deletes it where it was replaced."""
    old = path.with_name(f".{path.name}.old")
    if old.is_dir() and not path.exists():
        os.replace(old, path)
    remove(old)


def discard(folder: Path) -> None:
    """Deletes a whole folder: it loses its name first, so that no part of it is left under it."""
    part = folder.with_name(f".{folder.name}.part")
    remove(part)
    if folder.is_dir():
        os.replace(folder, part)
        remove(part)


def sha256_of(path: Path) -> str:
    """Checksum of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Makes sure that all files of a folder, and their names, are on the disk."""
    for above, _, names in os.walk(folder):
        for name in names:
            handle = os.open(Path(above) / name, os.O_RDWR | getattr(os, "O_BINARY", 0))
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        _sync_names(Path(above))


def remove(folder: Path) -> None:
    """Deletes a folder if it is there; of a link only the link."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.is_dir():
        shutil.rmtree(folder)


def _sync_names(folder: Path) -> None:
    """Makes sure that a rename in a folder is on the disk, where the system can."""
    if os.name != "posix":
        return
    with suppress(OSError):  # some file systems refuse to flush folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _check_same_kind(path: Path, part: Path) -> None:
    """Refuses to delete what the new folder does not bring."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise GemmaScopeError(f"{str(path)!r} is not a folder", fix="another path, or delete it")
    if not path.is_dir():
        return
    names = sorted({p.name for p in path.iterdir()} - {p.name for p in part.iterdir()})
    if names:
        raise GemmaScopeError(
            f"{str(path)!r} holds other files, which would be lost: {shorten(names)}",
            fix="another folder, or delete it",
        )


def _cannot_write(path: Path, fault: OSError, fix: str) -> GemmaScopeError:
    return GemmaScopeError(f"cannot write {str(path)!r}: {fault.strerror or fault}", fix=fix)
