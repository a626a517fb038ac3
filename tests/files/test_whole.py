"""Files and folders appear whole or not at all: a fault at any call leaves the old ones."""

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from gemmascope_plugin.errors import GemmaScopeError
from gemmascope_plugin.files import whole
from gemmascope_plugin.files.whole import recover_folder, whole_folder, write_whole

CALLS = ("open", "fdopen", "fsync", "replace")


def full(*args, **kwargs):
    raise OSError(28, "No space left on device")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def fill(path: Path, text: str) -> None:
    with whole_folder(path, "a test") as part:
        (part / "a").write_text(text)
        (part / "b").write_text(text)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_a_full_disk_names_the_path_and_leaves_the_old_file(
    tmp_path, monkeypatch, call, old
) -> None:
    target = tmp_path / "folder" / "x.bin"
    if old:
        write_whole(target, lambda file: file.write(b"old"))
    with monkeypatch.context() as patch:
        patch.setattr(whole.os, call, full)
        with pytest.raises(GemmaScopeError) as error:
            write_whole(target, lambda file: file.write(b"abc"), fix="buy a disk")
    assert str(error.value) == (
        f"cannot write {str(target)!r}: No space left on device. Try: buy a disk"
    )
    assert contents(tmp_path) == ({"folder/x.bin": b"old"} if old else {})


def test_an_error_while_writing_leaves_the_old_file(tmp_path) -> None:
    target = tmp_path / "x.bin"
    write_whole(target, lambda file: file.write(b"old"))
    with pytest.raises(ZeroDivisionError):
        write_whole(target, lambda file: file.write(b"%d" % (1 // 0)))
    assert contents(tmp_path) == {"x.bin": b"old"}


@pytest.mark.skipif(os.name != "posix", reason="umask")
def test_a_file_is_as_private_as_the_user_wants_it(tmp_path) -> None:
    before = os.umask(0o077)
    try:
        write_whole(tmp_path / "x", lambda file: file.write(b""))
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o600


def test_parallel_writers_of_a_file_leave_a_whole_one(tmp_path) -> None:
    target = tmp_path / "x"
    texts = [bytes([65 + i]) * 100_000 for i in range(6)]
    threads = [
        threading.Thread(target=write_whole, args=(target, lambda f, t=t: f.write(t)))
        for t in texts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(contents(tmp_path)) == ["x"] and target.read_bytes() in texts


def test_a_folder_replaces_an_older_one_of_its_kind_only(tmp_path) -> None:
    fill(tmp_path / "deep" / "f", "old")
    fill(tmp_path / "deep" / "f", "new")
    assert contents(tmp_path) == {"deep/f/a": b"new", "deep/f/b": b"new"}
    (tmp_path / "deep" / "f" / "thesis.tex").write_text("years of work")
    with pytest.raises(GemmaScopeError, match="other files, which would be lost: thesis.tex"):
        fill(tmp_path / "deep" / "f", "newer")
    (tmp_path / "file").write_text("")
    with pytest.raises(GemmaScopeError, match="is not a folder"):
        fill(tmp_path / "file", "new")
    assert (tmp_path / "deep" / "f" / "a").read_text() == "new"
    assert not [p for p in tmp_path.rglob(".*")]


@pytest.mark.parametrize("call", ["fsync", "replace", "mkdir"])
@pytest.mark.parametrize("nth", range(6))
@pytest.mark.parametrize("old", [False, True])
def test_a_fault_at_any_call_leaves_the_old_folder(tmp_path, monkeypatch, call, nth, old) -> None:
    target = tmp_path / "f"
    if old:
        fill(target, "old")
    before, count, real = contents(tmp_path), iter(range(100)), getattr(os, call)

    def broken(*args, **kwargs):
        return full() if next(count) == nth else real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, broken)
        try:
            fill(target, "new")
            failed = False
        except GemmaScopeError as error:
            failed = True
            assert "No space left" in str(error) and str(target) in str(error)
    assert contents(tmp_path) == (before if failed else {"f/a": b"new", "f/b": b"new"})


KILLED = """
import os, signal, sys
from pathlib import Path
from gemmascope_plugin.files.whole import whole_folder

target, call, nth = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
real = getattr(os, call)

def broken(*args, **kwargs):
    global nth
    nth -= 1
    if nth < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)

setattr(os, call, broken)
with whole_folder(target, "a test") as part:
    (part / "a").write_text("new")
    (part / "b").write_text("new")
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
@pytest.mark.parametrize(
    "call, nth",
    [("mkdir", 0), ("fsync", 0), ("fsync", 1), ("replace", 0), ("replace", 1), ("rmdir", 0)],
)
def test_a_kill_at_any_call_leaves_a_whole_folder_for_the_next(tmp_path, call, nth) -> None:
    target = tmp_path / "f"
    fill(target, "old")
    child = subprocess.run([sys.executable, "-c", KILLED, str(target), call, str(nth)], timeout=60)
    assert child.returncode == -signal.SIGKILL
    recover_folder(target)
    assert {p.read_text() for p in target.iterdir()} in ({"old"}, {"new"})
    fill(target, "newest")
    assert {p.name: p.read_text() for p in target.iterdir()} == {"a": "newest", "b": "newest"}
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_folder_that_may_not_be_written(tmp_path, monkeypatch) -> None:
    """A file stands where the folder belongs: nobody writes there, whoever runs the tests."""
    (tmp_path / "file").touch()
    nowhere = "cannot write .*(Not a directory|File exists)"
    with pytest.raises(GemmaScopeError, match=nowhere):
        fill(tmp_path / "file" / "f", "new")
    with pytest.raises(GemmaScopeError, match=nowhere):
        write_whole(tmp_path / "file" / "x", lambda file: None)

    def denied(*args: object, **kwargs: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(GemmaScopeError, match="cannot be written to: Permission denied"):
        fill(tmp_path / "f", "new")
