"""Threads for work whose pieces are small: each takes whole pieces, instead of all sharing every product.

A product of a chunk of targets is too small for many threads, which then wait for each other at every
step. With a chunk per thread they meet once.

PyTorch's number of threads is put back at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


@contextmanager
def workers(count: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads that share those of PyTorch among them.

    Args:
        count: How many.
    """
    before = torch.get_num_threads()
    each = max(1, before // count)
    with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(each,)) as pool:
        try:
            yield pool
        finally:
            torch.set_num_threads(before)
