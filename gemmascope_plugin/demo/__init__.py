"""The bundled trained suite: corpus, tasks, assets and the script that trained it."""

from gemmascope_plugin.demo.suite import TinySuite, tiny
from gemmascope_plugin.demo.tasks import TASK_NAMES, make_task

__all__ = ["TASK_NAMES", "TinySuite", "make_task", "tiny"]
