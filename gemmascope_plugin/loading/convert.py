"""From a spec and its file to a SAELens object, without a second copy: config, state dict, assembly.

1. The config: SAELens' architecture name, shapes, no input bias, no normalisation, and everything
   we know about the dictionary in ``metadata``, which survives saving and loading there.
   ``sae_lens_version`` is set, because SAELens drops all unknown metadata of older configs.
2. The state: checked against the spec, cast and moved one tensor after the other, so that a
   memory-mapped file costs no memory until used.
3. An affine skip is stored as ``A [d_in, d_out]`` with ``y += x @ A``; SAELens computes
   ``x @ W_skip.T``, so ``W_skip = A.T``.
4. Embedding dictionaries were trained on embeddings without the factor s = sqrt(d_model) that
   ``hook_embed`` carries: W_enc / s, W_dec * s, and b_dec * s (SAELens 6.54 leaves the bias out,
   which shifts every reconstruction by (s - 1) b_dec).
5. ``skeleton``: SAELens' class is built on the meta device: no memory, no random numbers.
6. ``fill``: the tensors become its parameters as they are, mapped or moved; evaluation mode; no
   parameter asks for a gradient.

``check_config`` asks whether the ``config.json`` of a Gemma Scope 2 folder describes the same
dictionary as the spec. Fields that are not there are not missed: some folders were published without
the file.

1. ``type``, ``architecture``, ``width`` (of all layers together), ``affine_connection``: equal.
2. ``model_name``: equal once ``google/``, a ``v`` before the number, ``-pt`` are left away; the
   published files spell it ``gemma-v3-...``.
3. ``hf_hook_point_in`` and ``..._out``: the same layers, written out or as ``{5,9,12,15}`` or
   ``{all}``, and the same module below the layer.
4. ``layers`` and ``gain``, which our exports write and the published files do not have: equal.

Costs about two milliseconds, whatever the size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Shaped

from gemmascope_plugin.catalog import SaeSpec
from gemmascope_plugin.errors import BadFileError, GemmaScopeError, shorten
from gemmascope_plugin.files.json_file import read_json
from gemmascope_plugin.loading.arrays import ArrayFile
from gemmascope_plugin.loading.integrity import check_file, open_checked

if TYPE_CHECKING:
    from sae_lens import SAE

ARCHITECTURES = {
    ("sae", False): "jumprelu",
    ("transcoder", False): "jumprelu_transcoder",
    ("transcoder", True): "jumprelu_skip_transcoder",
}
"""Kind and whether it has an affine skip, to SAELens' architecture."""
SINGLE_LAYER = ("npz", "gemma-scope-2")
"""Formats that become SAELens' own JumpReLU classes."""
SPEC_KEY = "gemmascope_spec"
_TRAINING = {"dataset_path": "monology/pile-uncopyrighted", "context_size": 1024}
"""What SAELens records for Gemma Scope; not true of bundled or local dictionaries."""

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


def config(spec: SaeSpec, *, device: str = "cpu", dtype: str = "float32") -> dict[str, Any]:
    """SAELens' config of a dictionary, for ``SAEConfig.from_dict``."""
    import sae_lens

    if (spec.kind, spec.affine) not in ARCHITECTURES or spec.format not in SINGLE_LAYER:
        kind = f"affine {spec.kind}" if spec.affine else spec.kind
        raise GemmaScopeError(
            f"{spec.release} {spec.sae_id} is of kind {kind!r} and format {spec.format!r}, for "
            "which SAELens has no class",
            exists=shorten(f"{k}{' with affine skip' if a else ''}" for k, a in ARCHITECTURES),
            fix=f"gemmascope_plugin.load(({spec.release!r}, {spec.sae_id!r}))",
        )
    cfg: dict[str, Any] = {
        "architecture": ARCHITECTURES[spec.kind, spec.affine],
        "d_in": spec.d_in,
        "d_sae": spec.d_sae,
        "dtype": dtype,
        "device": device,
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if spec.hook_in.endswith("hook_z") else "none",
        "metadata": {"sae_lens_version": sae_lens.__version__, **metadata(spec)},
    }
    if spec.kind == "transcoder":
        cfg["d_out"] = spec.d_out
    elif spec.levels:
        cfg |= {"architecture": "matryoshka_jumprelu", "levels": list(spec.levels)}
    return cfg


def metadata(spec: SaeSpec) -> dict[str, Any]:
    """What is known about a dictionary, as plain values, in SAELens' words where it has some."""
    facts: dict[str, Any] = {
        "sae_lens_training_version": None,
        "model_name": spec.model,
        "hook_name": spec.hook_in,
        "hook_head_index": None,
        "prepend_bos": True,
        "neuronpedia_id": spec.neuronpedia_id,
        "release": spec.release,
        "sae_id": spec.sae_id,
        "kind": spec.kind,
        "site": spec.site,
        "layer": spec.layer,
        "l0": spec.l0,
        SPEC_KEY: {**spec.to_dict(), "levels": list(spec.levels), "layers": list(spec.layers)},
    }
    if spec.levels:
        facts["levels"] = list(spec.levels)
    if spec.kind == "transcoder":
        facts |= {"hook_name_out": spec.hook_out, "hook_head_index_out": None}
    if spec.gain == "with":
        # Folding the norm into the MLP takes the gain out of the tensor that is read.
        facts["model_from_pretrained_kwargs"] = {"fold_ln": False}
    if spec.format == "gemma-scope-2" and (paths := hf_hooks(spec)):
        facts["hf_hook_name"] = paths[0]
        if spec.kind == "transcoder":
            facts["hf_hook_name_out"] = paths[1]
    return facts if spec.bundled or spec.local else facts | _TRAINING


