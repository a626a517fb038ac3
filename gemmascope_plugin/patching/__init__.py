"""Exact causes: tasks, metrics and activation patching."""

from gemmascope_plugin.patching.direct import accumulated_logit_diff, direct_logit_attribution
from gemmascope_plugin.patching.edge_effects import EdgeEffects
from gemmascope_plugin.patching.edge_patching import edge_patching
from gemmascope_plugin.patching.effects import Effects, FeatureId
from gemmascope_plugin.patching.exact import activation_patching
from gemmascope_plugin.patching.lens import LogitLens, logit_lens
from gemmascope_plugin.patching.metrics import (
    cross_entropy,
    custom,
    kl_divergence,
    logit_diff,
    margin,
    probability,
)
from gemmascope_plugin.patching.names import Stream, node_of, reader_of
from gemmascope_plugin.patching.node import Node, Reader
from gemmascope_plugin.patching.path_patching import path_patching
from gemmascope_plugin.patching.sequence import sequence_logprob
from gemmascope_plugin.patching.task import Task

__all__ = [
    "EdgeEffects",
    "Effects",
    "FeatureId",
    "LogitLens",
    "Node",
    "Reader",
    "Stream",
    "Task",
    "accumulated_logit_diff",
    "activation_patching",
    "cross_entropy",
    "custom",
    "direct_logit_attribution",
    "edge_patching",
    "kl_divergence",
    "logit_diff",
    "logit_lens",
    "margin",
    "node_of",
    "path_patching",
    "probability",
    "reader_of",
    "sequence_logprob",
]
