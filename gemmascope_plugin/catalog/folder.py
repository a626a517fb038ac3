"""What a local folder says about the dictionary in it: shapes from file headers, L0 from its name.

1. ``params.npz`` is read as Gemma Scope 1 lays it out, ``params.safetensors`` as Gemma Scope 2 does.
2. Site and kind are words of the user; whether the norm's gain is in a transcoder's input the user says,
   or ``config.json`` where this package wrote it, or it follows from the layout.
3. Crosscoders and CLTs have one file per layer.  Their layers are an argument, or stand in
   ``config.json`` where this package wrote it, or in the name of the folder
   (``layer_5_9_12_15_width_...``), or are all from 0 where nothing says them.  Shapes are those of the
   first file; the reader compares every file with them.
4. The header of a safetensors file is a length and JSON; shapes alone are taken from it.

Reads a few kB and none of the values.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from gemmascope_plugin.catalog.site_names import (
    GAINED_HOOK,
    HOOKS,
    KINDS,
    PARAMETER_FILES,
    SITE_ALIASES,
    SITES,
    Format,
    Gain,
    hooks,
    multi_layer_nbytes,
    raw_nbytes,
    width_label,
)
from gemmascope_plugin.errors import (
    BadFileError,
    MissingFileError,
    UnknownNameError,
    check_choice,
    nearest,
    shorten,
)
from gemmascope_plugin.files.json_file import read_json
from gemmascope_plugin.types import Kind, Site

MAX_HEADER = 1 << 20
"""Real headers of five tensors have a few hundred bytes."""
SKIP = "affine_skip_connection"


def folder_fields(
    path: str | Path,
    *,
    model: str,
    site: str,
    layer: int,
    kind: str,
    gain: Gain | None,
) -> dict[str, Any]:
    """The fields of a spec for a folder; `SaeSpec.from_folder` documents them."""
    spec_kind, spec_site = _kind_and_site(kind, site)
    folder = Path(path).expanduser().resolve()
    layout = _layout(folder)
    d_in, d_sae, d_out, affine = _shapes(folder, layout)
    hook_in, hook_out = hooks(spec_kind, spec_site, layer)
    by_layout: Gain = "with" if layout == "gemma-scope-2" else "without"
    folder_gain: Gain = "without"
    if spec_kind == "transcoder":
        folder_gain = gain or stated_gain(config_of(folder), folder) or by_layout
    if folder_gain == "with":
        hook_in = GAINED_HOOK.format(layer=layer)
    l0 = re.fullmatch(r"average_l0_(\d+(?:\.\d+)?)", folder.name)
    return {
        "release": "local",
        "sae_id": folder.as_posix(),
        "repo_id": folder.as_posix(),
        "path": ".",
        "model": model,
        "kind": spec_kind,
        "site": spec_site,
        "layer": layer,
        "width": width_label(d_sae),
        "d_in": d_in,
        "d_out": d_out,
        "d_sae": d_sae,
        "l0": float(l0[1]) if l0 else None,
        "hook_in": hook_in,
        "hook_out": hook_out,
        "nbytes": raw_nbytes(d_in, d_out, d_sae, affine=affine),
        "affine": affine,
        "format": layout,
        "gain": folder_gain,
    }


def config_of(folder: Path) -> dict[str, Any]:
    """What ``config.json`` says; nothing where it is not there."""
    file = folder / "config.json"
    return read_json(file) if file.is_file() else {}


def stated_gain(content: dict[str, Any], folder: Path) -> Gain | None:
    """Whether a transcoder reads the norm's output with its gain; None where nothing says it."""
    gain = content.get("gain")
    if gain not in (None, *get_args(Gain)):
        raise BadFileError(
            f"{str(folder / 'config.json')!r} says gain {gain!r}",
            exists=" or ".join(get_args(Gain)),
            fix="write the dictionary again",
        )
    return gain


def _kind_and_site(kind: str, site: str) -> tuple[Kind, Site]:
    """The kind and the site meant by two words."""
    word = site.lower()
    if word in ("transcoder", "transcoders"):
        return "transcoder", "mlp"
    if word not in SITE_ALIASES:
        raise UnknownNameError(
            f"no site {site!r}", exists=shorten(SITES), nearest=nearest(site, SITE_ALIASES)
        )
    known_site = SITE_ALIASES[word]
    for known_kind in KINDS:
        if known_kind == kind and (known_kind, known_site) in HOOKS:
            return known_kind, known_site
    several = kind in ("crosscoder", "clt")
    raise UnknownNameError(
        f"no dictionary of kind {kind!r} at site {known_site!r}",
        exists=shorten(f"{k} at {s}" for k, s in HOOKS),
        nearest=nearest(kind, {k for k, s in HOOKS if s == known_site}),
        fix=f"SaeSpec.from_layers_folder(path, model=..., kind={kind!r})" if several else None,
    )


