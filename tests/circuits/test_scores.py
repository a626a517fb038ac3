"""Scores of a circuit in a file and as JSON: back exactly, or refused."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gemmascope_plugin.circuits import Scores, top_n
from gemmascope_plugin.errors import BadFileError, MissingFileError, TaskError
from gemmascope_plugin.files.bundle import read_bundle, write_bundle
from gemmascope_plugin.graphs import Graph
from gemmascope_plugin.graphs.node import Node
from tests.graphs.graphs import equal

GRAPH = Graph.of_nodes([Node.head(0, i) for i in range(4)], [4.0, -3.0, 2.0, 1.0], {"task": "<t>"})
SCORES = Scores(
    circuit=top_n(GRAPH, 2),
    faithfulness=0.9,
    sizes=(0, 2, 4),
    faithfulness_by_size=(0.0, 0.9, 1.0),
    random_by_size=((0.0, 0.1), (0.3, float("nan")), (1.0, 1.0)),
    metric_full=3.0,
    metric_empty=-3.0,
    by_prompt=torch.tensor([[2.0, 2.5], [3.0, 3.5], [-3.0, -2.5]]),
    minimality=(0.5, 0.001),
    metadata={"task": "<t>", "n_prompts": 2, "sizes": (1, (2, 3))},
)
FORMAT = {"kind": "file of scores", "format": "gemmascope_plugin scores", "version": 1}


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right) and left.dtype == right.dtype
    return repr(left) == repr(right)


def test_scores_in_a_file(tmp_path: Path) -> None:
    loaded = Scores.load(SCORES.save(tmp_path / "scores"))
    assert equal(loaded.circuit, SCORES.circuit)
    for part in fields(Scores):
        assert same(getattr(loaded, part.name), getattr(SCORES, part.name)), part.name
    bare = replace(SCORES, by_prompt=None, minimality=None)
    loaded = Scores.load(bare.save(tmp_path / "bare"))
    assert loaded.minimality is None
    with pytest.raises(TaskError, match="no values of single prompts"):
        loaded.interval()


def test_scores_as_json_and_html() -> None:
    content = json.loads(json.dumps(SCORES.to_json(), allow_nan=False))
    assert content["circuit"]["size"] == 2 and content["kl"] is None
    assert [row["node"] for row in content["circuit"]["kept"]] == ["L0H0", "L0H1"]
    assert content["random_by_size"] == [[0.0, 0.1], [0.3, None], [1.0, 1.0]]
    page = SCORES._repr_html_()
    assert "</table>" in page and "<t>" not in page
    frame = SCORES.errors_to_frame()
    assert frame.loc["kept", "minimal"] == 0.5


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"sizes": [0, 2, 5]}, "whole numbers from 0 to 4"),
        ({"sizes": [0, 1, 4]}, "do not have that of the circuit, 2"),
        ({"sizes": [0, 2]}, "2 sizes, 3 values and 3 random ones"),
        ({"random_by_size": [[0.0], [0.0], []]}, "numbers of random circuits differ"),
        ({"minimality": [0.5]}, "minimality is of 1 units, and 2 are kept"),
        ({"faithfulness": "high"}, "'high' is not a number"),
        ({"metadata": [1]}, "metadata are not an object"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    record, arrays = read_bundle(SCORES.save(tmp_path / "scores"), **FORMAT)
    record.content["scores"] |= change
    path = write_bundle(tmp_path / "bad", record.content, arrays, kind="scores")
    with pytest.raises(BadFileError, match=text):
        Scores.load(path)


def test_arrays_of_another_shape_are_refused(tmp_path: Path) -> None:
    record, arrays = read_bundle(SCORES.save(tmp_path / "scores"), **FORMAT)
    for name, array in {"by_prompt": np.zeros((2, 3)), "circuit": np.zeros(9)}.items():
        path = write_bundle(tmp_path / "bad", record.content, arrays | {name: array}, kind="scores")
        with pytest.raises(BadFileError):
            Scores.load(path)
    del arrays["circuit"]
    with pytest.raises(BadFileError, match="circuit"):
        Scores.load(write_bundle(tmp_path / "bad", record.content, arrays, kind="scores"))
    with pytest.raises(MissingFileError, match=r"scores.save\(path\)"):
        Scores.load(tmp_path / "absent")
