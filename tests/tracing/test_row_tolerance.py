"""What rounding may leave of a row: what it does leave is below, and a model that is another is above."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

import gemmascope_plugin as gs
from gemmascope_plugin.errors import ModelError
from gemmascope_plugin.tracing.trace import allowed_gap
from tests.support.calls import Scene, bundled
from tests.support.real_like import PROMPT, real_like, real_like_transcoders

TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def largest_gap(graph: gs.Graph) -> float:
    """Of all rows, as a share of their absolute sum."""
    matrix, values = graph.edges.matrix, graph.nodes["activation"].to_numpy()[graph.edges.nodes]
    sums = np.asarray(matrix.sum(1, dtype=np.float64)).ravel()
    sizes = np.asarray(abs(matrix).sum(1, dtype=np.float64)).ravel()
    return float((np.abs(sums - values) / np.maximum(sizes, np.abs(values))).max())


def scene(dtype: torch.dtype, backend: str = "hooked") -> Scene:
    return bundled(backend, dtype)


@TYPES
@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_rounding_stays_below_and_not_far_below(backend: str, dtype: torch.dtype) -> None:
    suite = scene(dtype, backend)
    gap = largest_gap(gs.trace(suite.model, suite.prompt, suite.transcoders))
    allowed = allowed_gap([dtype], 4, 64)
    assert allowed / 50 < gap < allowed / 1.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_so_it_does_on_a_stream_of_norm_1e5(dtype: torch.dtype) -> None:
    graph = gs.trace(real_like("hooked", dtype), PROMPT, real_like_transcoders())
    assert largest_gap(graph) < allowed_gap([dtype], 4, 32) / 1.5


@pytest.mark.parametrize(
    ("dtype", "factor"), [(torch.float32, 1.001), (torch.bfloat16, 1.3), (torch.float16, 1.1)]
)
def test_a_layer_that_writes_something_else_is_noticed(dtype: torch.dtype, factor: float) -> None:
    """Heads of one layer that write a little more than their values say, in a hook of somebody's own."""
    suite = scene(dtype)
    model: Any = copy.deepcopy(suite.model)
    model.add_hook("blocks.1.attn.hook_z", lambda z, hook: factor * z, is_permanent=True)
    with pytest.raises(ModelError, match="the frozen model is not this one.*load_model"):
        gs.trace(model, suite.prompt, suite.transcoders)


def test_the_narrowest_type_counts() -> None:
    wide, half = allowed_gap([torch.float32], 18, 640), allowed_gap([torch.bfloat16], 18, 640)
    assert allowed_gap([torch.float64, torch.float32], 18, 640) == wide < 5e-5
    assert allowed_gap([torch.float32, torch.bfloat16], 18, 640) == half < 0.1
    assert allowed_gap([torch.bfloat16], 72, 640) == pytest.approx(2 * half)
    assert allowed_gap([torch.float64], 18, 640) < 1e-12
