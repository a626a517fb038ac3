"""Dictionaries in the formats of others: SAELens' own, and the checkpoints of the Tree SAE authors.

SAELens: ``cfg.json`` and ``sae_weights.safetensors``, e.g. the community Matryoshkas.

1. The config goes through SAELens' own upgrade of old versions; shapes and hook must be the spec's.
2. The weights are mapped and checked against the shapes that SAELens' class has for this config.
3. Where a JumpReLU config subtracts ``b_dec`` from the input, that is folded into the encoder bias,
   ``b_enc - b_dec @ W_enc``: the same function in the form that all Gemma Scope dictionaries have.
4. Matryoshka prefix sizes come from the file, else from the spec. With them a JumpReLU dictionary is a
   ``MatryoshkaSAE``, which SAELens' own loader cannot know: it saves them as plain JumpReLU.

Step 3 reads ``W_enc`` once at opening; without it opening reads no weights.

Tree SAE (arXiv 2605.07922): ``config.json`` and ``sae.safetensors`` with ``encoder.weight [d_sae,
d_in]``, ``decoder.weight [d_in, d_sae]``, ``b_dec [d_in]``, ``steps_since_fired [d_sae]``, and for every
layer ``l >= 1`` ``parent_index_l [s_l]``.

1. The config gives sizes and sparsity of the layers; its site must be the spec's.
2. A parent index equal to the first feature of its own layer means the root.  It becomes -1.
3. SAELens' class for the architecture "tree", which ``saes/tree.py`` registers, is filled.
4. The flat baselines of the same authors (top-k, Matryoshka: top-k over the whole dictionary) are
   trees of one layer.  Matching pursuit is another algorithm and refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int, Shaped

from gemmascope_plugin.catalog import SaeSpec
from gemmascope_plugin.errors import BadFileError, GemmaScopeError, ModelError, WidthMismatchError
from gemmascope_plugin.files.json_file import read_json
from gemmascope_plugin.loading.arrays import ArrayFile, safetensors_arrays
from gemmascope_plugin.loading.convert import contradiction, fill, metadata, skeleton
from gemmascope_plugin.loading.integrity import check_file, open_checked

if TYPE_CHECKING:
    from sae_lens import SAE

    from gemmascope_plugin.saes.tree import TreeSAE

_FOLDED = ("jumprelu", "jumprelu_transcoder", "matryoshka_jumprelu")


def open_saelens(
    spec: SaeSpec,
    files: Mapping[str, Path],
    *,
    device: str | torch.device,
    dtype: torch.dtype,
    check: bool,
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
            raise contradiction(path, spec, name, value, expected)
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


def open_tree(
    spec: SaeSpec,
    files: Mapping[str, Path],
    *,
    device: str | torch.device,
    dtype: torch.dtype,
    check: bool,
) -> TreeSAE:
    """A Tree SAE, memory-mapped where possible."""
    from sae_lens.util import dtype_to_str

    from gemmascope_plugin.saes.tree import TreeSAE

    cfg = tree_config(spec, files, dtype=dtype_to_str(dtype))
    tensors = tree_state(spec, files, cfg, device=device, dtype=dtype, check=check)
    sae = fill(skeleton(cfg), tensors, device=device, dtype=dtype)
    assert isinstance(sae, TreeSAE)
    return sae


def tree_config(
    spec: SaeSpec, files: Mapping[str, Path], *, device: str = "cpu", dtype: str = "float32"
) -> dict[str, Any]:
    """A dict for ``TreeSAEConfig.from_dict``, of the ``config.json`` of a Tree SAE."""
    import sae_lens

    assert spec.config_filename is not None
    path = files[spec.config_filename]
    content = read_json(path)
    kind = str(content.get("type", "tree")).lower()
    if "mp" in kind.replace("-", "_").split("_") or "matching" in kind:
        raise GemmaScopeError(
            f"{spec.release} {spec.sae_id} is a matching-pursuit dictionary, which is not read",
            exists="Tree, Matryoshka and top-k checkpoints of the same repository",
        )
    for name, expected in (("d_in", spec.d_in), ("hook_name", spec.hook_in)):
        if content.get(name, expected) != expected:
            raise contradiction(path, spec, name, content[name], expected)
    sizes, ks = _layers(path, content, spec, flat="tree" not in kind)
    return {
        "architecture": "tree",
        "d_in": spec.d_in,
        "d_sae": spec.d_sae,
        "dtype": dtype,
        "device": device,
        "features_per_layer": tuple(sizes),
        "k_per_layer": tuple(ks),
        "normalize_activations": "layer_norm" if content.get("standardize", True) else "none",
        "metadata": {
            "sae_lens_version": sae_lens.__version__,
            **metadata(spec),
            "type": kind,
        },
    }


def tree_state(
    spec: SaeSpec,
    files: Mapping[str, Path],
    cfg: Mapping[str, Any],
    *,
    device: str | torch.device,
    dtype: torch.dtype,
    check: bool = False,
) -> dict[str, Shaped[torch.Tensor, "*_"]]:
    """Parameters and parents of a Tree SAE, checked; float32 on the CPU shares the file's map."""
    path, sizes = files[spec.filename], cfg["features_per_layer"]
    file = ArrayFile(path=path, source=path, arrays=safetensors_arrays(path))
    _check_arrays(file, spec, sizes)
    check_file(file, force=check)
    return {
        "W_enc": file.tensor("encoder.weight").T.to(device, dtype),
        "W_dec": file.tensor("decoder.weight").T.to(device, dtype),
        "b_dec": file.tensor("b_dec").to(device, dtype),
        "parent": _parents(file, spec, sizes).to(device),
    }


