"""Options of causal functions change the result, or are refused: none of them does nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

import gemmascope_plugin as gs
from gemmascope_plugin.causes.gradient.relp import RelpRules
from gemmascope_plugin.errors import GemmaScopeError
from gemmascope_plugin.graphs.node import Node, Reader
from tests.factories import unchecked
from tests.support.calls import Scene, bundled, numbers


@cache
def scene() -> Scene:
    built = bundled("hooked")
    built.n = 2
    return built


def _atp(**options: Any) -> Any:
    start = {"per_position": False, "layers": [1, 2]}
    return unchecked(gs.attribution_patching)(scene().model, scene().task, "z", **start, **options)


def _exact(**options: Any) -> Any:
    return gs.activation_patching(scene().model, scene().task, "z", **{"layers": [1], **options})


def _edges(**options: Any) -> Any:
    return gs.edge_attribution(scene().model, scene().task, **options)


def _discover(**options: Any) -> Any:
    return gs.discover(scene().model, scene().task, **options)


def _evaluate(**options: Any) -> Any:
    start = {"n_random": 1, "sizes": [0, 5]}
    return gs.evaluate(scene().model, scene().circuit, scene().held_out, **{**start, **options})


def _direct(**options: Any) -> Any:
    return gs.direct_logit_attribution(scene().model, scene().task, **options)


def _patched_edges(**options: Any) -> Any:
    start = {
        "edges": [
            (Node.mlp(2), Reader(Node.logits())),
            (Node.embed(), Reader(Node.head(1, 1), "q")),
        ]
    }
    return gs.edge_patching(scene().model, scene().task, **{**start, **options})


def _paths(**options: Any) -> Any:
    return gs.path_patching(scene().model, scene().task, ["L1H1"], ["L2H1.q"], **options)


def _lens(**options: Any) -> Any:
    return gs.logit_lens(scene().model, scene().prompt, **options)


def _trace(**options: Any) -> Any:
    graph = gs.trace(scene().model, scene().prompt, scene().transcoders, **options)
    return graph.edge_frame(10**6)


def _steer(**options: Any) -> Any:
    start = {"strength": 4.0, "max_new_tokens": 2, **options}
    return gs.steer(scene().model, scene().saes["res"], 3, prompt=scene().prompt, **start)


def _verify(**options: Any) -> Any:
    return gs.verify(scene().model, scene().saes["res"], scene().prompt, **options)


def _measure(**options: Any) -> Any:
    start = {"n_positions": 4, **options}
    return gs.measure(scene().model, scene().saes["res"], scene().documents.tokens, **start)


def _analyze(**options: Any) -> Any:
    return gs.analyze(scene().model, [scene().saes["res"]], scene().prompt, **options)


def _analyze_table(**options: Any) -> Any:
    return gs.analyze(scene().model, scene().saes["res"], scene().prompt, **options).to_frame()


CHANGES: list[tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]] = [
    (_exact, {}, {"direction": "noising"}),
    (_exact, {}, {"layers": [2]}),
    (_exact, {}, {"heads": [1]}),
    (_exact, {}, {"axes": ["layer"]}),
    (_exact, {}, {"replacement": "zero"}),
    (_atp, {}, {"method": "ig"}),
    (_atp, {}, {"direction": "noising"}),
    (_atp, {}, {"replacement": "zero"}),
    (_atp, {"method": "ig", "steps": 1}, {"steps": 3}),
    (_atp, {"method": "relp"}, {"rules": RelpRules(pattern=True)}),
    (_edges, {"method": "eap"}, {"method": "clean-corrupted"}),
    (_edges, {"method": "eap"}, {"direction": "denoising"}),
    (_edges, {"method": "eap"}, {"writer_delta": "naive"}),
    (_edges, {"method": "eap"}, {"replacement": "zero"}),
    (_edges, {"method": "eap"}, {"per_position": True}),
    (_edges, {"method": "eap-ig", "steps": 1}, {"steps": 2}),
    (_discover, {"method": "eap"}, {"size": 3}),
    (_discover, {"method": "eap"}, {"tau": 0.5}),
    (_discover, {"method": "eap"}, {"select": "greedy"}),
    (_discover, {"method": "eap"}, {"rank": "positive"}),
    (_discover, {"method": "eap"}, {"rank": "negative"}),
    (_discover, {"method": "eap"}, {"replacement": "zero"}),
    (_discover, {"method": "atp"}, {"nodes": "mlp"}),
    (_discover, {"method": "atp"}, {"rank": "negative"}),
    (_discover, {"method": "ig", "steps": 1}, {"steps": 3}),
    (_evaluate, {}, {"sizes": [0, 9]}),
    (_evaluate, {}, {"replacement": "zero"}),
    (_evaluate, {}, {"seed": 1}),
    (_evaluate, {}, {"n_random": 2}),
    (_direct, {}, {"by": "head"}),
    (_patched_edges, {}, {"direction": "denoising"}),
    (_patched_edges, {}, {"replacement": "zero"}),
    (_paths, {}, {"direction": "noising"}),
    (_lens, {}, {"layers": [1]}),
    (_lens, {}, {"positions": [2]}),
    (_lens, {}, {"top_k": 2}),
    (_trace, {"max_feature_nodes": 10}, {"targets": [30, 40]}),
    (_trace, {"max_feature_nodes": 10}, {"max_feature_nodes": 5}),
    (_steer, {}, {"strength": 8.0}),
    (_verify, {}, {"exclude": ()}),
    (_measure, {}, {"exclude": ()}),
    (_measure, {}, {"n_positions": 2}),
    (_analyze, {}, {"exclude": ()}),
    (_analyze_table, {}, {"top_k": 2}),
]
REFUSED: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (_exact, {"seed": 1}, "seed plays no part in replacement='other'"),
    (_atp, {"seed": 1}, "seed plays no part in replacement='other'"),
    (_atp, {"steps": 3}, "steps plays no part in method='atp'"),
    (_atp, {"rules": RelpRules()}, "rules plays no part in method='atp'"),
    (_edges, {"method": "eap", "steps": 3}, "steps plays no part in method='eap'"),
    (_discover, {"steps": 3}, "steps plays no part in circuits of nodes by 'exact'"),
]


def _names(case: tuple[Any, ...]) -> str:
    options = case[-1] if isinstance(case[-1], dict) else case[1]
    return f"{case[0].__name__.strip('_')} {', '.join(options)}"


def _all(result: Any) -> dict[str, torch.Tensor]:
    """All numbers of a result, and what a circuit keeps in which order."""
    values = numbers(result)
    if isinstance(result, gs.Circuit):
        values |= {"kept": result.is_kept.double(), "order": result.order.double()}
    return values


@cache
def _start(function: Callable[..., Any], options: tuple[tuple[str, Any], ...]) -> Any:
    return _all(function(**dict(options)))


@pytest.mark.parametrize("case", CHANGES, ids=_names)
def test_an_option_changes_the_result(case: tuple[Callable[..., Any], dict, dict]) -> None:
    function, options, change = case
    before = _start(function, tuple(options.items()))
    after = _all(function(**{**options, **change}))
    same = before.keys() == after.keys() and all(
        before[name].shape == after[name].shape
        and torch.allclose(before[name], after[name], atol=1e-6, equal_nan=True)
        for name in before
    )
    assert not same


@pytest.mark.parametrize("case", REFUSED, ids=_names)
def test_an_option_that_plays_no_part_is_refused(
    case: tuple[Callable[..., Any], dict, str],
) -> None:
    function, options, text = case
    with pytest.raises(GemmaScopeError, match=text):
        function(**options)
