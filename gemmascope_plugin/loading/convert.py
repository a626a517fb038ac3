"""From a spec and its file to what SAELens builds an SAE from: a config and a state dict.

1. The config: SAELens' architecture name, shapes, no input bias, no normalisation, and everything
   we know about the dictionary in ``metadata``, which survives saving and loading there.
   ``sae_lens_version`` is set, because SAELens drops all unknown metadata of older configs.
2. The state: checked against the spec, cast and moved one tensor after the other, so that a
   memory-mapped file costs no memory until used.
3. Embedding dictionaries were trained on embeddings without the factor s = sqrt(d_model) that
   ``hook_embed`` carries: W_enc / s, W_dec * s, and b_dec * s (SAELens 6.54 leaves the bias out,
   which shifts every reconstruction by (s - 1) b_dec).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float

from gemmascope_plugin.catalog import SaeSpec
from gemmascope_plugin.errors import GemmaScopeError, shorten
from gemmascope_plugin.loading.npz import read_npz
from gemmascope_plugin.loading.validate import (
    OPTIONAL,
    check_shapes,
    check_values,
    drop_scaling_factor,
    expected_shapes,
)

ARCHITECTURES = {"sae": "jumprelu", "transcoder": "jumprelu_transcoder"}
SPEC_KEY = "gemmascope_spec"
_TRAINING = {"dataset_path": "monology/pile-uncopyrighted", "context_size": 1024}
"""What SAELens records for Gemma Scope; not true of bundled or local dictionaries."""


def config(spec: SaeSpec, *, device: str = "cpu", dtype: str = "float32") -> dict[str, Any]:
    """SAELens' config of a dictionary.

    Args:
        spec: Which dictionary.
        device: Where its parameters will be.
        dtype: Their type, SAELens' spelling.

    Returns:
        A dict for ``SAEConfig.from_dict``.

    Raises:
        GemmaScopeError: This kind of dictionary has no SAELens class.
    """
    import sae_lens

    if spec.kind not in ARCHITECTURES or spec.affine:
        kind = f"affine {spec.kind}" if spec.affine else spec.kind
        raise GemmaScopeError(
            f"{spec.release} {spec.sae_id} is of kind {kind!r}, which cannot be loaded",
            exists=shorten(ARCHITECTURES),
        )
    cfg: dict[str, Any] = {
        "architecture": ARCHITECTURES[spec.kind],
        "d_in": spec.d_in,
        "d_sae": spec.d_sae,
        "dtype": dtype,
        "device": device,
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if spec.hook_in.endswith("hook_z") else "none",
        "metadata": {"sae_lens_version": sae_lens.__version__, **_metadata(spec)},
    }
    if spec.kind == "transcoder":
        cfg["d_out"] = spec.d_out
    return cfg


def _metadata(spec: SaeSpec) -> dict[str, Any]:
    metadata: dict[str, Any] = {
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
        SPEC_KEY: {**spec.to_dict(), "levels": list(spec.levels)},
    }
    if spec.kind == "transcoder":
        metadata |= {"hook_name_out": spec.hook_out, "hook_head_index_out": None}
    return metadata if spec.bundled or spec.local else metadata | _TRAINING


def state(
    spec: SaeSpec, path: Path, *, device: str | torch.device, dtype: torch.dtype
) -> dict[str, Float[torch.Tensor, "*_"]]:
    """The parameters of a dictionary, checked.

    Args:
        spec: What the file should be.
        path: The ``.npz`` file.
        device: Where the tensors go.
        dtype: Their type.

    Returns:
        Parameter name to tensor; float32 on the CPU shares the memory map of the file.

    Raises:
        BadFileError: The file is damaged or is not this dictionary.
        WidthMismatchError: The file reads or writes tensors of another width.
    """
    check_shapes(path, spec)
    tensors = read_npz(path, (*expected_shapes(spec), *OPTIONAL))
    check_values(path, tensors)
    drop_scaling_factor(path, tensors)
    if spec.site == "embedding":
        _scale_embedding(tensors, math.sqrt(spec.d_in))
    for name in list(tensors):
        tensors[name] = tensors.pop(name).to(device=device, dtype=dtype)
    return tensors


def _scale_embedding(tensors: dict[str, Float[torch.Tensor, "*_"]], scale: float) -> None:
    tensors["W_enc"] = tensors["W_enc"] / scale
    tensors["W_dec"] = tensors["W_dec"] * scale
    tensors["b_dec"] = tensors["b_dec"] * scale


def spec_from_metadata(metadata: Mapping[str, Any]) -> SaeSpec | None:
    """The spec that ``config`` put into the metadata; None when it is not there."""
    fields = dict(metadata.items()).get(SPEC_KEY)
    if fields is None:
        return None
    return SaeSpec(**{**fields, "levels": tuple(fields["levels"])})
