"""Results of questions to a traced prompt: what is kept comes back exactly, and says what it is."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from gemmascope_plugin.errors import BadFileError, MissingFileError
from gemmascope_plugin.files.bundle import read_bundle, write_bundle
from gemmascope_plugin.tracing import (
    HeadLoadings,
    Intervention,
    check_by_ablation,
    head_loadings,
    intervene,
    qk_attribution,
    top_tokens,
)
from tests.tracing.prompts import dictionaries, graph, model

NAMES = ("intervention", "check", "loadings", "qk", "qk without pairs")


@cache
def result(name: str) -> Any:
    whole = graph("clean")
    saes = list(dictionaries())
    ids = whole.nodes["id"].to_numpy()
    feature = str(ids[whole.where("feature")][0])
    if name == "intervention":
        return intervene(model(), whole, saes, {feature: 0.0})
    if name == "check":
        return check_by_ablation(model(), whole.prune(), saes, n_random=1)
    if name == "loadings":
        return head_loadings(model(), whole, saes, [("token@2", ids[-1])])
    return qk_attribution(model(), whole, saes, 1, 0, 6, 2, pairs=name == "qk")


def assert_same(got: Any, expected: Any) -> None:
    if isinstance(expected, pd.DataFrame):
        pd.testing.assert_frame_equal(got, expected)
    elif isinstance(expected, np.ndarray):
        np.testing.assert_array_equal(got, expected)
        assert got.dtype == expected.dtype
    elif isinstance(expected, tuple) and expected and isinstance(expected[0], torch.Tensor):
        assert all(map(torch.equal, got, expected))
    else:
        assert got == expected


@pytest.mark.parametrize("name", NAMES)
def test_what_is_kept_comes_back(name: str, tmp_path: Path) -> None:
    first = result(name)
    path = first.save(tmp_path / "folder" / "result.safetensors")
    second = type(first).load(path)
    for field in dataclasses.fields(first):
        assert_same(getattr(second, field.name), getattr(first, field.name))
    assert repr(second) == repr(first)
    assert second._repr_html_() == first._repr_html_()


@pytest.mark.parametrize("name", NAMES)
def test_tables_and_plain_values(name: str) -> None:
    answer = result(name)
    frame = answer.to_frame()
    assert len(frame)
    plain = json.loads(json.dumps(answer.to_json(), allow_nan=False))
    assert set(plain) == {f.name for f in dataclasses.fields(answer)}
    assert "<table" in answer._repr_html_()


def test_nodes_of_a_score_with_what_they_bring() -> None:
    score = result("qk")
    frame = score.to_frame()
    assert list(frame.columns) == ["id", "label", "kind", "layer", "pos", "query", "key"]
    assert frame["key"].sum() == pytest.approx(score.score, rel=1e-4)
    assert frame["query"].sum() == pytest.approx(score.score, rel=1e-4)


def test_a_result_of_another_kind_or_none(tmp_path: Path) -> None:
    path = result("loadings").save(tmp_path / "loadings.safetensors")
    with pytest.raises(BadFileError, match="it is not a gemmascope_plugin intervention"):
        Intervention.load(path)
    with pytest.raises(MissingFileError, match="There is no head loadings at"):
        HeadLoadings.load(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        lambda content, arrays: arrays.pop("by_key"),
        lambda content, arrays: arrays.update(by_key=arrays["by_key"][:0]),
        lambda content, arrays: content["fields"].pop("tokens"),
        lambda content, arrays: content["fields"].update(edges=[1]),
        lambda content, arrays: content["fields"].update(tokens=None),
    ],
)
def test_files_that_contradict_themselves_are_refused(change: Any, tmp_path: Path) -> None:
    path = result("loadings").save(tmp_path / "loadings.safetensors")
    head = {"format": "gemmascope_plugin head loadings", "version": 1}
    record, arrays = read_bundle(path, kind="head loadings", **head)
    content = {**head, "fields": record.get("fields", dict)}
    change(content, arrays)
    write_bundle(path, content, arrays, kind="head loadings")
    with pytest.raises(BadFileError, match="loadings.safetensors"):
        HeadLoadings.load(path)


def test_words_of_features_as_a_table() -> None:
    words = top_tokens(graph("clean"), model(), list(dictionaries()), k=2)
    frame = words.to_frame()
    assert list(frame["id"]) == list(words)
    assert frame["top"].iloc[0] == ", ".join(map(repr, next(iter(words.values())).top))
    assert json.loads(json.dumps(words.to_json()))[frame["id"].iloc[0]]["bottom"]
    assert "features" in words._repr_html_()
