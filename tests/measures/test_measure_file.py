"""Results of measures in a file and as JSON: back exactly, or refused."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from gemmascope_plugin.errors import BadFileError, MissingFileError
from gemmascope_plugin.measures import Cost, Measures, adaptivity, cost, hierarchy, measure
from tests import factories
from tests.measures.test_hierarchy import CONCEPTS, NAMES, RULES, TOKENS


def equal(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right) and left.dtype == right.dtype
    if isinstance(left, pd.DataFrame):
        pd.testing.assert_frame_equal(left, right)
        return True
    return repr(left) == repr(right)


@pytest.mark.parametrize("kind", ["measure", "cost", "adaptivity", "hierarchy", "bare hierarchy"])
def test_results_in_a_file(hooked2, tmp_path: Path, kind: str) -> None:
    sae = factories.residual(hooked2, 1)
    results = {
        "measure": lambda: measure(hooked2, sae, TOKENS, n_positions=1),
        "cost": lambda: cost(hooked2, sae, TOKENS, repeats=1),
        "adaptivity": lambda: adaptivity(hooked2, sae, TOKENS, CONCEPTS, NAMES),
        "hierarchy": lambda: hierarchy(
            hooked2, sae, TOKENS, CONCEPTS, NAMES, forest="mcs", n_parents=3, **RULES
        ),
        "bare hierarchy": lambda: hierarchy(
            hooked2, sae, TOKENS, forest="mcs", n_parents=0, **RULES
        ),
    }
    result = results[kind]()
    loaded = type(result).load(result.save(tmp_path / "file"))
    for field in fields(result):
        assert equal(getattr(loaded, field.name), getattr(result, field.name)), field.name
    content = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert content["exclude"] == ["bos", "eos", "pad"] and content["d_sae"] == sae.cfg.d_sae
    assert "</table>" in result._repr_html_()


def test_files_of_something_else_are_refused(hooked2, tmp_path: Path) -> None:
    path = cost(hooked2, factories.residual(hooked2, 1), TOKENS, repeats=1).save(tmp_path / "cost")
    with pytest.raises(BadFileError, match="it is not a gemmascope_plugin measures"):
        Measures.load(path)
    with pytest.raises(MissingFileError, match=r"cost.save\(path\)"):
        Cost.load(tmp_path / "absent")
