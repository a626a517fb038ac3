"""Writes a dictionary as Gemma Scope's files: ``params.npz`` of the first suite, or the second's folder.

1. Gemma Scope 1: ``layer_L/width_W/average_l0_N/params.npz`` with ``W_enc, W_dec, b_enc, b_dec,
   threshold`` in float32.
2. Gemma Scope 2: ``SITE/layer_L_width_W_l0_N[_affine]/`` with ``params.safetensors`` (``w_enc, w_dec,
   b_enc, b_dec, threshold``, ``affine_skip_connection [d_in, d_out]``, the transpose of SAELens'
   ``W_skip``) and ``config.json``.
3. Crosscoders and CLTs: ``crosscoder/layer_A_B.._width_W_l0_N/`` or ``clt/width_W_l0_N[_affine]/``.
   ``params_layer_I.safetensors`` holds ``w_enc, b_enc, threshold`` and ``w_dec [features, layer, d_out]``
   of the features that read the ``I``-th layer, ``b_dec`` of what is written there, and the
   ``affine_skip_connection [d_in, d_out]`` of that layer.
4. ``config.json`` has keys that the published ones lack: ``gain``, since Gemma Scope 2 has no name for a
   norm's output without its gain, and ``layers``, since the name of a CLT's folder does not say them.

The folder of a dictionary appears whole or not at all: parameters without their ``config.json`` would be
read by another form of the norm.

What is read back with ``load(SaeSpec.from_folder(folder, ...))`` or ``from_layers_folder`` has the same
tensors, bit by bit, at the same hooks (for embeddings up to rounding: their files leave the factor
sqrt(d_model) out). Prefix sizes of Matryoshka dictionaries have no place in either layout.

Cost: one copy of the weights on disk.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from jaxtyping import Float, Shaped

import gemmascope_plugin.saes as saes
from gemmascope_plugin.catalog import SaeSpec
from gemmascope_plugin.catalog.site_names import Format, Gain, path_template, width_label
from gemmascope_plugin.errors import BadFileError, GemmaScopeError, shorten
from gemmascope_plugin.files.whole import whole_folder, write_text_whole, write_whole
from gemmascope_plugin.loading.arrays import header_bytes
from gemmascope_plugin.loading.convert import MODULES, hf_hooks
from gemmascope_plugin.saes.coder import ARCHITECTURES
from gemmascope_plugin.types import SAE, Kind, Site

if TYPE_CHECKING:
    from gemmascope_plugin.saes import CLTSAE, CrossCoderSAE
    from gemmascope_plugin.saes.cross_layer_sae import CrossLayerSAEConfig


def why_not_exported(sae: SAE, layout: Format, gain: Gain = "without") -> str | None:
    """Why a dictionary has no form in a layout; None if it has."""
    architecture = sae.cfg.architecture()
    if architecture not in ARCHITECTURES:
        return f"a {architecture!r} is not a JumpReLU dictionary"
    if sae.cfg.normalize_activations != "none" or sae.cfg.apply_b_dec_to_input:
        return "it normalises its input or subtracts b_dec from it"
    if saes.has_skip(sae) and layout == "npz":
        return "params.npz has no affine skip; layout='gemma-scope-2' has"
    if gain == "with" and layout == "npz":
        return "transcoders in params.npz read without gain; layout='gemma-scope-2' says which"
    return None


def export(
    sae: SAE,
    folder: str | Path,
    *,
    layout: Format,
    site: Site,
    layer: int,
    l0: float,
    gain: Gain = "without",
) -> Path:
    """Writes a JumpReLU dictionary in Gemma Scope's layout; returns its folder."""
    if reason := why_not_exported(sae, layout, gain):
        raise GemmaScopeError(
            f"The dictionary cannot be written in the layout {layout!r}: {reason}",
            fix="sae.save_model(folder), SAELens' own format",
        )
    weights = saes.weights_of(sae)
    tensors = {
        "W_enc": weights.W_enc,
        "W_dec": weights.W_dec,
        "b_enc": weights.b_enc,
        "b_dec": weights.b_dec,
        "threshold": weights.threshold,
    }
    label = width_label(weights.d_sae)
    if site == "embedding":
        # Files are for embeddings without the factor of hook_embed; see ``convert.py``.
        factor = math.sqrt(weights.W_enc.shape[0])
        tensors["W_enc"] = weights.W_enc * factor
        tensors |= {"W_dec": weights.W_dec / factor, "b_dec": weights.b_dec / factor}
    kind: Kind = "transcoder" if "transcoder" in sae.cfg.architecture() else "sae"
    affine = weights.W_skip is not None
    path = path_template(layout, kind, site, affine=affine)
    target = Path(folder).expanduser() / path.format(layer=layer, width=label, l0=l0)
    if weights.W_skip is not None:
        tensors["affine_skip_connection"] = weights.W_skip.T
    with whole_folder(target, "an export") as part:
        if layout == "npz":
            write_npz(part / "params.npz", tensors)
        else:
            write_params(part / "params.safetensors", tensors)
            model = str(sae.cfg.metadata.model_name)
            spec = SaeSpec.from_folder(
                part, model=model, site=site, layer=layer, kind=kind, gain=gain
            )
            write_text_whole(part / "config.json", json.dumps(_config(spec, l0), indent=1) + "\n")
    return target


