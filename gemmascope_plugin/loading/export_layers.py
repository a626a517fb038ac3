"""Writes a crosscoder or CLT as Gemma Scope 2's folder: one file per layer, and ``config.json``.

1. ``crosscoder/layer_A_B.._width_W_l0_N/`` or ``clt/width_W_l0_N[_affine]/``.
2. ``params_layer_I.safetensors`` holds ``w_enc, b_enc, threshold`` and ``w_dec [features, layer, d_out]``
   of the features that read the ``I``-th layer, ``b_dec`` of what is written there, and the
   ``affine_skip_connection [d_in, d_out]`` of that layer.
3. ``config.json`` has two keys more than Gemma Scope 2's, ``layers`` and ``gain``: the name of a CLT's
   folder does not say its layers, and Gemma Scope 2 has no name for a norm's output without its gain.

What is read back with ``load(SaeSpec.from_layers_folder(folder, ...))`` has the same tensors, bit by bit,
at the same hooks.

Cost: one copy of the weights on disk.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gemmascope_plugin.catalog.site_names import Gain, width_label
from gemmascope_plugin.files.whole import whole_folder, write_text_whole
from gemmascope_plugin.loading.config_json import MODULES
from gemmascope_plugin.loading.export import write_params


def export_layers(sae: Any, folder: str | Path, *, l0: float, gain: Gain = "with") -> Path:
    """Writes a dictionary over several layers in Gemma Scope 2's layout.

    Args:
        sae: ``CrossCoderSAE`` or ``CLTSAE``.
        folder: Where the layout begins.
        l0: Its L0; the name of the folder and ``config.json`` say it.
        gain: Whether a CLT reads the norm's output with its gain, as Gemma Scope 2's do; where it does
            not, ``config.json`` names no tensors of the Hugging Face model.

    Returns:
        The folder with the parameters.

    Raises:
        GemmaScopeError: The disk is full or the folder may not be written.
    """
    cfg = sae.cfg
    layers = "_".join(map(str, cfg.layers))
    head = f"layer_{layers}_" if cfg.kind == "crosscoder" else ""
    ending = "_affine" if cfg.affine else ""
    name = f"{head}width_{width_label(cfg.d_sae)}_l0_{l0:.0f}{ending}"
    target = Path(folder).expanduser() / cfg.kind / name
    text = json.dumps(_config(cfg, l0, gain), indent=1) + "\n"
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


def _config(cfg: Any, l0: float, gain: Gain) -> dict[str, Any]:
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
        listed = "{" + ",".join(map(str, cfg.layers)) + "}"
        read, written = MODULES[cfg.kind, "res" if cfg.kind == "crosscoder" else "mlp"]
        content["hf_hook_point_in"] = f"model.layers.{listed}.{read}"
        content["hf_hook_point_out"] = f"model.layers.{listed}.{written}"
    return content
