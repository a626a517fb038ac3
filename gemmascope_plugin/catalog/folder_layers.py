"""What a local folder says about the crosscoder or CLT in it, one file per layer.

1. The layers are given, or stand in ``config.json`` where this package wrote it, or in the name of the
   folder (``layer_5_9_12_15_width_...``), or are all from 0 where nothing says them.  Whether a CLT reads
   a norm's output with its gain is given or stands there too; Gemma Scope 2's do.
2. Shapes are those of the first file; the reader compares every file with them.

Reads a few kB and none of the values.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemmascope_plugin.catalog.folder import SKIP, safetensors_shapes, said, said_gain
from gemmascope_plugin.catalog.site_names import (
    GAINED_HOOK,
    Gain,
    hooks,
    multi_layer_nbytes,
    width_label,
)
from gemmascope_plugin.errors import BadFileError, MissingFileError, check_choice, shorten
from gemmascope_plugin.types import Kind, Site

_SITES: dict[str, tuple[Kind, Kind, Site]] = {
    "crosscoder": ("crosscoder", "sae", "res"),
    "clt": ("clt", "transcoder", "mlp"),
}
"""Kind, and the kind and site of a dictionary of one layer with the same hooks."""


def layers_fields(
    path: str | Path, *, model: str, kind: str, layers: Sequence[int] | None, gain: Gain | None
) -> dict[str, Any]:
    """The fields of a spec for a folder; ``SaeSpec.from_layers_folder`` documents them."""
    check_choice("kind", kind, _SITES)
    folder = Path(path).expanduser().resolve()
    files = list(folder.glob("params_layer_*.safetensors"))
    if not (folder / "params_layer_0.safetensors").is_file():
        raise MissingFileError(
            f"no file {str(folder / 'params_layer_0.safetensors')!r}",
            fix="the folder of a crosscoder or CLT, with one file per layer",
        )
    content = said(folder)
    told = _said_layers(content, folder) if layers is None else layers
    numbers = _layers(folder, len(files), told)
    d_in, block, d_out, affine = _shapes(folder / "params_layer_0.safetensors")
    known, single, site = _SITES[kind]
    hook_in, hook_out = hooks(single, site, numbers[0])
    given: Gain = "without"
    if kind == "clt":
        given = gain or said_gain(content, folder) or "with"
    if given == "with":
        hook_in = GAINED_HOOK.format(layer=numbers[0])
    d_sae, n = block * len(files), len(files)
    return {
        **{"release": "local", "sae_id": folder.as_posix(), "repo_id": folder.as_posix()},
        **{"path": ".", "model": model, "kind": known, "site": site, "format": known},
        **{"layer": numbers[0], "layers": numbers, "gain": given, "affine": affine, "l0": None},
        **{"width": width_label(d_sae), "d_in": d_in, "d_out": d_out, "d_sae": d_sae},
        **{"hook_in": hook_in, "hook_out": hook_out},
        "nbytes": multi_layer_nbytes(d_in, d_sae, n, affine=affine),
    }


def _said_layers(content: dict[str, Any], folder: Path) -> list[int] | None:
    layers = content.get("layers")
    if layers is None or (isinstance(layers, list) and all(type(n) is int for n in layers)):
        return layers
    raise BadFileError(
        f"{str(folder / 'config.json')!r} says layers {layers!r}",
        exists="a list of layers",
        fix="write the dictionary again",
    )


def _layers(folder: Path, n: int, given: Sequence[int] | None) -> tuple[int, ...]:
    named = re.match(r"layer_((?:\d+_)+)width_", folder.name)
    found = [int(word) for word in named[1].split("_")[:-1]] if named else list(range(n))
    numbers = tuple(found if given is None else given)
    if len(numbers) != n or sorted(set(numbers)) != list(numbers):
        raise BadFileError(
            f"{str(folder)!r} has {n} files, and the layers are {list(numbers)}",
            fix="layers=(...), increasing, one for each file",
        )
    return numbers


def _shapes(file: Path) -> tuple[int, int, int, bool]:
    """``d_in``, features of a layer, ``d_out``, and whether there is an affine skip."""
    shapes = safetensors_shapes(file)
    encoder, decoder = shapes.get("w_enc", ()), shapes.get("w_dec", ())
    if len(encoder) != 2 or len(decoder) != 3 or encoder[1] != decoder[0]:
        raise BadFileError(
            f"{str(file)!r} has no matching w_enc [d_in, features] and w_dec [features, layer, d_out]",
            exists=shorten(f"{name} {list(shape)}" for name, shape in shapes.items()),
        )
    return encoder[0], encoder[1], decoder[2], SKIP in shapes
