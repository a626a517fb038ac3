"""Types and devices by name: one gate for both."""

from __future__ import annotations

import pytest
import torch

import gemmascope_plugin as gs
from gemmascope_plugin.arguments import as_device, as_dtype, dtype_name
from gemmascope_plugin.errors import UnknownNameError
from gemmascope_plugin.models.protocol import dtype_of
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
