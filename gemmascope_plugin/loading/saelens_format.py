"""SAELens' own format: ``cfg.json`` and ``sae_weights.safetensors``, e.g. the community Matryoshkas.

1. The config goes through SAELens' own upgrade of old versions; shapes and hook must be the spec's.
2. The weights are mapped and checked against the shapes that SAELens' class has for this config.
3. Where a JumpReLU config subtracts ``b_dec`` from the input, that is folded into the encoder bias,
   ``b_enc - b_dec @ W_enc``: the same function in the form that all Gemma Scope dictionaries have.
4. Matryoshka prefix sizes come from the file, else from the spec. With them a JumpReLU dictionary is a
   ``MatryoshkaSAE``, which SAELens' own loader cannot know: it saves them as plain JumpReLU.

Step 3 reads ``W_enc`` once at opening; without it opening reads no weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gemmascope_plugin.catalog import SaeSpec
from gemmascope_plugin.errors import BadFileError, ModelError
from gemmascope_plugin.files.json_file import read_json
from gemmascope_plugin.loading.convert import fill, metadata, skeleton
from gemmascope_plugin.loading.integrity import check_file, open_checked

if TYPE_CHECKING:
    from sae_lens import SAE

_FOLDED = ("jumprelu", "jumprelu_transcoder", "matryoshka_jumprelu")


def open_saelens(
    spec: SaeSpec,
    files: Mapping[str, Path],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    check: bool = False,
) -> SAE[Any]:
    """A dictionary that SAELens saved, frozen; a ``MatryoshkaSAE`` if it is JumpReLU with levels."""
    from sae_lens.util import dtype_to_str

    assert spec.config_filename is not None
    path = files[spec.config_filename]
    cfg = {**_config(path, spec), "dtype": dtype_to_str(dtype)}
    sae = skeleton(cfg)
    as_saved = sae.state_dict()
    sae.process_state_dict_for_saving(as_saved)
    expected = {name: tuple(value.shape) for name, value in as_saved.items()}
    file = open_checked(files[spec.filename], spec, expected)
    check_file(file, force=check)
    tensors = {name: file.tensor(name) for name in expected}
    if cfg["architecture"] in _FOLDED and sae.cfg.apply_b_dec_to_input:
        tensors["b_enc"] = tensors["b_enc"] - tensors["b_dec"] @ tensors["W_enc"]
        sae.cfg.apply_b_dec_to_input = False
    moved = {name: tensor.to(device, dtype) for name, tensor in tensors.items()}
    sae.process_state_dict_for_loading(moved)
    return fill(sae, moved, device=device, dtype=dtype)


def _config(path: Path, spec: SaeSpec) -> dict[str, Any]:
    """SAELens' config in today's form, compared with the spec, with our metadata in it."""
    from sae_lens import __version__
    from sae_lens.loading.pretrained_sae_loaders import handle_config_defaulting

    try:
        cfg: dict[str, Any] = handle_config_defaulting(read_json(path))
    except (KeyError, TypeError, ValueError, AttributeError) as fault:
        raise BadFileError(f"{str(path)!r} is not a config of SAELens: {fault!r}") from fault
    saved = cfg.get("metadata") or {}
    if not isinstance(saved, dict) or "architecture" not in cfg:
        raise BadFileError(f"{str(path)!r} is not a config of SAELens")
    for name, value, expected in (
        ("d_in", cfg.get("d_in"), spec.d_in),
        ("d_sae", cfg.get("d_sae"), spec.d_sae),
        ("hook_name", saved.get("hook_name"), spec.hook_in),
    ):
        if value != expected:
            raise BadFileError(
                f"{str(path)!r} says {name} {value!r}, but {spec.release} {spec.sae_id} has "
                f"{expected!r}",
                fix="the folder of another dictionary lies here; check the folder and the spec",
            )
    if cfg.get("normalize_activations") == "expected_average_only_in":
        raise BadFileError(
            f"{str(path)!r} expects activations scaled by a factor that the folder does not hold",
            fix="fold the factor into the weights before saving",
        )
    entries = {name: value for name, value in saved.items() if value is not None}
    levels = _levels(path, spec, cfg)
    if cfg["architecture"] == "matryoshka_jumprelu" or (
        levels and cfg["architecture"] == "jumprelu"
    ):
        _make_matryoshka(cfg, levels)
    cfg["metadata"] = {
        **{n: v for n, v in metadata(spec).items() if n not in ("dataset_path", "context_size")},
        **entries,
        **({"levels": levels} if levels else {}),
        "sae_lens_version": __version__,
    }
    return cfg


def _make_matryoshka(cfg: dict[str, Any], levels: list[int]) -> None:
    """Turns the config into one with levels, registering the class on the way."""
    from gemmascope_plugin.saes.matryoshka import MatryoshkaSAEConfig

    if cfg["architecture"] == MatryoshkaSAEConfig.architecture():
        MatryoshkaSAEConfig.from_dict({**cfg, "levels": levels})
    cfg |= {"architecture": MatryoshkaSAEConfig.architecture(), "levels": levels}


def _levels(path: Path, spec: SaeSpec, cfg: Mapping[str, Any]) -> list[int]:
    """Matryoshka prefix sizes: the file's, which the spec's must equal if both are known."""
    from gemmascope_plugin.saes.matryoshka import check_levels

    saved = cfg.get("metadata") or {}
    details = saved.get("training_architecture_details")
    details = details if isinstance(details, dict) else {}
    stored = cfg.get("levels") or details.get("matryoshka_widths") or saved.get("levels")
    if not stored:
        return list(spec.levels)
    try:
        levels = check_levels(stored, spec.d_sae)
    except ModelError as fault:
        raise BadFileError(f"{str(path)!r}: {fault}") from fault
    if spec.levels and spec.levels != levels:
        raise BadFileError(
            f"{str(path)!r} says matryoshka_widths {list(levels)}, but {spec.release} {spec.sae_id} has "
            f"levels {list(spec.levels)}"
        )
    return list(levels)
