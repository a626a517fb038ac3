"""What plain arguments mean: types, devices, numbers and sizes, and numbers of things in words."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

import gemmascope_plugin as gs
from gemmascope_plugin.arguments import (
    as_device,
    as_dtype,
    as_index,
    dtype_name,
    feature_ids,
    parse_size,
)
from gemmascope_plugin.errors import FeatureIndexError, UnknownNameError, number_of
from gemmascope_plugin.models.protocol import dtype_of
from tests.factories import unchecked

_FRAME = pd.DataFrame({"feature": [3, 5], "activation": [0.5, 0.25], "site": ["a", "b"]})


@pytest.mark.parametrize(
    "value",
    [
        *(3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3), torch.tensor([3, 5])[0]),
        *(_FRAME.iloc[0].feature, _FRAME[["feature", "activation"]].iloc[0].feature),
    ],
)
def test_a_number_of_any_library_is_a_feature(value: object) -> None:
    assert feature_ids(value) == 3
    assert type(feature_ids(value)) is int


@pytest.mark.parametrize(
    "values",
    [
        *([3, 5], (3, 5), range(3, 7, 2), np.array([3, 5]), torch.tensor([3, 5])),
        *(_FRAME.feature, _FRAME.feature.values, [np.int32(3), torch.tensor(5)]),
        *({3: 0, 5: 0}.keys(), torch.tensor([0.0, 0, 0, 2, 0, 1]).topk(2).indices),
    ],
)
def test_several_are_a_tuple(values: object) -> None:
    assert feature_ids(values) == (3, 5)


@pytest.mark.parametrize(
    "wrong",
    [
        "giver",
        ["giver"],
        3.5,
        True,
        [True, False],
        torch.tensor([True]),
        {"3": 1},
        [[3, 5]],
        object,
    ],
)
def test_what_is_not_a_number_is_refused_whole(wrong: object) -> None:
    with pytest.raises(FeatureIndexError, match="does not say which features.*features=12.*top"):
        feature_ids(wrong)


def test_none_and_nothing_pass() -> None:
    assert feature_ids(None) is None
    assert feature_ids([]) == ()
    assert as_index(None) is None


def test_sizes() -> None:
    sizes = (None, 5, np.int64(5), 4e9, "2 GB", "1.5MiB", "3 kb", "1 TB")
    expected = [None, 5, 5, 4 * 10**9, 2 * 10**9, 3 << 19, 3000, 10**12]
    assert [parse_size(size) for size in sizes] == expected  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("wrong", ["many", "0", 0, -1, "3 parsecs", 1.5, True, "", [4], "nan GB"])
def test_what_is_not_a_size_is_refused(wrong: object) -> None:
    with pytest.raises(UnknownNameError, match="is not a size.*'8 GB'"):
        unchecked(parse_size)(wrong)


def test_a_text_without_a_unit_is_refused() -> None:
    with pytest.raises(UnknownNameError, match=r"size '4' has no unit.*Try: '4 GB'"):
        parse_size("4")
    with pytest.raises(UnknownNameError, match="less than one byte"):
        parse_size("0.2 B")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("float32", torch.float32),
        ("torch.float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("BF16", torch.bfloat16),
        ("half", torch.float16),
        ("fp16", torch.float16),
        ("double", torch.float64),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_names_and_types_are_understood(name, dtype) -> None:
    assert as_dtype(name) is dtype
    assert as_dtype(dtype_name(name)) is dtype


@pytest.mark.parametrize("wrong", ["bfloat", "int8", "", torch.int64, 16, None])
def test_other_types_are_refused(wrong) -> None:
    with pytest.raises(UnknownNameError, match="float64, float32, bfloat16, float16"):
        unchecked(as_dtype)(wrong)


def test_the_nearest_type_is_named() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'bfloat16'"):
        as_dtype("bfloat61")


def test_types_by_name_where_dictionaries_are_loaded_and_stored(tmp_path) -> None:
    spec = gs.find(model="gemma-2-tiny", site="res", layer=1, kind="sae", variant="plain").one()
    sae = gs.load(spec, dtype="bf16", device="auto")
    assert sae.W_dec.dtype == torch.bfloat16 and sae.cfg.dtype == "bfloat16"
    suite = gs.load_suite([spec], dtype="bfloat16", memory_budget="1 GB")
    assert suite[1].W_dec.dtype == torch.bfloat16
    assert gs.footprint("2b", spec, "bfloat16") == gs.footprint("2b", spec, torch.bfloat16)
    with pytest.raises(UnknownNameError, match="is not a type for weights"):
        gs.load(spec, dtype="int8")
    with pytest.raises(UnknownNameError, match="does not exist on this machine"):
        gs.load_suite([spec], device="cuda:77")


def test_the_bundled_suite_in_bfloat16() -> None:
    suite = gs.tiny(dtype="bfloat16", backend="bridge")
    assert dtype_of(suite.model) == suite.load("res", 1).W_dec.dtype == torch.bfloat16
    with pytest.raises(UnknownNameError, match="Unknown backend 'tl'"):
        unchecked(gs.tiny)(backend="tl")


def test_auto_is_the_gpu_if_there_is_one() -> None:
    assert as_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), "cpu:0"])
def test_devices_are_understood(device) -> None:
    assert as_device(device).type == "cpu"


@pytest.mark.parametrize("wrong", ["cuda:77", "meta", "gpu", "cpu:x", None, 99])
def test_devices_that_are_not_here_are_refused(wrong) -> None:
    with pytest.raises(UnknownNameError, match='There is: auto, cpu.*Try: device="auto"'):
        unchecked(as_device)(wrong)


@pytest.mark.parametrize(
    ("n", "noun", "text"),
    [
        (1, "dictionary", "1 dictionary"),
        (2, "dictionary", "2 dictionaries"),
        (0, "held-out prompt", "0 held-out prompts"),
        (13, "bias", "13 biases"),
    ],
)
def test_a_number_of_things(n: int, noun: str, text: str) -> None:
    assert number_of(n, noun) == text
