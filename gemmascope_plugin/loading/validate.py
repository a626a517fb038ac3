"""Is what a file declares the dictionary that the spec describes?

The parameter file, from its headers, before any value is read:

1. Names: those of the format; a ``scaling_factor`` of ones may be there too.  Gemma Scope 2 writes
   ``w_enc`` and ``affine_skip_connection``; here they are ``W_enc`` and ``A``.
2. Shapes against the spec.

The ``config.json`` of a Gemma Scope 2 folder.  Fields that are there are compared, fields that are not
are not missed: some folders were published without the file.

1. ``type``, ``architecture``, ``width`` (of all layers together), ``affine_connection``: equal.
2. ``model_name``: equal once ``google/``, a ``v`` before the number, ``-pt`` are left away; the
   published files spell it ``gemma-v3-...``.
3. ``hf_hook_point_in`` and ``..._out``: the same layers, written out or as ``{5,9,12,15}`` or
   ``{all}``, and the same module below the layer.
4. ``layers`` and ``gain``, which our exports write and the published files do not have: equal.

Costs nothing beyond the headers; values are checked in ``integrity.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float

from gemmascope_plugin.catalog import SaeSpec
from gemmascope_plugin.errors import BadFileError, WidthMismatchError, shorten
from gemmascope_plugin.files.json_file import read_json
from gemmascope_plugin.loading.arrays import FLOATS, StoredArray

OPTIONAL = ("scaling_factor",)
RENAMED = {"w_enc": "W_enc", "w_dec": "W_dec", "affine_skip_connection": "A"}
"""Names in files to names here."""

Shape = tuple[int, ...]


def renamed(arrays: Mapping[str, StoredArray]) -> dict[str, StoredArray]:
    """The same arrays under the names that this package gives them."""
    return {
        RENAMED.get(name, name): replace(array, name=RENAMED.get(name, name))
        for name, array in arrays.items()
    }


def expected_shapes(spec: SaeSpec) -> dict[str, Shape]:
    """Array name to shape, as each parameter file of this spec must have them."""
    n_layers = len(spec.layers) if spec.kind in ("crosscoder", "clt") else 0
    d_sae = spec.d_sae // max(1, n_layers)
    shapes: dict[str, Shape] = {
        "W_enc": (spec.d_in, d_sae),
        "W_dec": (d_sae, n_layers, spec.d_out) if n_layers else (d_sae, spec.d_out),
        "b_enc": (d_sae,),
        "b_dec": (spec.d_out,),
        "threshold": (d_sae,),
    }
    return {**shapes, "A": (spec.d_in, spec.d_out)} if spec.affine else shapes


def check_arrays(
    path: Path,
    spec: SaeSpec,
    arrays: Mapping[str, StoredArray],
    expected: Mapping[str, Shape] | None = None,
) -> None:
    """Compares headers, under this package's names, with ``expected`` or with the spec's shapes."""
    expected = expected_shapes(spec) if expected is None else expected
    shapes = {name: array.shape for name, array in arrays.items()}
    _check_names(path, shapes, expected)
    for name in expected:
        if len(shapes[name]) != len(expected[name]):
            raise _wrong_shape(path, spec, name, shapes[name], expected[name])
    for label, actual, needed in (
        ("d_in", shapes["W_enc"][0], spec.d_in),
        ("d_out", shapes["W_dec"][-1], spec.d_out),
    ):
        if actual != needed:
            raise WidthMismatchError(
                f"{str(path)!r} has {label} {actual}, but {spec.release} {spec.sae_id} at "
                f"{spec.hook_in!r} of {spec.model} has {label} {needed}",
                fix="the file of another model or site lies here; check the folder and the spec",
            )
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise _wrong_shape(path, spec, name, shapes[name], shape)
        if arrays[name].dtype not in FLOATS:
            raise BadFileError(
                f"{name} of {str(path)!r} has type {arrays[name].dtype}, not a type of floats"
            )


def _check_names(path: Path, shapes: Mapping[str, Shape], expected: Mapping[str, Shape]) -> None:
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


def _wrong_shape(
    path: Path, spec: SaeSpec, name: str, actual: Shape, expected: Shape
) -> BadFileError:
    return BadFileError(
        f"{name} of {str(path)!r} has shape {list(actual)}, but {spec.release} {spec.sae_id} needs "
        f"{list(expected)}",
        fix="the file of another width lies here; check the folder and the spec",
    )


def drop_scaling_factor(path: Path, tensors: dict[str, Float[torch.Tensor, "*_"]]) -> None:
    """Remove a ``scaling_factor`` of ones in place; any other would change every feature."""
    factor = tensors.pop("scaling_factor", None)
    if factor is not None and not torch.allclose(factor, torch.ones_like(factor)):
        raise BadFileError(
            f"scaling_factor of {str(path)!r} is not one everywhere",
            fix="multiply the rows of W_dec by it and leave it out of the file",
        )


_NORM_IN, _NORM_OUT = "pre_feedforward_layernorm.output", "post_feedforward_layernorm.output"
MODULES = {
    ("sae", "res"): ("output", "output"),
    ("sae", "att"): ("self_attn.o_proj.input", "self_attn.o_proj.input"),
    ("sae", "mlp"): (_NORM_OUT, _NORM_OUT),
    ("transcoder", "mlp"): (_NORM_IN, _NORM_OUT),
    ("clt", "mlp"): (_NORM_IN, _NORM_OUT),
    ("crosscoder", "res"): ("output", "output"),
}
"""Kind and site to what is read and written, below ``model.layers.L`` of the Hugging Face model."""
_NESTED = re.compile(r"gemma-3-(4|12|27)b")
"""Models whose text part lies in ``language_model``."""


def hf_hooks(spec: SaeSpec) -> tuple[str, str] | None:
    """Paths of the tensors read and written in the Hugging Face model; None where there are none."""
    modules = MODULES.get((spec.kind, spec.site))
    if modules is None or spec.format != "gemma-scope-2":
        return None
    stem = "model.language_model" if _NESTED.match(spec.model) else "model"
    read, written = (f"{stem}.layers.{spec.layer}.{module}" for module in modules)
    return read, written


def check_config(path: Path, spec: SaeSpec) -> None:
    """Compares a Gemma Scope 2 ``config.json`` with a spec, field by field."""
    content = read_json(path)
    for name, value, expected in (
        ("type", content.get("type"), spec.kind),
        ("architecture", _letters(content.get("architecture")), "jumprelu"),
        ("width", content.get("width"), spec.d_sae),
        ("affine_connection", content.get("affine_connection"), spec.affine),
        ("model_name", _model(content.get("model_name")), _model(spec.model)),
        ("layers", content.get("layers"), list(spec.layers)),
        ("gain", content.get("gain"), spec.gain),
    ):
        if value is not None and value != expected:
            raise _contradiction(path, spec, name, content.get(name), expected)
    modules = MODULES.get((spec.kind, spec.site))
    for name, module in zip(("hf_hook_point_in", "hf_hook_point_out"), modules or (), strict=False):
        value = content.get(name)
        if value is None:
            continue
        if not _names(value, spec.all_layers, module):
            layers = ",".join(map(str, spec.all_layers))
            raise _contradiction(path, spec, name, value, f"model.layers.{layers}.{module}")


def _contradiction(
    path: Path, spec: SaeSpec, name: str, value: object, expected: object
) -> BadFileError:
    return BadFileError(
        f"{str(path)!r} says {name} {value!r}, but {spec.release} {spec.sae_id} has {expected!r}",
        fix="the folder of another dictionary lies here; check the folder and the spec",
    )


def _letters(text: object) -> object:
    return re.sub("[^a-z]", "", text.lower()) if isinstance(text, str) else text


def _model(name: object) -> object:
    if not isinstance(name, str):
        return name
    return name.lower().rpartition("/")[2].replace("-v3", "-3").removesuffix("-pt")


def _names(hooks: object, layers: tuple[int, ...], module: str) -> bool:
    """Whether a hook string, or a list of one per layer, means this module at these layers."""
    if isinstance(hooks, list):
        return len(hooks) == len(layers) and all(
            _names(hook, (layer,), module) for hook, layer in zip(hooks, layers, strict=True)
        )
    match = re.fullmatch(r".*?layers\.(\d+|\{[\d, ]+\}|\{all\})\.(.+)", str(hooks)[:500])
    if match is None or match[2] != module:
        return False
    named = match[1].strip("{}")
    return named == "all" or tuple(int(n) for n in named.split(",") if n.strip()) == layers