def open_single(spec: SaeSpec, files: Mapping[str, Path], *, check: bool = False) -> ArrayFile:
    """The parameter file of a single-layer dictionary, checked against the spec, ready to be mapped."""
    config_file = spec.config_filename
    if config_file is not None and config_file in files:
        check_config(files[config_file], spec)
    file = open_checked(files[spec.filename], spec)
    check_file(file, force=check)
    return file


def state(
    spec: SaeSpec,
    files: Mapping[str, Path],
    *,
    device: str | torch.device,
    dtype: torch.dtype,
    check: bool = False,
) -> dict[str, Float[torch.Tensor, "*_"]]:
    """The parameters of a single-layer dictionary, checked; float32 on the CPU shares the file's map."""
    file = open_single(spec, files, check=check)
    tensors = file.tensors()
    _drop_scaling_factor(file.source, tensors)
    if spec.site == "embedding":
        _scale_embedding(tensors, math.sqrt(spec.d_in))
    if "A" in tensors:
        tensors["W_skip"] = tensors.pop("A").T
    for name in list(tensors):
        tensors[name] = tensors.pop(name).to(device=device, dtype=dtype)
    return tensors


def _drop_scaling_factor(path: Path, tensors: dict[str, Float[torch.Tensor, "*_"]]) -> None:
    """Remove a ``scaling_factor`` of ones in place; any other would change every feature."""
    factor = tensors.pop("scaling_factor", None)
    if factor is not None and not torch.allclose(factor, torch.ones_like(factor)):
        raise BadFileError(
            f"scaling_factor of {str(path)!r} is not one everywhere",
            fix="multiply the rows of W_dec by it and leave it out of the file",
        )


def _scale_embedding(tensors: dict[str, Float[torch.Tensor, "*_"]], scale: float) -> None:
    tensors["W_enc"] = tensors["W_enc"] / scale
    tensors["W_dec"] = tensors["W_dec"] * scale
    tensors["b_dec"] = tensors["b_dec"] * scale


def skeleton(cfg: Mapping[str, Any]) -> SAE[Any]:
    """SAELens' object for a config, its parameters on the meta device."""
    from sae_lens import SAE

    from gemmascope_plugin.saes import register_all

    register_all()
    metadata = dict(cfg.get("metadata") or {})
    # SAELens warns about this at construction, also when the model is loaded as it asks.
    kwargs = metadata.pop("model_from_pretrained_kwargs", None)
    try:
        sae_class: Any = SAE.get_sae_class_for_architecture(cfg["architecture"])
        config_class = sae_class.get_sae_config_class_for_architecture(cfg["architecture"])
        sae = sae_class(config_class.from_dict({**cfg, "device": "meta", "metadata": metadata}))
        if kwargs:
            sae.cfg.metadata.model_from_pretrained_kwargs = kwargs
        return sae
    except (KeyError, TypeError, ValueError) as fault:
        raise BadFileError(
            f"SAELens refuses the config of a {cfg.get('architecture')!r}: {fault}"
        ) from fault


def fill(
    sae: SAE[Any],
    tensors: Mapping[str, Shaped[torch.Tensor, "*_"]],
    *,
    device: str | torch.device,
    dtype: torch.dtype,
) -> SAE[Any]:
    """Give a skeleton its parameters and freeze it."""
    from sae_lens.util import dtype_to_str

    sae.load_state_dict(dict(tensors), assign=True)
    # What SAELens' ``to`` records; the tensors are there already.
    sae.device, sae.dtype = torch.device(device), dtype
    sae.cfg.device, sae.cfg.dtype = str(sae.device), dtype_to_str(dtype)
    if "W_skip" in tensors:
        sae.register_state_dict_post_hook(_contiguous)
    return sae.eval().requires_grad_(False)


def _contiguous(_: object, state: dict[str, Any], prefix: str, __: object) -> None:
    """The skip is a transposed view of the file; whoever saves a state needs plain rows."""
    name = f"{prefix}W_skip"
    state[name] = state[name].contiguous()


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
            raise contradiction(path, spec, name, content.get(name), expected)
    modules = MODULES.get((spec.kind, spec.site))
    for name, module in zip(("hf_hook_point_in", "hf_hook_point_out"), modules or (), strict=False):
        value = content.get(name)
        if value is None:
            continue
        if not _names(value, spec.all_layers, module):
            layers = ",".join(map(str, spec.all_layers))
            raise contradiction(path, spec, name, value, f"model.layers.{layers}.{module}")


def contradiction(
    path: Path, spec: SaeSpec, name: str, value: object, expected: object
) -> BadFileError:
    """The refusal of a file that describes another dictionary than the spec."""
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
