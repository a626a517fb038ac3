"""One lock for a folder that is written to: whoever holds it is the only writer, on this machine.

1. The lock is one that the operating system holds on the file ``.lock`` (``flock``, on Windows a locked
   byte): it ends with its process, however that dies, so that nothing has to be cleaned up.
2. The file says who holds it: process, machine, program, purpose, since when. The error says the same.
3. A second taker in the same process, another thread too, is refused like one in another process.
4. A process that is forked from the holder gives the lock away at once, and cannot keep it alive.

Whoever waits (``wait=``) looks again every fifth of a second. Folders on a network file system are safe
as far as that file system passes locks on; one that has none raises an error.

Costs two system calls and a file of 200 bytes.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from gemmascope_plugin.errors import GemmaScopeError

LOCK = ".lock"
"""Name of the file inside a locked folder."""
MAX_RECORD = 4096
PAUSE = 0.2
"""Seconds between two looks of one who waits."""
_LOCKED_BYTE = 1 << 30  # on Windows a locked byte cannot be read, so it lies behind the record
_held: set[int] = set()
"""Descriptors of the locks of this process."""


class FolderInUseError(GemmaScopeError):
    """Another process, or another call in this one, writes to the folder."""


@contextmanager
def folder_lock(
    folder: str | Path,
    purpose: str,
    *,
    wait: float = 0.0,
    on_wait: Callable[[str], object] | None = None,
) -> Iterator[None]:
    """Makes this call the only writer of a folder, for ``purpose``, in the words of others' errors.

    The folder is made if need be, and removed again where nothing was written. The lock is its file
    ``.lock``. ``wait`` are seconds to wait for another writer, and ``on_wait`` is told once who that is.
    """
    folder = Path(folder)
    is_new = not folder.exists()
    try:
        with file_lock(folder / LOCK, purpose, shown=folder, wait=wait, on_wait=on_wait):
            yield
    finally:
        if is_new:
            with suppress(OSError):  # something was written
                folder.rmdir()


@contextmanager
def file_lock(
    path: Path,
    purpose: str,
    *,
    shown: Path | None = None,
    wait: float = 0.0,
    on_wait: Callable[[str], object] | None = None,
) -> Iterator[None]:
    """Makes this call the only holder of a lock file, which is removed at the end."""
    target = path if shown is None else shown
    handle = _take(path, target, wait, on_wait)
    try:
        _write_record(handle, purpose)
        yield
    finally:
        _release(handle, path)


def holder(folder: str | Path) -> str | None:
    """Who writes to a folder, in words; None when nobody does."""
    path = Path(folder) / LOCK
    if not path.is_file():
        return None
    try:
        handle = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    except OSError:
        return None
    try:
        return None if _try_lock(handle) else _who(path)
    finally:
        os.close(handle)


def _take(path: Path, target: Path, wait: float, on_wait: Callable[[str], object] | None) -> int:
    deadline, is_told = time.monotonic() + wait, False
    while True:
        try:
            handle = _try(path)
        except OSError as fault:
            raise _unwritable(target, fault) from fault
        if handle is not None:
            _held.add(handle)
            return handle
        if time.monotonic() >= deadline:
            raise FolderInUseError(
                f"{str(target)!r} is being written to by {_who(path)}",
                fix="wait for its end, or another folder",
            )
        if on_wait is not None and not is_told:
            on_wait(f"waiting for {_who(path)}, which writes to {str(target)!r}")
            is_told = True
        time.sleep(PAUSE)


def _try(path: Path) -> int | None:
    """The locked file, or None where somebody else has it."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, flags, 0o666)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, f"{path.name} is not a plain file")
        if _try_lock(handle) and _is_still(handle, path):
            return handle
    except BaseException:
        os.close(handle)
        raise
    os.close(handle)
    return None


def _is_still(handle: int, path: Path) -> bool:
    """Whether the file has not been removed by the one who held it before."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _try_lock(handle: int) -> bool:
    if sys.platform == "win32":
        import msvcrt

        os.lseek(handle, _LOCKED_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _write_record(handle: int, purpose: str) -> None:
    record = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "program": Path(sys.argv[0] or "python").name,
        "purpose": purpose,
        "since": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    # A record that cannot be written costs the second taker a name, and nothing else.
    with suppress(OSError):
        os.lseek(handle, 0, os.SEEK_SET)
        os.ftruncate(handle, 0)
        os.write(handle, json.dumps(record).encode()[:MAX_RECORD])


def _who(path: Path) -> str:
    """The holder in words, as far as its record can be read."""
    try:
        with path.open("rb") as file:
            record: dict[str, Any] = json.loads(file.read(MAX_RECORD))
        pid, host, program = int(record["pid"]), str(record["host"]), str(record["program"])
        purpose, since = str(record["purpose"]), str(record["since"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError, AttributeError):
        return "another process"
    where = "" if host == socket.gethostname() else f" on {host[:80]}"
    name = "this process" if pid == os.getpid() and not where else f"process {pid}{where}"
    return f"{name} ({program[:80]}: {purpose[:80]}, since {since[:40]})"


def _release(handle: int, path: Path) -> None:
    if handle not in _held:  # in a forked child, which has closed it already
        return
    _held.discard(handle)
    # Removed while locked: whoever opened it meanwhile sees that it is gone, and makes a new one. On
    # Windows an open file cannot be removed, so it goes after the lock, if nobody has taken it.
    if sys.platform != "win32":
        with suppress(OSError):
            path.unlink()
        os.close(handle)
        return
    with suppress(OSError):
        os.ftruncate(handle, 0)
    os.close(handle)
    with suppress(OSError):
        path.unlink()


def _forget_in_child() -> None:
    for handle in _held:
        with suppress(OSError):
            os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


def _unwritable(target: Path, fault: OSError) -> GemmaScopeError:
    if fault.errno in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
        return GemmaScopeError(
            f"The file system of {str(target)!r} has no locks ({fault.strerror})",
            fix="a folder on a local disk",
        )
    if fault.errno in (errno.EEXIST, errno.ENOTDIR):
        file = next((path for path in (target, *target.parents) if path.is_file()), target)
        return GemmaScopeError(f"{str(file)!r} is a file, not a folder", fix="another folder")
    return GemmaScopeError(
        f"{str(target)!r} cannot be written to: {fault.strerror or fault}",
        fix="mend the permissions, or another folder",
    )