def write_params(path: Path, tensors: Mapping[str, Float[torch.Tensor, "*_"]]) -> None:
    """Writes ``W_enc`` and so on under Gemma Scope 2's names, in float32."""
    lower_case = {
        name.replace("W_", "w_"): value.to("cpu", torch.float32) for name, value in tensors.items()
    }
    write_whole(path, lambda file: write_safetensors(file, lower_case))


def _config(spec: SaeSpec, l0: float) -> dict[str, Any]:
    # Gemma Scope 2 has no name for the norm's output without its gain.
    has_name = spec.kind == "sae" or spec.gain == "with"
    paths = hf_hooks(spec) if has_name else None
    hooks = {} if paths is None else {"hf_hook_point_in": paths[0], "hf_hook_point_out": paths[1]}
    return {
        **hooks,
        "width": spec.d_sae,
        "model_name": spec.model,
        "architecture": "jump_relu",
        "l0": l0,
        "affine_connection": spec.affine,
        "type": spec.kind,
        "gain": spec.gain,
    }


def export_layers(
    sae: CLTSAE | CrossCoderSAE, folder: str | Path, *, l0: float, gain: Gain = "with"
) -> Path:
    """Writes a ``CrossCoderSAE`` or ``CLTSAE`` in Gemma Scope 2's layout; returns its folder.

    ``gain`` says whether a CLT reads the norm's output with its gain, as Gemma Scope 2's do; where it
    does not, ``config.json`` names no tensors of the Hugging Face model.
    """
    cfg = sae.cfg
    layers = "_".join(map(str, cfg.layers))
    head = f"layer_{layers}_" if cfg.kind == "crosscoder" else ""
    ending = "_affine" if cfg.affine else ""
    name = f"{head}width_{width_label(cfg.d_sae)}_l0_{l0:.0f}{ending}"
    target = Path(folder).expanduser() / cfg.kind / name
    text = json.dumps(_layers_config(cfg, l0, gain), indent=1) + "\n"
    with whole_folder(target, "an export") as part:
        for i in range(cfg.n_layers):
            weights = sae.layer(i)
            tensors = {
                "W_enc": weights.W_enc,
                "b_enc": weights.b_enc,
                "threshold": weights.threshold,
                "W_dec": weights.W_dec,
                "b_dec": weights.b_dec,
            }
            if weights.A is not None:
                tensors["affine_skip_connection"] = weights.A
            write_params(part / f"params_layer_{i}.safetensors", tensors)
        write_text_whole(part / "config.json", text)
    return target


def _layers_config(cfg: CrossLayerSAEConfig, l0: float, gain: Gain) -> dict[str, Any]:
    content = {
        "width": cfg.d_sae,
        "model_name": str(cfg.metadata.model_name),
        "architecture": "jump_relu",
        "l0": l0,
        "affine_connection": cfg.affine,
        "type": cfg.kind,
        "layers": list(cfg.layers),
        "gain": gain if cfg.kind == "clt" else "without",
    }
    if cfg.kind == "crosscoder" or gain == "with":
        layers = "{" + ",".join(map(str, cfg.layers)) + "}"
        read, write = MODULES[cfg.kind, "res" if cfg.kind == "crosscoder" else "mlp"]
        content["hf_hook_point_in"] = f"model.layers.{layers}.{read}"
        content["hf_hook_point_out"] = f"model.layers.{layers}.{write}"
    return content


def write_safetensors(file: BinaryIO, tensors: Mapping[str, Shaped[torch.Tensor, "*_"]]) -> None:
    """Write tensors in their own types."""
    file.write(header_bytes({n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}))
    for tensor in tensors.values():
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        file.write(flat.view(torch.uint8).numpy().data)


def write_npz(
    path: str | Path, tensors: dict[str, Float[torch.Tensor, "*_"]], *, compress: bool = False
) -> Path:
    """Writes tensors, as float32, into an ``.npz`` file whose stored values are aligned to 64 bytes."""
    path = Path(path)
    if not tensors:
        raise BadFileError(f"no arrays to write into {str(path)!r}")
    return write_whole(path, lambda file: _write(file, tensors, compress))


def _write(
    file: BinaryIO, tensors: Mapping[str, Float[torch.Tensor, "*_"]], compress: bool
) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        for name, tensor in tensors.items():
            entry = zipfile.ZipInfo(f"{shorten([name])}.npy")
            entry.compress_type = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
            entry.extra = _padding(archive, entry.filename)
            array = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
            with archive.open(entry, "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, array, version=(1, 0), allow_pickle=False)


def _padding(archive: zipfile.ZipFile, name: str) -> bytes:
    """An extra field that makes the member begin at a multiple of 64 bytes."""
    assert archive.fp is not None
    zip64, field_header = 20, 4
    start = archive.fp.tell() + 30 + len(name) + zip64 + field_header
    pad = -start % 64
    # 0xD935 is the id that Android's zipalign uses for the same purpose.
    return (0xD935).to_bytes(2, "little") + pad.to_bytes(2, "little") + bytes(pad)
