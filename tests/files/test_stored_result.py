"""Results as files: every kind of field comes back as it was, and what is not such a file is refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from gemmascope_plugin.errors import BadFileError
from gemmascope_plugin.files.bundle import read_bundle, write_bundle
from gemmascope_plugin.files.stored_result import (
    ARRAY,
    TABLE,
    TENSOR,
    TENSORS,
    StoredResult,
    record_of,
)

HEAD = {"format": "gemmascope_plugin sample", "version": 1}


@dataclass(frozen=True)
class Loss:
    clean: float
    name: str


@dataclass(frozen=True, eq=False)
class Sample(StoredResult):
    noun = "sample"

    table: Any = field(metadata=TABLE)
    array: Any = field(metadata=ARRAY)
    tensor: Any = field(metadata=TENSOR)
    tensors: Any = field(metadata=TENSORS)
    loss: Any = field(metadata=record_of(Loss))
    words: Any

    def to_frame(self) -> pd.DataFrame:
        return self.table


def sample() -> Sample:
    table = pd.DataFrame(
        {
            "word": ["a", "b"],
            "pair": [("a", 1), None],
            "size": [1.5, float("nan")],
            "count": np.array([1, 2], dtype=np.int32),
            "is_right": [True, False],
            "is_sure": pd.array([True, pd.NA], dtype="boolean"),
            "place": pd.array([7, pd.NA], dtype="Int64"),
        }
    )
    tensors = (torch.ones(2, dtype=torch.float64), torch.zeros(1, 3, requires_grad=True))
    loss = Loss(float("inf"), "sum")
    words = {"a": (1, float("nan"))}
    return Sample(table, np.arange(3), torch.ones(2, dtype=torch.bfloat16), tensors, loss, words)


def test_every_kind_of_field_comes_back(tmp_path: Path) -> None:
    first = sample()
    second = Sample.load(first.save(tmp_path / "file"))
    pd.testing.assert_frame_equal(second.table, first.table)
    assert second.table["pair"].tolist() == [("a", 1), None]
    np.testing.assert_array_equal(second.array, first.array)
    assert second.tensor.dtype == torch.float32 and torch.equal(second.tensor, torch.ones(2))
    assert all(map(torch.equal, second.tensors, first.tensors)) and len(second.tensors) == 2
    assert second.loss == first.loss
    assert repr(second.words) == repr(first.words)


def test_any_field_may_be_none(tmp_path: Path) -> None:
    first = Sample(sample().table, None, None, None, None, None)
    second = Sample.load(first.save(tmp_path / "file"))
    assert (second.array, second.tensor, second.tensors, second.loss, second.words) == (None,) * 5


@pytest.mark.parametrize(
    "change",
    [
        lambda fields, arrays: arrays.pop("array"),
        lambda fields, arrays: fields.pop("words"),
        lambda fields, arrays: fields.update(table=[1]),
        lambda fields, arrays: fields["table"].update(word={"type": "nothing", "values": []}),
        lambda fields, arrays: fields.update(loss={"dirty": 1.0}),
        lambda fields, arrays: fields.update(tensor=["tensor"]),
    ],
)
def test_fields_that_contradict_the_class_are_refused(change: Any, tmp_path: Path) -> None:
    path = sample().save(tmp_path / "file")
    record, arrays = read_bundle(path, kind="sample", **HEAD)
    fields = record.get("fields", dict)
    change(fields, arrays)
    write_bundle(path, {**HEAD, "fields": fields}, arrays, kind="sample")
    with pytest.raises(BadFileError, match="file"):
        Sample.load(path)
