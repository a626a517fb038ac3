"""Threads by the size of the work, put back whatever happens."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from gemmascope_plugin.models.threads import SHARE, threads_for, threads_for_tokens


@pytest.fixture
def three() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("shares", "threads"), [(0, 1), (1.5, 1), (2.5, 2), (3, 3), (1e6, 3)])
def test_a_thread_for_every_share(three, shares: float, threads: int) -> None:
    with threads_for(shares * SHARE):
        assert torch.get_num_threads() == threads
    assert torch.get_num_threads() == 3


def test_blocks_in_blocks(three) -> None:
    with pytest.raises(KeyError), threads_for(2 * SHARE):
        with threads_for(0.0):
            assert torch.get_num_threads() == 2  # the larger product counts
        assert torch.get_num_threads() == 2
        raise KeyError
    assert torch.get_num_threads() == 3


def test_blocks_that_overlap_in_threads(three) -> None:
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with threads_for(0.0):
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=other)
    with threads_for(2 * SHARE):
        thread.start()
        assert entered.wait(60)
    assert torch.get_num_threads() == 3
    leave.set()
    thread.join()
    seen = []
    with threads_for(0.0):
        seen.append(torch.get_num_threads())
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert [*seen, torch.get_num_threads()] == [1, 3, 3]


def test_by_the_size_of_a_model(three, model) -> None:
    with threads_for_tokens(model, 100):
        assert torch.get_num_threads() == 1
    with threads_for_tokens(model, 10**9):
        assert torch.get_num_threads() == 3
