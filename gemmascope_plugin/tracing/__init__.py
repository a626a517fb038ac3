"""Attribution graphs of prompts, and what is asked of them: interventions, head loadings, QK."""

from gemmascope_plugin.tracing.ablation_check import AblationCheck, check_by_ablation
from gemmascope_plugin.tracing.graph_features import TopTokens, supernodes, top_tokens
from gemmascope_plugin.tracing.head_loadings import HeadLoadings, head_loadings
from gemmascope_plugin.tracing.intervention import Intervention, intervene
from gemmascope_plugin.tracing.linear.targets import (
    FeatureTarget,
    Logit,
    LogitDifference,
    StreamDirection,
)
from gemmascope_plugin.tracing.qk_attribution import QkAttribution, qk_attribution
from gemmascope_plugin.tracing.trace import trace

__all__ = [
    "AblationCheck",
    "FeatureTarget",
    "HeadLoadings",
    "Intervention",
    "Logit",
    "LogitDifference",
    "QkAttribution",
    "StreamDirection",
    "TopTokens",
    "check_by_ablation",
    "head_loadings",
    "intervene",
    "qk_attribution",
    "supernodes",
    "top_tokens",
    "trace",
]
