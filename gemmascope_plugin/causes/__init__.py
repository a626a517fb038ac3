"""Causal questions and their answers: tasks, metrics, exact and first-order effects."""

from gemmascope_plugin.causes.effects import Effects
from gemmascope_plugin.causes.exact.activation_patching import activation_patching
from gemmascope_plugin.causes.exact.direct_logits import direct_logit_attribution
from gemmascope_plugin.causes.exact.edge_patching import edge_patching
from gemmascope_plugin.causes.exact.logit_lens import accumulated_logit_diff, logit_lens
from gemmascope_plugin.causes.exact.path_patching import path_patching
from gemmascope_plugin.causes.gradient.attribution_patching import attribution_patching
from gemmascope_plugin.causes.gradient.edge_attribution import edge_attribution
from gemmascope_plugin.causes.gradient.false_negative_bound import (
    FalseNegativeBound,
    false_negative_bound,
)
from gemmascope_plugin.causes.gradient.relp import RelpRules
from gemmascope_plugin.causes.gradient.verify_top import verify_top
from gemmascope_plugin.causes.metrics import (
    cross_entropy,
    custom,
    kl_divergence,
    logit_diff,
    margin,
    probability,
)
from gemmascope_plugin.causes.names import Stream, node_of, reader_of
from gemmascope_plugin.causes.sequence import sequence_logprob
from gemmascope_plugin.causes.task import Task
from gemmascope_plugin.graphs.node import FeatureId

__all__ = [
    "Effects",
    "FeatureId",
    "FalseNegativeBound",
    "RelpRules",
    "Stream",
    "Task",
    "accumulated_logit_diff",
    "activation_patching",
    "attribution_patching",
    "cross_entropy",
    "custom",
    "direct_logit_attribution",
    "edge_attribution",
    "edge_patching",
    "kl_divergence",
    "logit_diff",
    "logit_lens",
    "margin",
    "false_negative_bound",
    "node_of",
    "path_patching",
    "probability",
    "reader_of",
    "sequence_logprob",
    "verify_top",
]
