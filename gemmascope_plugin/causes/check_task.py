"""The gate for tasks."""

from __future__ import annotations

from typing import Any

from gemmascope_plugin.causes.task import Task
from gemmascope_plugin.errors import InputError
from gemmascope_plugin.models.check_model import describe, with_call


def check_task(task: Any, call: str = "") -> None:
    """Refuses what is not a task."""
    if isinstance(task, Task):
        return
    if isinstance(task, str):
        fix = f"task = gemmascope_plugin.Task.builtin({task!r}, model)"
    else:
        fix = "gemmascope_plugin.Task(clean, corrupt, logit_diff(answer, wrong))"
    raise InputError(f"{describe(task)} is not a task", fix=with_call(fix, call))


def check_tasks(tasks: Any, call: str = "") -> None:
    """The same for one task or a sequence of them, of which there may be none."""
    for task in tasks if isinstance(tasks, (list, tuple)) else [tasks]:
        check_task(task, call)
