"""The bundled trained suite: corpus, tasks, assets and the script that trained it."""

from gemmascope_plugin.demo.tasks import TASK_NAMES, make_task
from gemmascope_plugin.demo.tiny_suite import TinySuite, tiny

__all__ = ["TASK_NAMES", "TinySuite", "make_task", "tiny"]
