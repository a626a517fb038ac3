"""Circuits that are known exactly, for tests to parametrise over.

Each has ``name``, ``task``, ``true_edges``, ``true_nodes``, and ``make("hooked")`` or ``make("bridge")``:
a model that is made once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from gemmascope_plugin.causes import Task
from gemmascope_plugin.graphs.node import Node
from tests.ground_truth import copying, gate, induction, suppression
from tests.ground_truth.build import Edge


@dataclass(frozen=True)
class Case:
    """A hand-built model with a task and all edges that matter for it."""

    name: str
    build: Callable[[str], Any]
    """``hooked`` or ``bridge`` to a new model, which may be changed."""
    task: Task
    """Without corruption the metric is well above zero, with it as far below."""
    true_edges: frozenset[Edge]
    """All others have no effect."""

    @property
    def true_nodes(self) -> frozenset[Node]:
        """Embedding, heads and MLPs that write along a true edge; all others have no effect."""
        return frozenset(writer for writer, _ in self.true_edges)

    def make(self, backend: str) -> Any:
        """The model, made once; never change it."""
        return _made(self.name, backend)


CASES = tuple(
    Case(module.TASK.name, module.make, module.TASK, module.TRUE_EDGES)
    for module in (copying, induction, gate, suppression)
)


@lru_cache
def _made(name: str, backend: str) -> Any:
    return next(case for case in CASES if case.name == name).build(backend)