def _layers(
    path: Path, content: Mapping[str, Any], spec: SaeSpec, *, flat: bool
) -> tuple[list[int], list[int]]:
    """Features and ``k`` of each layer; of one layer for the flat baselines."""
    sizes = _counts(path, content, "features_per_layer") or [spec.d_sae]
    ks = _counts(path, content, "k_per_layer") or _counts(path, content, "k")
    if flat:
        sizes, ks = [sum(sizes)], [sum(ks)]
    possible = len(sizes) == len(ks) and all(k <= size for k, size in zip(ks, sizes, strict=True))
    if not possible or sum(sizes) != spec.d_sae:
        raise BadFileError(
            f"{str(path)!r} has layers of {sizes} features with k = {ks}, but {spec.release} "
            f"{spec.sae_id} has {spec.d_sae} features",
            exists="for each layer a k of at most its features",
        )
    return sizes, ks


def _counts(path: Path, content: Mapping[str, Any], name: str) -> list[int]:
    """A list of positive integers, from one or from a list of them; empty when absent."""
    value = content.get(name)
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(n) is int and 0 < n < 1 << 32 for n in values):
        raise BadFileError(f"{str(path)!r} has {name} {value!r}, not positive integers")
    return values


def _check_arrays(file: ArrayFile, spec: SaeSpec, sizes: Sequence[int]) -> None:
    expected: dict[str, tuple[int, ...]] = {
        "encoder.weight": (spec.d_sae, spec.d_in),
        "decoder.weight": (spec.d_in, spec.d_sae),
        "b_dec": (spec.d_in,),
    }
    for layer, size in enumerate(sizes[1:], start=1):
        expected[f"parent_index_{layer}"] = (size,)
    for name, shape in expected.items():
        actual = file.arrays[name].shape if name in file.arrays else None
        if actual != shape:
            problem = "is missing" if actual is None else f"has shape {list(actual)}"
            raise WidthMismatchError(
                f"{name} of {str(file.source)!r} {problem}; the config needs {list(shape)}"
            )
        integers = not file.arrays[name].dtype.is_floating_point
        if integers != name.startswith("parent_index"):
            raise BadFileError(f"{name} of {str(file.source)!r} has type {file.arrays[name].dtype}")


def _parents(file: ArrayFile, spec: SaeSpec, sizes: Sequence[int]) -> Int[torch.Tensor, " d_sae"]:
    from gemmascope_plugin.saes.tree_config import ROOT

    parent = torch.full((spec.d_sae,), ROOT, dtype=torch.int64)
    starts = list(accumulate(sizes))
    for layer, (start, stop) in enumerate(zip(starts[:-1], starts[1:], strict=True), start=1):
        index = file.tensor(f"parent_index_{layer}").to(torch.int64)
        wrong = (index < 0) | (index > start)
        if bool(wrong.any()):
            child = int(wrong.nonzero()[0, 0])
            raise BadFileError(
                f"feature {start + child} of {str(file.source)!r} has parent {int(index[child])}",
                exists=f"0 to {start - 1}, and {start} for the root",
            )
        parent[start:stop] = torch.where(index == start, ROOT, index)
    return parent
