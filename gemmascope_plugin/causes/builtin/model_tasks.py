"""Models that bring their own prompts for the names of built-in tasks.

A floor above registers them: the bundled suite, whose 462 words make no English sentence, does so when it
is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from gemmascope_plugin.models.protocol import HookedModel


class ModelTasks(NamedTuple):
    """Prompts of one model."""

    model: str
    """Its name."""
    knows: Callable[[HookedModel], bool]
    """Whether a model is that one."""
    names: tuple[str, ...]
    """The built-in tasks that it has."""
    make: Callable[[str, int, str, int], tuple[list[str], list[str], Any]]
    """Name, number, split, seed to clean prompts, corrupted ones and metric."""


_REGISTERED: list[ModelTasks] = []


def register_tasks(tasks: ModelTasks) -> None:
    """Makes a model's own prompts known; the last of a name counts."""
    _REGISTERED[:] = [entry for entry in _REGISTERED if entry.model != tasks.model]
    _REGISTERED.append(tasks)


def tasks_of(model: HookedModel) -> ModelTasks | None:
    """The prompts that a model brings; None for all others."""
    return next((entry for entry in _REGISTERED if entry.knows(model)), None)
