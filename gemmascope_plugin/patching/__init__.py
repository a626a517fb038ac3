"""Exact causes: tasks, metrics and activation patching."""

from gemmascope_plugin.patching.effects import Effects, FeatureId
from gemmascope_plugin.patching.exact import activation_patching
from gemmascope_plugin.patching.metric import logit_diff, probability
from gemmascope_plugin.patching.task import Task

__all__ = ["Effects", "FeatureId", "Task", "activation_patching", "logit_diff", "probability"]
