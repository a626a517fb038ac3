"""Built-in causal questions for any tokenizer (``builtin_tasks.py``), and tasks from a sentence."""

from gemmascope_plugin.causes.builtin.builtin_tasks import (
    SPLITS,
    TASKS,
    ModelTasks,
    Split,
    build,
    build_from_template,
    register_tasks,
)
from gemmascope_plugin.causes.builtin.template import Fill, Template

__all__ = [
    "SPLITS",
    "TASKS",
    "Fill",
    "ModelTasks",
    "Split",
    "Template",
    "build",
    "build_from_template",
    "register_tasks",
]
