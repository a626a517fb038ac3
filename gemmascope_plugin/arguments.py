"""What plain arguments mean, whatever library they come from: types, devices, indices, sizes in bytes.

1. A type is a ``torch.dtype`` or its name: ``"bfloat16"``, ``"bf16"`` and ``"torch.bfloat16"`` are one.
   Models and dictionaries are held in float64, float32, bfloat16 or float16; anything else is refused.
2. A device is a ``torch.device``, its name, or ``"auto"``: the first CUDA device if there is one,
   else the CPU.  Apple's MPS is used when it is named, not by default: TransformerLens gives other
   numbers there.  A device that this machine lacks is refused before anything is read or downloaded.
3. An index (of a feature, a token, a layer) is an int, a numpy integer, an integer tensor without axes,
   or a whole float as a row of a DataFrame makes it; several are a list, a range, a tensor, an array or
   a column.  Texts and booleans are refused: identity is a number, text is for people.
4. A size is a number of bytes, or a text with a unit: ``"8 GB"``, ``"512 MiB"``.
5. ``offline=None`` is what ``HF_HUB_OFFLINE`` says: the one rule for all that could reach the network.
"""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, SupportsIndex

from gemmascope_plugin.errors import FeatureIndexError, UnknownNameError, nearest

if TYPE_CHECKING:
    import torch

_NAMES = {
    "float64": ("double", "fp64", "f64"),
    "float32": ("float", "fp32", "f32"),
    "bfloat16": ("bf16",),
    "float16": ("half", "fp16", "f16"),
}
"""Type to its other names."""


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The floating-point type that is meant, of the four that weights have."""
    import torch

    word = str(dtype).lower().removeprefix("torch.")
    for name, others in _NAMES.items():
        if isinstance(dtype, (str, torch.dtype)) and word in (name, *others):
            return getattr(torch, name)
    raise UnknownNameError(
        f"dtype={dtype!r} is not a type for weights",
        exists=", ".join(_NAMES),
        nearest=nearest(word, _NAMES),
        fix='dtype="float32" or dtype=torch.bfloat16',
    )


def dtype_name(dtype: str | torch.dtype) -> str:
    """The name of a type as SAELens and files spell it, e.g. ``"bfloat16"``."""
    return str(as_dtype(dtype)).removeprefix("torch.")


def as_device(device: str | torch.device | int) -> torch.device:
    """The device that is meant, once it is sure to exist; a number is that of a GPU."""
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        meant = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise _no_device(device, "is not a device") from error
    if not _is_here(meant):
        raise _no_device(device, "does not exist on this machine")
    return meant


def _is_here(device: torch.device) -> bool:
    import torch

    if device.type == "cpu":
        return True
    if device.type == "cuda":
        return torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
    if device.type == "mps":
        return torch.backends.mps.is_available()
    if device.type == "meta":
        return False  # holds no numbers
    backend = getattr(torch, device.type, None)  # xpu, hpu, npu
    return backend is not None and hasattr(backend, "is_available") and backend.is_available()


def _no_device(device: object, why: str) -> UnknownNameError:
    import torch

    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    mps = ["mps"] if torch.backends.mps.is_available() else []
    return UnknownNameError(
        f"device={str(device)!r} {why}",
        exists=", ".join(["auto", "cpu", *gpus, *mps]),
        fix='device="auto", which takes a GPU if there is one',
    )


BYTES = (bytes, bytearray, memoryview)
"""What gives numbers when it is walked over, and means none."""


def as_index(value: Any) -> int | None:
    """The number, or None where it is not one."""
    if isinstance(value, (bool, str, *BYTES)) or "bool" in str(getattr(value, "dtype", "")):
        return None
    if getattr(value, "ndim", 0):
        return None
    try:
        return operator.index(value)
    except (TypeError, RuntimeError):
        pass
    is_float = isinstance(value, float) or "float" in str(getattr(value, "dtype", ""))
    return int(value) if is_float and float(value).is_integer() else None


def as_indices(values: Any) -> list[int] | None:
    """One number or several as a list, or None where any is not one."""
    single = as_index(values)
    if single is not None:
        return [single]
    is_listed = isinstance(values, Iterable) and not isinstance(values, (str, *BYTES, Mapping))
    if not is_listed or getattr(values, "ndim", 1) != 1:
        return None
    numbers = [as_index(value) for value in values]
    return None if None in numbers else [number for number in numbers if number is not None]


def feature_ids(features: Any) -> int | tuple[int, ...] | None:
    """Features of a dictionary as an int, a tuple of them, or None for all."""
    if features is None:
        return None
    single = as_index(features)
    if single is not None:
        return single
    several = as_indices(features)
    if several is None:
        raise FeatureIndexError(
            f"{_shown(features)} does not say which features are meant",
            exists="a feature is a number: features=12, features=[12, 40], features=acts.topk(5).indices",
            fix="analyze(model, saes, prompt).top() shows the numbers of active features",
        )
    return tuple(several)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"A {type(value).__name__}"


UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}


def parse_size(size: SupportsIndex | float | str | None) -> int | None:
    """Bytes of a size such as ``"8 GB"`` or ``"512MiB"``; numbers and None pass through.

    A text without a unit is refused: nobody who writes ``"4"`` means four bytes.
    """
    if size is None:
        return None
    exists = "a number of bytes, or a text with a unit: '8 GB', '512 MiB'"
    if not isinstance(size, str):
        number = None if isinstance(size, bool) else _whole(size)
        if number is None or number < 1:
            raise UnknownNameError(f"{size!r} is not a size", exists=exists)
        return number
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", size.lower())
    if match is None or match[2] not in UNITS | {"": 1} or not float(match[1]):
        raise UnknownNameError(f"{size!r} is not a size", exists=exists)
    if not match[2]:
        raise UnknownNameError(
            f"The size {size!r} has no unit", exists=exists, fix=f"'{match[1]} GB'"
        )
    number = int(float(match[1]) * UNITS[match[2]])
    if number < 1:
        raise UnknownNameError(f"{size!r} is less than one byte", exists=exists)
    return number


def _whole(size: object) -> int | None:
    """An int, numpy's integers, or a whole float such as ``4e9``."""
    try:
        return operator.index(size)  # pyright: ignore[reportArgumentType]
    except TypeError:
        return int(size) if isinstance(size, float) and size.is_integer() else None


def human_size(nbytes: int) -> str:
    """A size for people, in decimal units: ``302.1 MB``."""
    size = float(nbytes)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


_TRUE = {"1", "ON", "YES", "TRUE"}


def asked_to_stay_offline() -> bool:
    """Whether ``HF_HUB_OFFLINE`` says so now; imports nothing."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in _TRUE


def is_offline(offline: bool | None = None) -> bool:
    """Whether the network may not be used: the argument, else ``HF_HUB_OFFLINE``.

    huggingface_hub reads the variable once, when it is imported; either reading counts.
    """
    if offline is not None:
        return offline
    from huggingface_hub import constants

    return asked_to_stay_offline() or bool(constants.HF_HUB_OFFLINE)
