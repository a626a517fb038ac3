"""Is what a file holds the dictionary that the spec describes?

1. Names: ``W_enc, W_dec, b_enc, b_dec, threshold``; a ``scaling_factor`` of ones may be there too.
2. Shapes against the spec, from the headers, before any value is read.
3. Values: finite, and matrices not all zero, in chunks of 16 MB.

Step 3 touches every page of the file once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float

from gemmascope_plugin.catalog import SaeSpec
from gemmascope_plugin.catalog.headers import read_headers
from gemmascope_plugin.errors import BadFileError, WidthMismatchError, shorten

CHUNK = 1 << 22
MATRICES = ("W_enc", "W_dec")
OPTIONAL = ("scaling_factor",)


def expected_shapes(spec: SaeSpec) -> dict[str, tuple[int, ...]]:
    """Array name to shape, as a file of this spec must have them."""
    return {
        "W_enc": (spec.d_in, spec.d_sae),
        "W_dec": (spec.d_sae, spec.d_out),
        "b_enc": (spec.d_sae,),
        "b_dec": (spec.d_out,),
        "threshold": (spec.d_sae,),
    }


def check_shapes(path: Path, spec: SaeSpec) -> None:
    """Compare the headers of a file with a spec.

    Args:
        path: The ``.npz`` file.
        spec: What it should be.

    Raises:
        BadFileError: Arrays are missing, unknown or have other shapes.
        WidthMismatchError: The file reads or writes tensors of another width.
    """
    shapes = {name: member.shape for name, member in read_headers(path).items()}
    expected = expected_shapes(spec)
    missing = [name for name in expected if name not in shapes]
    unknown = [name for name in shapes if name not in expected and name not in OPTIONAL]
    if missing or unknown:
        raise BadFileError(
            f"{str(path)!r} has wrong arrays: "
            + "; ".join(
                f"{word} {shorten(names)}"
                for word, names in (("missing", missing), ("unknown", unknown))
                if names
            ),
            exists=shorten(shapes),
            fix=f"a file with {shorten(expected)}",
        )
    for name in expected:
        if len(shapes[name]) != len(expected[name]):
            raise _wrong_shape(path, spec, name, shapes[name], expected[name])
    for label, given, wanted in (
        ("d_in", shapes["W_enc"][0], spec.d_in),
        ("d_out", shapes["W_dec"][1], spec.d_out),
    ):
        if given != wanted:
            raise WidthMismatchError(
                f"{str(path)!r} has {label} {given}, but {spec.release} {spec.sae_id} at "
                f"{spec.hook_in!r} of {spec.model} has {label} {wanted}",
                fix="the file of another model or site lies here; check the folder and the spec",
            )
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise _wrong_shape(path, spec, name, shapes[name], shape)


def _wrong_shape(
    path: Path, spec: SaeSpec, name: str, given: tuple[int, ...], wanted: tuple[int, ...]
) -> BadFileError:
    return BadFileError(
        f"{name} of {str(path)!r} has shape {list(given)}, but {spec.release} {spec.sae_id} needs "
        f"{list(wanted)}",
        fix="the file of another width lies here; check the folder and the spec",
    )


def check_values(path: Path, tensors: Mapping[str, Float[torch.Tensor, "*_"]]) -> None:
    """Refuse values that are not finite and matrices that are all zero.

    Args:
        path: Where the tensors come from, for the message.
        tensors: Name to tensor.

    Raises:
        BadFileError: Names the tensor and how many values are bad.
    """
    for name, tensor in tensors.items():
        bad, nonzero = _count(tensor)
        if bad:
            raise BadFileError(
                f"{name} of {str(path)!r} has {bad} of {tensor.numel()} values that are NaN or "
                "infinite",
                fix="fetch or write the file again",
            )
        if name in MATRICES and not nonzero:
            raise BadFileError(
                f"{name} of {str(path)!r} is all zero", fix="fetch or write the file again"
            )


def _count(tensor: Float[torch.Tensor, "*_"]) -> tuple[int, bool]:
    """How many values are not finite, and whether any is not zero."""
    bad, nonzero = 0, False
    flat = tensor.reshape(-1)
    for chunk in flat.split(CHUNK):
        bad += chunk.numel() - int(torch.isfinite(chunk).sum())
        nonzero = nonzero or bool(chunk.any())
    return bad, nonzero


def drop_scaling_factor(path: Path, tensors: dict[str, Float[torch.Tensor, "*_"]]) -> None:
    """Remove a ``scaling_factor`` of ones in place; any other would change every feature.

    Raises:
        BadFileError: The factor is not one everywhere.
    """
    factor = tensors.pop("scaling_factor", None)
    if factor is not None and not torch.allclose(factor, torch.ones_like(factor)):
        raise BadFileError(
            f"scaling_factor of {str(path)!r} is not one everywhere",
            fix="multiply the rows of W_dec by it and leave it out of the file",
        )