def _layout(folder: Path) -> Format:
    layouts: tuple[Format, ...] = ("npz", "gemma-scope-2")
    for layout in layouts:
        if (folder / PARAMETER_FILES[layout]).is_file():
            return layout
    names = shorten(PARAMETER_FILES[layout] for layout in layouts)
    names_here = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    raise MissingFileError(
        f"no file {str(folder / PARAMETER_FILES['npz'])!r}",
        exists=shorten(names_here) if names_here else "nothing in this folder",
        fix=f"check the folder; it needs one of {names}",
    )


def _shapes(folder: Path, layout: Format) -> tuple[int, int, int, bool]:
    """``d_in, d_sae, d_out`` of a file, and whether it has an affine skip."""
    file = folder / PARAMETER_FILES[layout]
    if layout == "npz":
        # Here, because zipfile is a third of the catalog's import time and only this needs it.
        from gemmascope_plugin.catalog.headers import read_headers

        shapes = {name: member.shape for name, member in read_headers(file).items()}
    else:
        shapes = {
            re.sub("^w_", "W_", name): shape for name, shape in safetensors_shapes(file).items()
        }
    encoder, decoder = shapes.get("W_enc", ()), shapes.get("W_dec", ())
    if len(encoder) != 2 or len(decoder) != 2 or encoder[1] != decoder[0]:
        raise BadFileError(
            f"{str(file)!r} has no matching matrices W_enc [d_in, d_sae] and W_dec [d_sae, d_out]",
            exists=shorten(f"{name} {list(shape)}" for name, shape in shapes.items()),
        )
    return encoder[0], encoder[1], decoder[1], SKIP in shapes


def safetensors_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Name to shape, from the header."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > MAX_HEADER:
                raise ValueError(f"it claims a header of {length} bytes")
            header = json.loads(stream.read(length))
        rows = {name: row["shape"] for name, row in header.items() if name != "__metadata__"}
        if not all(type(n) is int and n >= 0 for shape in rows.values() for n in shape):
            raise ValueError("a shape is not a list of sizes")
        return {name: tuple(shape) for name, shape in rows.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as fault:
        raise BadFileError(
            f"cannot read {str(file)!r}: it is truncated or not a safetensors file ({fault})",
            fix="fetch or write the file again",
        ) from fault


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
    content = config_of(folder)
    named_layers = _stated_layers(content, folder) if layers is None else layers
    numbers = _layers(folder, len(files), named_layers)
    d_in, block, d_out, affine = _layers_shapes(folder / "params_layer_0.safetensors")
    spec_kind, single, site = _SITES[kind]
    hook_in, hook_out = hooks(single, site, numbers[0])
    folder_gain: Gain = "without"
    if kind == "clt":
        folder_gain = gain or stated_gain(content, folder) or "with"
    if folder_gain == "with":
        hook_in = GAINED_HOOK.format(layer=numbers[0])
    d_sae, n = block * len(files), len(files)
    return {
        **{"release": "local", "sae_id": folder.as_posix(), "repo_id": folder.as_posix()},
        **{"path": ".", "model": model, "kind": spec_kind, "site": site, "format": spec_kind},
        **{
            "layer": numbers[0],
            "layers": numbers,
            "gain": folder_gain,
            "affine": affine,
            "l0": None,
        },
        **{"width": width_label(d_sae), "d_in": d_in, "d_out": d_out, "d_sae": d_sae},
        **{"hook_in": hook_in, "hook_out": hook_out},
        "nbytes": multi_layer_nbytes(d_in, d_sae, n, affine=affine),
    }


def _stated_layers(content: dict[str, Any], folder: Path) -> list[int] | None:
    layers = content.get("layers")
    if layers is None or (isinstance(layers, list) and all(type(n) is int for n in layers)):
        return layers
    raise BadFileError(
        f"{str(folder / 'config.json')!r} says layers {layers!r}",
        exists="a list of layers",
        fix="write the dictionary again",
    )


def _layers(folder: Path, n: int, layers: Sequence[int] | None) -> tuple[int, ...]:
    match = re.match(r"layer_((?:\d+_)+)width_", folder.name)
    by_name = [int(word) for word in match[1].split("_")[:-1]] if match else list(range(n))
    numbers = tuple(by_name if layers is None else layers)
    if len(numbers) != n or sorted(set(numbers)) != list(numbers):
        raise BadFileError(
            f"{str(folder)!r} has {n} files, and the layers are {list(numbers)}",
            fix="layers=(...), increasing, one for each file",
        )
    return numbers


def _layers_shapes(file: Path) -> tuple[int, int, int, bool]:
    """``d_in``, features of a layer, ``d_out``, and whether there is an affine skip."""
    shapes = safetensors_shapes(file)
    encoder, decoder = shapes.get("w_enc", ()), shapes.get("w_dec", ())
    if len(encoder) != 2 or len(decoder) != 3 or encoder[1] != decoder[0]:
        raise BadFileError(
            f"{str(file)!r} has no matching w_enc [d_in, features] and w_dec [features, layer, d_out]",
            exists=shorten(f"{name} {list(shape)}" for name, shape in shapes.items()),
        )
    return encoder[0], encoder[1], decoder[2], SKIP in shapes
