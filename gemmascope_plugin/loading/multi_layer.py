"""Crosscoders and cross-layer transcoders from their files, one file per layer.

1. Every file's header is compared with the spec when the dictionary is opened; no value is read.
2. The first use of a layer checks its file once: values finite, and no feature of layer ``i``
   writes to an output before ``i`` (the second axis of ``w_dec`` is the absolute output).
3. Encoder, biases and skip are mapped and then moved; the decoder stays mapped and gives slices.

Costs a millisecond per layer; step 2 one pass over a file, once in its life.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from gemmascope_plugin.catalog import SaeSpec
from gemmascope_plugin.loading.arrays import ArrayFile
from gemmascope_plugin.loading.config_json import check_config
from gemmascope_plugin.loading.convert import metadata
from gemmascope_plugin.loading.integrity import check_causal, check_file
from gemmascope_plugin.loading.readers import open_checked
from gemmascope_plugin.saes.cross_layer import (
    CrossCoder,
    CrossLayerConfig,
    CrossLayerDictionary,
    CrossLayerTranscoder,
    LayerWeights,
)

CLASSES = {cls.kind: cls for cls in (CrossCoder, CrossLayerTranscoder)}


def open_multi_layer(
    spec: SaeSpec,
    files: Mapping[str, Path],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    check: bool = False,
) -> CrossLayerDictionary:
    """A crosscoder or CLT whose weights are read when used.

    Args:
        spec: What the files should be.
        files: Path in the repository to path on this machine.
        device: Where encoders go; decoders stay on disk.
        dtype: Type of the computation.
        check: Check all values now, although they have passed before.

    Returns:
        A ``CrossCoder`` or a ``CrossLayerTranscoder``.

    Raises:
        BadFileError: A file is damaged or is not this dictionary.
        WidthMismatchError: A file reads or writes tensors of another width.
    """
    config = spec.config_filename
    if config is not None and config in files:
        check_config(files[config], spec)
    opened = [open_checked(files[name], spec) for name in spec.filenames]
    if check:
        for position, file in enumerate(opened):
            _check(file, position, force=True)
    n = len(opened)
    cfg = CrossLayerConfig(
        kind=spec.kind,
        layers=spec.layers,
        hooks_in=spec.hooks_in,
        hooks_out=spec.hooks_out,
        d_in=spec.d_in,
        d_out=spec.d_out,
        d_sae=(spec.d_sae // n,) * n,
        affine=spec.affine,
        dtype=dtype,
        device=str(device),
        metadata=metadata(spec),
    )
    return CLASSES[spec.kind](cfg, lambda position: _weights(opened[position], position)).eval()


def _check(file: ArrayFile, position: int, *, force: bool = False) -> None:
    check_file(file, force=force)
    check_causal(file, position, force=force)


def _weights(file: ArrayFile, position: int) -> LayerWeights:
    _check(file, position)
    tensors = file.tensors()
    return LayerWeights(
        W_enc=tensors["W_enc"],
        b_enc=tensors["b_enc"],
        threshold=tensors["threshold"],
        W_dec=tensors["W_dec"],
        b_dec=tensors["b_dec"],
        A=tensors.get("A"),
    )
