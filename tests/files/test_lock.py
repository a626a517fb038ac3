"""One writer per folder: others are told who it is, and the dead hold nothing."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from gemmascope_plugin.errors import GemmaScopeError
from gemmascope_plugin.files.lock import LOCK, FolderInUseError, folder_lock, holder

HOLD = """
import sys
from gemmascope_plugin.files.lock import folder_lock
with folder_lock(sys.argv[1], "a long run"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds the lock."""
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    yield child
    child.kill()
    child.communicate()


def test_a_second_process_is_refused_and_told_who_is_first(tmp_path, other) -> None:
    with (
        pytest.raises(FolderInUseError, match=f"by process {other.pid} .*: a long run, since 2"),
        folder_lock(tmp_path / "run", "another run"),
    ):
        pass
    assert f"process {other.pid} " in str(holder(tmp_path / "run"))
    other.communicate()
    assert holder(tmp_path / "run") is None
    with folder_lock(tmp_path / "run", "another run"):
        assert (tmp_path / "run" / LOCK).is_file()
    assert not (tmp_path / "run").exists(), "a folder in which nothing was written is left"


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_the_dead_hold_nothing(tmp_path, other) -> None:
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    assert (tmp_path / "run" / LOCK).is_file()
    assert holder(tmp_path / "run") is None
    with folder_lock(tmp_path / "run", "another run"):
        record = json.loads((tmp_path / "run" / LOCK).read_text())
        assert record["pid"] == os.getpid() and record["purpose"] == "another run"


def test_the_same_process_is_refused_too_in_any_thread(tmp_path) -> None:
    refused = []

    def second() -> None:
        try:
            with folder_lock(tmp_path, "second"):
                pass
        except FolderInUseError as error:
            refused.append(str(error))

    with folder_lock(tmp_path, "first"):
        second()
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert len(refused) == 2 and all("by this process (" in text for text in refused)
    second()
    assert len(refused) == 2


def test_who_waits_comes_next_and_says_for_whom(tmp_path) -> None:
    first, told, order = threading.Event(), [], []

    def hold() -> None:
        with folder_lock(tmp_path, "first"):
            first.set()
            while not told:
                time.sleep(0.01)
            order.append("first")

    thread = threading.Thread(target=hold)
    thread.start()
    first.wait()
    with folder_lock(tmp_path, "second", wait=60.0, on_wait=told.append):
        order.append("second")
    thread.join()
    assert order == ["first", "second"]
    assert len(told) == 1 and "waiting for this process" in told[0]


def test_of_many_takers_only_one_is_inside_at_a_time(tmp_path) -> None:
    inside, most = [], []

    def work() -> None:
        for _ in range(20):
            with folder_lock(tmp_path, "work", wait=60.0):
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 60


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork")
def test_a_forked_child_neither_holds_nor_releases(tmp_path) -> None:
    script = """
import os, sys
from gemmascope_plugin.files.lock import folder_lock, holder
with folder_lock(sys.argv[1], "parent"):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(reading, 1)  # outlives the lock
        os._exit(0)
    grandchild = os.fork()
    if grandchild == 0:
        sys.exit(0)  # leaves the block by an exception
    os.waitpid(grandchild, 0)
    assert holder(sys.argv[1]), "a child released it"
assert holder(sys.argv[1]) is None, "a child holds it"
os.write(writing, b"x")
os.waitpid(child, 0)
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=60)


@pytest.mark.parametrize("record", [b"", b"\xff", b"[" * 4096, b"{}", b'{"pid": "x"}', b"[1]"])
def test_a_record_that_cannot_be_read_costs_only_the_name(tmp_path, record) -> None:
    with folder_lock(tmp_path, "first"):
        (tmp_path / LOCK).write_bytes(record)
        with (
            pytest.raises(FolderInUseError, match="by another process"),
            folder_lock(tmp_path, "second"),
        ):
            pass


@pytest.mark.skipif(os.name != "posix", reason="links and pipes")
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_lock_that_is_not_a_plain_file_is_refused(tmp_path, kind) -> None:
    if kind == "link":
        (tmp_path / LOCK).symlink_to(tmp_path / "elsewhere")
    elif kind == "pipe":
        os.mkfifo(tmp_path / LOCK)
    else:
        (tmp_path / LOCK).mkdir()
    with pytest.raises(GemmaScopeError, match="cannot be written to"), folder_lock(tmp_path, "x"):
        pass
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.skipif(os.name != "posix", reason="flock")
def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch) -> None:
    import fcntl

    def none(*args) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.raises(GemmaScopeError, match="has no locks"), folder_lock(tmp_path, "x"):
        pass


def test_an_error_inside_passes_and_frees(tmp_path) -> None:
    with pytest.raises(ZeroDivisionError), folder_lock(tmp_path, "x"):
        _ = 1 // 0
    assert not list(tmp_path.iterdir())
