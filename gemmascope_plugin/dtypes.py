"""What a ``dtype=`` and a ``device=`` mean: the one gate for both.

1. A type is a ``torch.dtype`` or its name: ``"bfloat16"``, ``"bf16"`` and ``"torch.bfloat16"`` are one.
   Models and dictionaries are held in float64, float32, bfloat16 or float16; anything else is refused.
2. A device is a ``torch.device``, its name, or ``"auto"``: the first CUDA device if there is one,
   else the CPU.  Apple's MPS is used when it is named, not by default: TransformerLens gives other
   numbers there.  A device that this machine lacks is refused before anything is read or downloaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gemmascope_plugin.errors import UnknownNameError, nearest

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
    """The floating-point type that is meant.

    Args:
        dtype: A ``torch.dtype`` or a name: ``"float32"``, ``"bfloat16"``, ``"bf16"``, ``"torch.half"``.

    Returns:
        One of float64, float32, bfloat16 and float16.

    Raises:
        UnknownNameError: Another type, or no type.
    """
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
    """The device that is meant, once it is sure to exist.

    Args:
        device: ``"auto"``, a name such as ``"cuda:1"``, a ``torch.device``, or the number of a GPU.

    Returns:
        The device.

    Raises:
        UnknownNameError: Not a device, or one that this machine does not have.
    """
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
