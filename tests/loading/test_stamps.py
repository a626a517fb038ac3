"""Files are verified once, again after any change, and failures are never remembered."""

import os
import time

import numpy as np
import pytest
from npz_files import arrays, read_npz, save

from gemmascope_plugin.errors import BadFileError, GemmaScopeError
from gemmascope_plugin.files import whole
from gemmascope_plugin.loading import integrity
from gemmascope_plugin.loading.export import write_npz


@pytest.fixture
def checked(monkeypatch) -> list:
    """Grows by one entry whenever a file is really read through."""
    runs, real = [], integrity._check_values
    monkeypatch.setattr(
        integrity, "_check_values", lambda file: (runs.append(file.source), real(file))
    )
    return runs


def age(path, seconds: int = 60) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


@pytest.mark.parametrize("compress", [False, True])
def test_the_second_opening_reads_nothing_and_check_forces(tmp_path, checked, compress) -> None:
    path = save(tmp_path / "params.npz", compress=compress, **arrays())
    age(path)
    read_npz(path)
    for copy in (integrity.home() / "converted").glob("*"):
        age(copy)
        read_npz(path)
    done = len(checked)
    read_npz(path)
    assert len(checked) == done >= 1
    read_npz(path, check=True)
    assert len(checked) == done + 1


def test_a_change_of_content_time_or_place_is_seen(tmp_path, checked) -> None:
    path = save(tmp_path / "params.npz", **arrays())
    age(path)
    read_npz(path)
    age(path, 50)
    read_npz(path)
    assert len(checked) == 2
    save(tmp_path / "other.npz", **arrays())
    age(tmp_path / "other.npz", 50)
    (tmp_path / "other.npz").replace(path)  # same size, same time, another inode
    read_npz(path)
    assert len(checked) == 3
    link = tmp_path / "link.npz"
    link.symlink_to(path)
    read_npz(link)
    assert len(checked) == 3


def test_a_file_written_a_moment_ago_is_not_remembered(tmp_path, checked) -> None:
    path = save(tmp_path / "params.npz", **arrays())
    read_npz(path)
    read_npz(path)
    assert len(checked) == 2


def test_failures_are_never_remembered(tmp_path, checked, own_home) -> None:
    bad = arrays()
    bad["W_enc"][0, 0] = np.nan
    path = save(tmp_path / "params.npz", **bad)
    age(path)
    for _ in range(2):
        with pytest.raises(BadFileError, match="NaN"):
            read_npz(path)
    assert len(checked) == 2 and not (own_home / "verified").exists()


def test_a_folder_that_may_not_be_written_costs_time_only(tmp_path, checked, monkeypatch) -> None:
    path = save(tmp_path / "params.npz", **arrays())
    age(path)

    def forbidden(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(whole.os, "replace", forbidden)
    assert set(read_npz(path)) == set(read_npz(path)) == set(arrays())
    assert len(checked) == 2


def test_garbage_in_a_stamp_counts_for_nothing(tmp_path, checked, own_home) -> None:
    path = save(tmp_path / "params.npz", **arrays())
    age(path)
    read_npz(path)
    (stamp,) = (own_home / "verified").iterdir()
    stamp.write_bytes(b"\xff\xfe")
    read_npz(path)
    assert len(checked) == 2


def test_a_full_disk_while_converting_names_the_cache(tmp_path, monkeypatch, own_home) -> None:
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    path = save(tmp_path / "params.npz", compress=True, **arrays())
    monkeypatch.setattr(whole.os, "fsync", full)
    with pytest.raises(
        GemmaScopeError,
        match=f"cannot write '{own_home}/converted/.*No space left.*GEMMASCOPE_HOME",
    ):
        read_npz(path)
    assert not list((own_home / "converted").iterdir())


def test_an_older_conversion_is_deleted(tmp_path, own_home) -> None:
    path = save(tmp_path / "params.npz", compress=True, **arrays())
    read_npz(path)
    save(path, compress=True, **{**arrays(), "b_enc": np.ones(24, np.float32)})
    assert read_npz(path)["b_enc"].eq(1).all()
    assert len(list((own_home / "converted").iterdir())) == 1


def test_two_writers_at_once_leave_one_whole_file(tmp_path) -> None:
    import threading

    import torch

    path = tmp_path / "params.npz"
    values = [{"W_enc": torch.full((200, 200), float(i))} for i in (1, 2, 3, 4)]
    threads = [threading.Thread(target=write_npz, args=(path, v)) for v in values]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [f.name for f in tmp_path.iterdir()] == ["params.npz"]
    assert len(read_npz(path)["W_enc"].unique()) == 1
