"""Types and devices by name: one gate for both."""

from __future__ import annotations

import pytest
import torch

from gemmascope_plugin.dtypes import as_device, as_dtype, dtype_name
from gemmascope_plugin.errors import UnknownNameError
from tests.factories import unchecked


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


def test_auto_is_the_gpu_if_there_is_one() -> None:
    assert as_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), "cpu:0"])
def test_devices_are_understood(device) -> None:
    assert as_device(device).type == "cpu"


@pytest.mark.parametrize("wrong", ["cuda:77", "meta", "gpu", "cpu:x", None, 99])
def test_devices_that_are_not_here_are_refused(wrong) -> None:
    with pytest.raises(UnknownNameError, match='There is: auto, cpu.*Try: device="auto"'):
        unchecked(as_device)(wrong)
