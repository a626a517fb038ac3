"""Every public function that runs a model, as one call on a small scene, reduced to the numbers it gives.

A table for tests of what has to hold everywhere: types of numbers, weights that are not finite. A call
gives named tensors; those of one name can be compared between scenes of different models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

import gemmascope_plugin as gs
from gemmascope_plugin.demo.corpus import make_corpus
from gemmascope_plugin.demo.tiny_suite import ASSETS, MODEL_FOLDER
from gemmascope_plugin.graphs.node import FeatureId

Numbers = dict[str, torch.Tensor]


@dataclass(eq=False)
class Scene:
    """A model, dictionaries and prompts."""

    model: Any
    saes: dict[str, Any]
    """Name to dictionary: ``res``, ``att``, ``mlp``, ``nested``, and ``tc0`` and so on."""
    n: int = 3
    results: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def task(self) -> gs.Task:
        return gs.tiny().task("ioi", n=self.n)

    @cached_property
    def held_out(self) -> gs.Task:
        return gs.tiny().task("ioi", n=self.n, seed=1)

    @property
    def prompt(self) -> str:
        return str(self.task.clean[0])

    @property
    def transcoders(self) -> list[Any]:
        return [sae for name, sae in self.saes.items() if name.startswith("tc")]

    @cached_property
    def documents(self) -> Any:
        return make_corpus(6, seed=3, length=24)

    @cached_property
    def concepts(self) -> tuple[list[str], torch.Tensor]:
        names, marks = self.documents.concept_matrix()
        often = marks.flatten(0, 1).sum(0).topk(6).indices.tolist()
        return [names[i] for i in often], marks[..., often]

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """A result that several calls start from."""
        if name not in self.results:
            self.results[name] = make()
        return self.results[name]

    @property
    def graph(self) -> Any:
        return self.once("graph", lambda: gs.trace(self.model, self.prompt, self.transcoders))

    @property
    def circuit(self) -> Any:
        return self.once("circuit", lambda: gs.discover(self.model, self.task, method="atp"))

    @property
    def edge_circuit(self) -> Any:
        return self.once("edge_circuit", lambda: gs.discover(self.model, self.task, method="eap"))

    @property
    def feature_circuit(self) -> Any:
        return self.once(
            "feature_circuit",
            lambda: gs.discover(
                self.model,
                self.task,
                nodes="features",
                saes=[self.saes["res"]],
                size=20,
                method="atp",
            ),
        )


def bundled(
    backend: str, dtype: torch.dtype = torch.float32, sae_dtype: torch.dtype | None = None
) -> Scene:
    """The bundled suite with weights of a type; dictionaries are of the same unless told otherwise."""
    model = gs.load_model(ASSETS / MODEL_FOLDER, backend=backend, dtype=dtype)
    return Scene(model, dictionaries(dtype if sae_dtype is None else sae_dtype))


def dictionaries(dtype: torch.dtype) -> dict[str, Any]:
    """Those of a scene."""
    asked = {
        "res": {"site": "res", "kind": "sae", "variant": "plain", "layer": 1},
        "att": {"site": "att", "kind": "sae", "layer": 2},
        "mlp": {"site": "mlp", "kind": "sae", "layer": 1},
        "nested": {"site": "res", "variant": "matryoshka", "layer": 2},
    }
    for layer in range(4):
        asked[f"tc{layer}"] = {"site": "transcoder", "affine": layer == 2, "layer": layer}
    return {
        name: gs.load(gs.find(model="gemma-2-tiny", **criteria).one(), dtype=dtype)
        for name, criteria in asked.items()
    }


def numbers(result: Any) -> Numbers:
    """All numbers of a result: tensors, arrays, floats and frames, by the name of their field."""
    fields: Numbers = {}
    _collect("", result, fields, 0)
    return fields


def _collect(name: str, value: Any, fields: Numbers, depth: int) -> None:
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            fields[name] = value.detach().double().flatten()
    elif isinstance(value, np.ndarray):
        if value.dtype.kind == "f":
            fields[name] = torch.from_numpy(value.astype(np.float64)).flatten()
    elif isinstance(value, float):
        fields[name] = torch.tensor([value], dtype=torch.float64)
    elif hasattr(value, "select_dtypes"):
        for column in value.select_dtypes("float").columns:
            fields[f"{name}.{column}"] = torch.tensor(value[column].to_numpy(dtype=np.float64))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _collect(f"{name}.{key}", item, fields, depth + 1)
    elif isinstance(value, (list, tuple)) and depth < 6:
        for index, item in enumerate(value):
            _collect(f"{name}.{index}", item, fields, depth + 1)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type) and depth < 6:
        for part in dataclasses.fields(value):
            _collect(f"{name}.{part.name}", getattr(value, part.name), fields, depth + 1)


CALLS: dict[str, Callable[[Scene], Any]] = {}
"""Name to call."""


def _call(name: str) -> Callable[[Callable[[Scene], Any]], Callable[[Scene], Any]]:
    def add(fn: Callable[[Scene], Any]) -> Callable[[Scene], Any]:
        CALLS[name] = fn
        return fn

    return add


for _component in ("z", "resid_pre", "mlp_out", "attn_out", "pattern", "q"):
    CALLS[f"activation_patching/{_component}"] = lambda s, c=_component: gs.activation_patching(
        s.model, s.task, c, per_position=False
    )
for _replacement in ("zero", "mean", "resample"):
    CALLS[f"activation_patching/{_replacement}"] = lambda s, r=_replacement: gs.activation_patching(
        s.model, s.task, "z", per_position=False, replacement=r
    )
CALLS["activation_patching/feature"] = lambda s: gs.activation_patching(
    s.model,
    s.task,
    "feature",
    saes=s.saes["res"],
    per_position=False,
    features=_some(s.saes["res"]),
)


def _some(sae: Any) -> list[tuple[str, int]]:
    return [FeatureId(sae.cfg.metadata.hook_name, i) for i in range(0, 60, 3)]


def _line(method: str, steps: int) -> dict[str, Any]:
    """Steps, where a line is followed."""
    return {"steps": steps} if "ig" in method else {}


for _method in ("atp", "ig", "ig-inputs", "atp*", "relp"):
    CALLS[f"attribution_patching/{_method}"] = lambda s, m=_method: gs.attribution_patching(
        s.model, s.task, "z", method=m, per_position=False, **_line(m, 3)
    )
CALLS["attribution_patching/feature"] = lambda s: gs.attribution_patching(
    s.model, s.task, "feature", saes=s.saes["res"], per_position=False
)
for _method in ("eap", "eap-ig", "eap-ig-activations", "clean-corrupted"):
    CALLS[f"edge_attribution/{_method}"] = lambda s, m=_method: gs.edge_attribution(
        s.model, s.task, method=m, **_line(m, 2)
    )
    CALLS[f"discover/{_method}"] = lambda s, m=_method: (
        gs.discover(s.model, s.task, method=m, **_line(m, 2)).graph
    )
for _form in ("jacobian", "frozen", "naive"):
    CALLS[f"edge_attribution/{_form}"] = lambda s, f=_form: gs.edge_attribution(
        s.model, s.task, steps=2, writer_delta=f
    )
for _replacement in ("zero", "mean"):
    CALLS[f"edge_attribution/{_replacement}"] = lambda s, r=_replacement: gs.edge_attribution(
        s.model, s.task, method="eap", replacement=r
    )
CALLS["edge_attribution/per_position"] = lambda s: gs.edge_attribution(
    s.model, s.task, method="eap", per_position=True
)
for _method in ("exact", "atp", "ig", "atp*", "relp"):
    CALLS[f"discover/{_method}"] = lambda s, m=_method: (
        gs.discover(s.model, s.task, method=m, **_line(m, 3)).graph
    )
CALLS["discover/acdc"] = lambda s: (
    gs.discover(s.model, gs.tiny().task("ioi", n=1), method="acdc", tau=0.5).graph
)
CALLS["discover/feature nodes"] = lambda s: (
    gs.discover(s.model, s.task, nodes=("head", "feature"), saes=s.saes["res"], method="atp").graph
)
CALLS["discover/features ig"] = lambda s: (
    gs.discover(
        s.model, s.task, nodes="features", saes=[s.saes["res"], s.saes["att"]], steps=2, size=20
    ).graph
)
CALLS["discover/features atp"] = lambda s: (
    gs.discover(
        s.model,
        s.task,
        nodes=("features", "head"),
        saes=[s.saes["tc1"], s.saes["mlp"]][:1],
        size=20,
        method="atp",
    ).graph
)
CALLS["discover_levels"] = lambda s: gs.circuits.discover_levels(
    s.model, s.task, saes=[s.saes["nested"]], levels=(0, -1), method="atp", size=10, edges=False
)
CALLS["stability"] = lambda s: gs.circuits.stability(
    s.model,
    s.task,
    s.held_out,
    sets={"plain": [s.saes["res"]], "nested": [s.saes["nested"]]},
    n=10,
    sizes=(5, 10),
    method="atp",
)


@_call("edge_patching")
def _edge_patching(s: Scene) -> Any:
    edges = [(u, v) for u, v in s.edge_circuit.edges[:20]]
    return gs.edge_patching(s.model, s.task, edges=edges)


for _paths in ("direct", "mlps", "total"):
    CALLS[f"path_patching/{_paths}"] = lambda s, p=_paths: gs.path_patching(
        s.model,
        s.task,
        [gs.Node.head(0, 1), gs.Node.head(1, 0), gs.Node.mlp(0)],
        ["L2H1.q", "L2H0.v", "MLP3", "logits"],
        paths=p,
    )
CALLS["evaluate"] = lambda s: gs.evaluate(s.model, s.circuit, s.held_out, n_random=2)
CALLS["evaluate/edges"] = lambda s: gs.evaluate(s.model, s.edge_circuit, s.held_out, n_random=2)
CALLS["evaluate/minimality"] = lambda s: gs.evaluate(
    s.model, s.circuit.top(4), s.held_out, n_random=2, minimality=True
)
CALLS["evaluate_features"] = lambda s: gs.circuits.evaluate_features(
    s.model, s.feature_circuit, s.held_out, saes=[s.saes["res"]], n_random=2
)
CALLS["evaluate_ranking"] = lambda s: gs.circuits.evaluate_ranking(
    s.model, s.edge_circuit.graph, s.held_out
)
for _by in ("component", "head"):
    CALLS[f"direct_logit_attribution/{_by}"] = lambda s, b=_by: gs.direct_logit_attribution(
        s.model, s.task, by=b
    )
CALLS["direct_logit_attribution/feature"] = lambda s: gs.direct_logit_attribution(
    s.model, s.task, by="feature", saes=[s.saes["res"], s.saes["att"], s.saes["tc3"]]
)
CALLS["accumulated_logit_diff"] = lambda s: gs.causes.accumulated_logit_diff(s.model, s.task)
CALLS["logit_lens"] = lambda s: gs.logit_lens(s.model, s.prompt)
CALLS["verify_top"] = lambda s: gs.causes.verify_top(s.model, s.task, _atp(s), 4)
CALLS["false_negative_bound"] = lambda s: gs.causes.false_negative_bound(
    s.model, s.task, _atp(s), 4, n_subsets=10
)


def _atp(s: Scene) -> Any:
    return s.once("atp", lambda: gs.attribution_patching(s.model, s.task, "z", per_position=False))


CALLS["trace"] = lambda s: s.graph
CALLS["trace/all sites"] = lambda s: gs.trace(
    s.model, s.prompt, [*s.transcoders, s.saes["res"], s.saes["att"]]
)
CALLS["trace/limited"] = lambda s: gs.trace(s.model, s.prompt, s.transcoders, max_feature_nodes=20)


@_call("intervene")
def _intervene(s: Scene) -> Any:
    changed = gs.intervene(s.model, s.graph, s.transcoders, {_strong(s): 0.0})
    return changed


@_call("intervene/constrained")
def _constrained(s: Scene) -> Any:
    return gs.intervene(s.model, s.graph, s.transcoders, {_strong(s): 0.0}, constrained=True)


def _strong(s: Scene) -> str:
    graph = s.graph
    features = graph.where("feature").nonzero()[0]
    return str(graph.nodes["id"].iloc[features[graph.influence[features].argmax()]])


CALLS["check_by_ablation"] = lambda s: gs.check_by_ablation(
    s.model, s.graph.prune(), s.transcoders, n_random=1
)


@_call("head_loadings")
def _head_loadings(s: Scene) -> Any:
    frame = s.graph.edge_frame(200)
    later = frame[frame["source"].isin(s.graph.nodes["id"][s.graph.where("feature")])]
    edges = list(zip(later["source"][:5], later["target"][:5], strict=True))
    return gs.head_loadings(s.model, s.graph, s.transcoders, edges)


for _pairs in (True, False):
    CALLS[f"qk_attribution/{_pairs}"] = lambda s, p=_pairs: gs.qk_attribution(
        s.model, s.graph, s.transcoders, 2, 1, 8, 4, pairs=p, contrast=p
    )


@_call("contrast")
def _contrast(s: Scene) -> Any:
    prompts = (s.prompt, str(s.task.corrupt[0]))
    return gs.contrast(*(gs.trace(s.model, p, s.transcoders, targets=[30, 40]) for p in prompts))


CALLS["supernodes"] = lambda s: gs.supernodes(s.graph.prune(), s.transcoders)
CALLS["analyze"] = lambda s: gs.analyze(s.model, [s.saes["res"], s.saes["att"]], s.prompt)
CALLS["steer"] = lambda s: gs.steer(
    s.model, s.saes["res"], 3, [0.0, 4.0], s.prompt, max_new_tokens=3
)
CALLS["verify"] = lambda s: gs.verify(s.model, s.saes["res"], s.prompt)
CALLS["verify/transcoder"] = lambda s: gs.verify(s.model, s.saes["tc1"], s.prompt)
CALLS["measure"] = lambda s: gs.measure(s.model, s.saes["res"], s.documents.tokens, n_positions=4)
CALLS["compare"] = lambda s: gs.compare(
    s.model, {"res": s.saes["res"], "nested": s.saes["nested"]}, s.documents.tokens, n_positions=4
)
CALLS["cost"] = lambda s: gs.measures.cost(
    s.model, s.saes["res"], s.documents.tokens, n_tokens=64, repeats=1
)
CALLS["concept_scores_of"] = lambda s: gs.measures.concept_scores_of(
    s.model, s.saes["res"], s.documents.tokens, s.concepts[1], s.concepts[0]
)
CALLS["adaptivity"] = lambda s: gs.measures.adaptivity(s.model, s.saes["res"], s.documents.tokens)
CALLS["hierarchy"] = lambda s: gs.measures.hierarchy(
    s.model, s.saes["nested"], s.documents.tokens, steps=5, n_parents=5, min_tokens=5
)
CALLS["probe_absorption"] = lambda s: gs.measures.probe_absorption(
    s.model,
    s.saes["res"],
    s.documents.tokens,
    s.concepts[1],
    s.concepts[0],
    steps=5,
    min_probe_f1=0.0,
    min_tokens=2,
)
CALLS["splice"] = lambda s: _spliced(s)


def _spliced(s: Scene) -> Any:
    tokens = s.documents.tokens[:1]
    with torch.no_grad(), gs.splice(s.model, [s.saes["res"], s.saes["tc2"]]) as spliced:
        return spliced(tokens)
