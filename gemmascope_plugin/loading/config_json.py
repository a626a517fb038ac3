"""Does the ``config.json`` of a Gemma Scope 2 folder describe the same dictionary as the spec?

Fields that are there are compared, fields that are not are not missed: some folders were published
without the file.

1. ``type``, ``architecture``, ``width`` (of all layers together), ``affine_connection``: equal.
2. ``model_name``: equal once ``google/``, a ``v`` before the number, ``-pt`` are left away; the
   published files spell it ``gemma-v3-...``.
3. ``hf_hook_point_in`` and ``..._out``: the same layers, written out or as ``{5,9,12,15}`` or
   ``{all}``, and the same module below the layer.
4. ``layers`` and ``gain``, which our exports write and the published files do not have: equal.
"""

from __future__ import annotations

import re
from pathlib import Path

from gemmascope_plugin.catalog import SaeSpec
from gemmascope_plugin.errors import BadFileError
from gemmascope_plugin.files.json_file import read_json

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
    """What Gemma Scope 2 reads and writes in the Hugging Face model; None where that has no name."""
    modules = MODULES.get((spec.kind, spec.site))
    if modules is None:
        return None
    stem = "model.language_model" if _NESTED.match(spec.model) else "model"
    read, write = (f"{stem}.layers.{spec.layer}.{module}" for module in modules)
    return read, write


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
    layer_text = match[1].strip("{}")
    return (
        layer_text == "all" or tuple(int(n) for n in layer_text.split(",") if n.strip()) == layers
    )
