"""How many threads a piece of work gets: by the size of its products, not by the number of cores.

A product that is split among threads ends when the last of them has done its share. Where other processes
want the cores too, that one waits for its turn, some milliseconds, at every product: work of many small
products then takes ten times as long on two threads as on one. So every thread gets at least ``SHARE``
operations of a product, which take it about as long as such a turn.

Blocks may be nested: the most that any of them wants is in force. They may overlap in several Python
threads, each of which has a number of its own (though some products follow whoever spoke last): behind
its last block each gets back what the process had before any began.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from gemmascope_plugin.models.protocol import HookedModel

SHARE = 2.5e8
"""Floating-point operations of a product that are worth a thread."""
FEW = 20
"""Tokens whose product with a weight takes as long as reading it from memory."""


class _Threads:
    """What the running blocks want."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.running = 0
        self.before = 0
        """Threads of the process while no block runs."""
        self.mine = threading.local()

    def enter(self, flops: float) -> None:
        """Counts a block in."""
        with self.lock:
            if not self.running:
                self.before = torch.get_num_threads()
            self.running += 1
            wanted = max(1, min(self.before, int(flops / SHARE)))
            self._wanted().append(wanted)
            torch.set_num_threads(max(self._wanted()))

    def leave(self) -> None:
        """Counts the last block of this Python thread out."""
        with self.lock:
            self.running -= 1
            self._wanted().pop()
            torch.set_num_threads(max(self._wanted(), default=self.before))

    def _wanted(self) -> list[int]:
        """Of the blocks of this Python thread."""
        if not hasattr(self.mine, "wanted"):
            self.mine.wanted = []
        return self.mine.wanted


_THREADS = _Threads()


@contextmanager
def threads_for(flops: float) -> Iterator[None]:
    """As many threads as products of ``2 rows in out`` operations are worth, at most all."""
    _THREADS.enter(flops)
    try:
        yield
    finally:
        _THREADS.leave()


def threads_for_tokens(model: HookedModel, n_tokens: int) -> AbstractContextManager[None]:
    """The same for passes over so many tokens, whose largest products are those of the MLP.

    A product of few tokens takes as long as reading the weight does, about that of ``FEW`` tokens.
    """
    cfg = model.cfg
    d_mlp = int(getattr(cfg, "d_mlp", None) or 4 * cfg.d_model)
    return threads_for(2.0 * max(n_tokens, FEW) * int(cfg.d_model) * d_mlp)
