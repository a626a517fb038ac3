"""Gemma Scope for SAELens and TransformerLens.

Public names are lazy (PEP 562): importing the package imports none of its floors and no third-party
library; the first use of a name imports the floor that holds it.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemmascope_plugin.catalog import SaeSpec, SpecList, find, refresh
    from gemmascope_plugin.causes import (
        EdgeEffects,
        Effects,
        LogitLens,
        Task,
        accumulated_logit_diff,
        activation_patching,
        attribution_patching,
        cross_entropy,
        custom,
        direct_logit_attribution,
        edge_attribution,
        edge_patching,
        kl_divergence,
        logit_diff,
        logit_lens,
        margin,
        missed_effects,
        path_patching,
        probability,
        sequence_logprob,
        verify_top,
    )
    from gemmascope_plugin.circuits import (
        FeatureScores,
        Scores,
        discover,
        discover_levels,
        evaluate,
        evaluate_features,
        evaluate_ranking,
        stability,
    )
    from gemmascope_plugin.cli.doctor import doctor
    from gemmascope_plugin.demo import tiny
    from gemmascope_plugin.errors import GemmaScopeError
    from gemmascope_plugin.features import analyze
    from gemmascope_plugin.graphs import (
        AttributionGraph,
        Circuit,
        Graph,
        Node,
        Reader,
        Supernodes,
        contrast,
        union,
    )
    from gemmascope_plugin.loading import (
        Footprint,
        SaeSuite,
        footprint,
        load,
        load_suite,
        register,
    )
    from gemmascope_plugin.measures import (
        Adaptivity,
        Cost,
        Hierarchy,
        Measures,
        adaptivity,
        compare,
        concept_scores,
        concept_scores_of,
        cost,
        hierarchy,
        measure,
        plot_comparison,
        probe_absorption,
    )
    from gemmascope_plugin.models import load_model
    from gemmascope_plugin.splice import (
        Ablate,
        Add,
        Clamp,
        Custom,
        HookedCrossLayer,
        HookedSAE,
        Project,
        Replace,
        Report,
        Scale,
        Steering,
        SteeringSweep,
        splice,
        steer,
        verify,
    )
    from gemmascope_plugin.tracing import (
        AblationCheck,
        FeatureTarget,
        Intervention,
        Logit,
        LogitDifference,
        StreamDirection,
        check_by_ablation,
        head_loadings,
        intervene,
        qk_attribution,
        supernodes,
        trace,
    )
    from gemmascope_plugin.training import TrainSpec, train

__version__: str

__all__ = [
    "Ablate",
    "AblationCheck",
    "Adaptivity",
    "Add",
    "AttributionGraph",
    "Circuit",
    "Clamp",
    "Cost",
    "Custom",
    "EdgeEffects",
    "Effects",
    "FeatureScores",
    "FeatureTarget",
    "Footprint",
    "GemmaScopeError",
    "Graph",
    "Hierarchy",
    "HookedCrossLayer",
    "HookedSAE",
    "Intervention",
    "Logit",
    "LogitDifference",
    "LogitLens",
    "Measures",
    "Node",
    "Project",
    "Reader",
    "Replace",
    "Report",
    "SaeSpec",
    "SaeSuite",
    "Scale",
    "Scores",
    "SpecList",
    "Steering",
    "SteeringSweep",
    "StreamDirection",
    "Supernodes",
    "Task",
    "TrainSpec",
    "accumulated_logit_diff",
    "activation_patching",
    "adaptivity",
    "analyze",
    "attribution_patching",
    "check_by_ablation",
    "compare",
    "concept_scores",
    "concept_scores_of",
    "contrast",
    "cost",
    "cross_entropy",
    "custom",
    "direct_logit_attribution",
    "discover",
    "discover_levels",
    "doctor",
    "edge_attribution",
    "edge_patching",
    "evaluate",
    "evaluate_features",
    "evaluate_ranking",
    "find",
    "footprint",
    "head_loadings",
    "hierarchy",
    "intervene",
    "kl_divergence",
    "load",
    "load_model",
    "load_suite",
    "logit_diff",
    "logit_lens",
    "margin",
    "measure",
    "missed_effects",
    "path_patching",
    "plot_comparison",
    "probability",
    "probe_absorption",
    "qk_attribution",
    "refresh",
    "register",
    "sequence_logprob",
    "splice",
    "stability",
    "steer",
    "supernodes",
    "tiny",
    "trace",
    "train",
    "union",
    "verify",
    "verify_top",
]

_HOMES = {
    "catalog": ("SaeSpec", "SpecList", "find", "refresh"),
    "causes": (
        *("EdgeEffects", "Effects", "LogitLens", "Task", "accumulated_logit_diff"),
        *("activation_patching", "attribution_patching", "cross_entropy", "custom"),
        *("direct_logit_attribution", "edge_attribution", "edge_patching", "kl_divergence"),
        *("logit_diff", "logit_lens", "margin", "missed_effects", "path_patching"),
        *("probability", "sequence_logprob", "verify_top"),
    ),
    "circuits": (
        *("FeatureScores", "Scores", "discover", "discover_levels", "evaluate"),
        *("evaluate_features", "evaluate_ranking", "stability"),
    ),
    "cli.doctor": ("doctor",),
    "demo": ("tiny",),
    "errors": ("GemmaScopeError",),
    "features": ("analyze",),
    "graphs": (
        *("AttributionGraph", "Circuit", "Graph", "Node", "Reader", "Supernodes"),
        *("contrast", "union"),
    ),
    "loading": ("Footprint", "SaeSuite", "footprint", "load", "load_suite", "register"),
    "measures": (
        *("Adaptivity", "Cost", "Hierarchy", "Measures", "adaptivity", "compare"),
        *("concept_scores", "concept_scores_of", "cost", "hierarchy", "measure"),
        *("plot_comparison", "probe_absorption"),
    ),
    "models": ("load_model",),
    "splice": (
        *("Ablate", "Add", "Clamp", "Custom", "Project", "Replace", "Scale"),
        *("HookedCrossLayer", "HookedSAE", "Report", "Steering", "SteeringSweep"),
        *("splice", "steer", "verify"),
    ),
    "tracing": (
        *("AblationCheck", "FeatureTarget", "Intervention", "Logit", "LogitDifference"),
        *("StreamDirection", "check_by_ablation", "head_loadings", "intervene"),
        *("qk_attribution", "supernodes", "trace"),
    ),
    "training": ("TrainSpec", "train"),
}
_HOME_OF = {name: f"{__name__}.{home}" for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        value = getattr(import_module(_HOME_OF[name]), name)
    elif name == "__version__":
        value = _version()
    else:
        raise AttributeError(_unknown(name))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, "__version__", *globals()})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(__name__)
    except PackageNotFoundError:  # used from a source tree that was never installed
        return "0.0.0+source"


def _unknown(name: str) -> str:
    from gemmascope_plugin.errors import nearest

    text = f"module {__name__!r} has no attribute {name!r}."
    close = nearest(name, __all__)
    hint = f"Did you mean {close}?" if close else f"There is: {', '.join(__all__)}."
    return f"{text} {hint}"


class _Package(ModuleType):
    """Keeps a public name from being replaced by the floor of the same name.

    Importing ``gemmascope_plugin.splice`` makes Python bind that module as the attribute
    ``splice``, where the public function belongs. ``from gemmascope_plugin.splice import ...`` is
    unaffected.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOME_OF and isinstance(value, ModuleType):
            return
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
