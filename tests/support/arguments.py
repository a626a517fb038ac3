"""Every public function as one small call: its name to its arguments on a scene.

Arguments are known by what they are called: ``model``, ``task``, ``prompt``, ``sae`` mean the same
everywhere, so a situation (ids as an array, a tensor for an index, padding in front, a wrong weight) is a
change of arguments by name, and needs no word about any function.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

import gemmascope_plugin as gs
from gemmascope_plugin.models.tokens import token_id
from tests.support.calls import Scene

Arguments = dict[str, Any]

PLACES: Arguments = {"component": "z", "layers": [1, 2], "heads": [0, 1], "positions": [8, 13]}


def _asked(s: Scene) -> Arguments:
    return {"model": s.model, "task": s.task}


def _read(s: Scene) -> Arguments:
    return {"model": s.model, "sae": s.saes["res"], "tokens": s.documents.tokens[:, :12]}


def _concepts(s: Scene) -> Arguments:
    names, marks = s.concepts
    return {"concepts": marks[:, :12], "names": names, "min_tokens": 2}


def _metric(s: Scene, wrong: bool = False) -> Arguments:
    """Answers by their ids."""
    metric = s.task.metric
    ids = {"answer": metric.answer} | ({"wrong": metric.wrong} if wrong else {})
    return _asked(s) | {
        name: [token_id(s.model, word) for word in words] for name, words in ids.items()
    }


def _effects(s: Scene) -> Any:
    return s.once("effects", lambda: gs.attribution_patching(s.model, s.task, **PLACES))


def _pruned(s: Scene) -> gs.Graph:
    return s.once("pruned", lambda: s.graph.prune())


def _feature(s: Scene) -> str:
    """A feature of the graph that a target sees."""
    frame = s.graph.edge_frame(500)
    features = set(s.graph.nodes["id"][s.graph.where("feature")])
    return next(name for name in frame["source"] if name in features)


def _edges(s: Scene) -> list[tuple[str, str]]:
    frame = s.graph.edge_frame(500)
    rows = frame[frame["source"].isin(s.graph.nodes["id"][s.graph.where("feature")])]
    return list(zip(rows["source"][:2], rows["target"][:2], strict=True))


ARGUMENTS: dict[str, Callable[[Scene], Arguments]] = {
    # causes
    "activation_patching": lambda s: {**_asked(s), **PLACES, "max_rows": 64},
    "attribution_patching": lambda s: {**_asked(s), **PLACES, "method": "ig", "steps": 1},
    "edge_attribution": lambda s: {**_asked(s), "method": "eap-ig", "steps": 1, "max_rows": 4},
    "edge_patching": lambda s: {
        **_asked(s),
        "edges": [("MLP2", "logits"), ("embed", "L1H1.q")],
        "max_rows": 32,
    },
    "path_patching": lambda s: {
        **_asked(s),
        "senders": ["L0H1"],
        "receivers": ["L2H1.q", "logits"],
        "max_rows": 32,
    },
    "direct_logit_attribution": lambda s: {"model": s.model, "prompts": s.task, "batch_size": 2},
    "accumulated_logit_diff": lambda s: {"model": s.model, "prompts": s.task, "batch_size": 2},
    "logit_lens": lambda s: {
        "model": s.model,
        "prompt": s.prompt,
        "layers": [1, 2],
        "positions": [3, 5],
        "top_k": 2,
        "tokens": [30, 40],
    },
    "verify_top": lambda s: {**_asked(s), "effects": _effects(s), "k": 2},
    "false_negative_bound": lambda s: {
        **_asked(s),
        "effects": _effects(s),
        "k": 2,
        "n_subsets": 10,
        "seed": 1,
    },
    # circuits
    "discover": lambda s: {**_asked(s), "method": "atp", "size": 5},
    "discover_levels": lambda s: {
        **_asked(s),
        "saes": [s.saes["nested"]],
        "levels": [0, 1],
        "method": "atp",
        "size": 5,
        "edges": False,
    },
    "evaluate": lambda s: {
        "circuit": s.circuit,
        **_asked(s),
        "sizes": [0, 4],
        "n_random": 1,
        "seed": 1,
    },
    "evaluate_features": lambda s: {
        "circuit": s.feature_circuit,
        **_asked(s),
        "saes": [s.saes["res"]],
        "sizes": [0, 4],
        "n_random": 1,
        "seed": 1,
    },
    "evaluate_ranking": lambda s: {"graph": s.circuit.graph, **_asked(s), "max_rows": 64},
    "stability": lambda s: {
        **_asked(s),
        "held_out": s.held_out,
        "sets": {"first": [s.saes["res"]], "second": [s.saes["res"]]},
        "n": 5,
        "sizes": [4],
        "method": "atp",
    },
    # attribution graphs
    "trace": lambda s: {
        "model": s.model,
        "prompt": s.prompt,
        "saes": s.transcoders,
        "targets": [30, 40],
        "max_feature_nodes": 8,
    },
    "intervene": lambda s: {
        "model": s.model,
        "graph": s.graph,
        "saes": s.transcoders,
        "changes": {_feature(s): 0.0},
    },
    "check_by_ablation": lambda s: {
        "model": s.model,
        "graph": _pruned(s),
        "saes": s.transcoders,
        "n_random": 1,
        "seed": 1,
    },
    "head_loadings": lambda s: {
        "model": s.model,
        "graph": s.graph,
        "saes": s.transcoders,
        "edges": _edges(s),
    },
    "qk_attribution": lambda s: {
        "model": s.model,
        "prompt": s.prompt,
        "saes": s.transcoders,
        "layer": 2,
        "head": 1,
        "query": 8,
        "key": 4,
        "pairs": False,
    },
    "contrast": lambda s: {"clean": s.graph, "corrupt": s.graph},
    "union": lambda s: {"graphs": [s.graph, s.graph]},
    "supernodes": lambda s: {"graph": _pruned(s), "saes": s.transcoders, "n": 4},
    # dictionaries on text
    "splice": lambda s: {"model": s.model, "saes": [s.saes["res"], s.saes["tc2"]]},
    "analyze": lambda s: {
        "model": s.model,
        "saes": [s.saes["res"], s.saes["att"]],
        "prompts": s.prompt,
        "top_k": 3,
    },
    "steer": lambda s: {
        "model": s.model,
        "sae": s.saes["res"],
        "feature": 3,
        "strength": 4.0,
        "prompt": s.prompt,
        "max_new_tokens": 2,
        "seed": 1,
    },
    "verify": lambda s: {"model": s.model, "sae": s.saes["res"], "prompts": s.prompt},
    "measure": lambda s: {**_read(s), "n_positions": 2, "batch_size": 3},
    "compare": lambda s: {
        "model": s.model,
        "saes": {"res": s.saes["res"]},
        "tokens": s.documents.tokens[:, :12],
        "n_positions": 2,
        "batch_size": 3,
    },
    "cost": lambda s: {**_read(s), "n_tokens": 16, "repeats": 1, "batch_size": 3},
    "adaptivity": lambda s: {**_read(s), "batch_size": 3},
    "hierarchy": lambda s: {
        **_read(s),
        "sae": s.saes["nested"],
        "n_parents": 2,
        "min_tokens": 2,
        "steps": 2,
        "seed": 1,
    },
    "concept_scores_of": lambda s: {**_read(s), **_concepts(s)},
    "probe_absorption": lambda s: {
        **_read(s),
        **_concepts(s),
        "min_probe_f1": 0.0,
        "steps": 2,
        "seed": 1,
    },
    "concept_scores": lambda s: {
        "active": torch.eye(40, 8, dtype=torch.bool).roll(1),
        "concepts": torch.eye(40, 3, dtype=torch.bool),
        "names": ["a", "b", "c"],
        "min_tokens": 1,
    },
    "plot_comparison": lambda s: {
        "frame": s.once("compared", lambda: gs.compare(**ARGUMENTS["compare"](s)))
    },
    "train": lambda s: {
        "model": s.model,
        "spec": {"d_sae": 16, "layer": 1, "steps": 2, "batch_size": 8, "context": 16, "rows": 4},
        "corpus": s.documents.tokens[:, :12],
        "progress": False,
    },
    # metrics
    "logit_diff": lambda s: _metric(s, wrong=True),
    "probability": lambda s: _metric(s),
    "cross_entropy": lambda s: _metric(s),
    "margin": lambda s: _metric(s),
    "sequence_logprob": lambda s: _metric(s) | {"answer": [" george a", " sarah the", " george"]},
    "kl_divergence": _asked,
    "custom": lambda s: {**_asked(s), "fn": lambda logits, _: logits[:, 30] - logits[:, 40]},
    # what there is
    "find": lambda s: {"model": "gemma-2-tiny", "site": "res", "layer": 1},
    "load": lambda s: {"spec": gs.tiny().specs[0]},
    "load_suite": lambda s: {"specs": gs.tiny().specs[:2]},
    "footprint": lambda s: {"model": s.model, "specs": gs.tiny().specs[:2], "n_tokens": 9},
    "tiny": lambda s: {},
}
"""Name of a public function to its arguments."""


ELSEWHERE = {
    "doctor": "tests/cli/test_doctor.py",
    "load_model": "tests/models/test_load_sources.py",
    "refresh": "tests/catalog/test_catalog_refresh.py",
    "register": "tests/loading/test_register.py",
    "bootstrap_stability": "tests/circuits/test_mib_and_stability.py",
    **dict.fromkeys(("greedy", "threshold", "top_n"), "tests/circuits/test_select.py"),
    **dict.fromkeys(("node_of", "reader_of"), "tests/causes/test_path_patching.py"),
    **dict.fromkeys(("edge_frame", "mcs_parents"), "tests/measures/test_hierarchy.py"),
    **dict.fromkeys(
        ("chance_recovery", "concept_order", "tree_recovery"),
        "tests/measures/test_forest_scores.py",
    ),
    "probe_edges": "tests/measures/test_probe.py",
    "sibling_overlap": "tests/measures/test_forest.py",
    "top_tokens": "tests/tracing/test_top_tokens.py",
}
"""Functions that neither run a model nor choose anything, or work on results, and their tests."""
METRICS = (
    *("logit_diff", "probability", "cross_entropy", "margin", "sequence_logprob"),
    *("kl_divergence", "custom"),
)


FLOORS = ("causes", "circuits", "measures", "tracing")
"""Those whose functions are public as well: ``gemmascope_plugin.measures.hierarchy``."""


def public(name: str) -> Any:
    """A public function by its name, of the package or of a floor."""
    homes = [gs, *(getattr(gs, floor) for floor in FLOORS)]
    return next(getattr(home, name) for home in homes if name in home.__all__)


def call(name: str, arguments: Arguments) -> Any:
    """What a function gives; of a splice the logits of a pass, of a metric what patching finds."""
    function = public(name)
    if name in METRICS:
        options = {n: x for n, x in arguments.items() if n not in ("model", "task")}
        task = dataclasses.replace(arguments["task"], metric=function(**options))
        return gs.activation_patching(arguments["model"], task, **PLACES)
    if name != "splice":
        return function(**arguments)
    with torch.no_grad(), function(**arguments) as spliced:
        return spliced("after anna and george came to the station")
