"""``load()``: a spec becomes an object that encodes and decodes.

1. Find the files (``sources.py``) and compare their headers with the spec (``integrity.py``).
2. The first time in a file's life, read it through once: checksums, finite values.
3. Map it.  Dictionaries of one layer become SAELens' own classes (``convert.py``); crosscoders, CLTs
   and trees become those of ``saes``.  float32 on the CPU stays memory-mapped; other types and devices
   are converted tensor by tensor.
4. Of crosscoders and CLTs, one file per layer, no value is read at first.  The first use of a layer
   checks its file; encoder, biases and skip are then moved, the decoder stays mapped and gives slices.

Opening a file that has been verified before costs a few milliseconds and no memory, whatever its
size.  SAELens' import on the first call of a process costs several seconds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import gemmascope_plugin.loading.saelens_registry as saelens_registry
from gemmascope_plugin.arguments import as_device, as_dtype, dtype_name
from gemmascope_plugin.catalog import SaeSpec, get
from gemmascope_plugin.errors import GemmaScopeError
from gemmascope_plugin.loading.arrays import ArrayFile
from gemmascope_plugin.loading.convert import (
    SPEC_KEY,
    check_config,
    config,
    fill,
    metadata,
    skeleton,
    state,
)
from gemmascope_plugin.loading.integrity import check_causal, check_file, open_checked
from gemmascope_plugin.loading.other_formats import open_saelens, open_tree
from gemmascope_plugin.loading.sources import locate
from gemmascope_plugin.saes.cross_layer import (
    CrossCoder,
    CrossLayerConfig,
    CrossLayerDictionary,
    CrossLayerTranscoder,
    LayerWeights,
)
from gemmascope_plugin.types import SAE

_CROSS_LAYER_CLASSES = {cls.kind: cls for cls in (CrossCoder, CrossLayerTranscoder)}


def open_multi_layer(
    spec: SaeSpec,
    files: Mapping[str, Path],
    *,
    device: str | torch.device,
    dtype: torch.dtype,
    check: bool,
) -> CrossLayerDictionary:
    """A crosscoder or CLT whose weights are read when used."""
    config_file = spec.config_filename
    if config_file is not None and config_file in files:
        check_config(files[config_file], spec)
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
    return _CROSS_LAYER_CLASSES[spec.kind](
        cfg, lambda position: _weights(opened[position], position)
    ).eval()


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


_OPENERS = {
    "crosscoder": open_multi_layer,
    "clt": open_multi_layer,
    "sae_lens": open_saelens,
    "tree": open_tree,
}
"""Formats that do not hold one JumpReLU dictionary of one layer in Gemma Scope's keys."""


@torch.inference_mode(False)
def load(
    spec: SaeSpec | tuple[str, str] | str,
    sae_id: str | None = None,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "float32",
    local_dir: str | Path | None = None,
    revision: str | None = None,
    offline: bool | None = None,
    check: bool = False,
) -> Any:
    """A dictionary, frozen, with its spec in the metadata.

    Args:
        spec: A spec, or ``(release, sae_id)``, or a release with ``sae_id`` beside it, as in SAELens.
        sae_id: Id in the release, where ``spec`` is the name of one.
        device: Where the parameters go; ``"auto"`` for a GPU if there is one.
        dtype: Their type, or its name.
        local_dir: Folder that mirrors the repository, instead of cache and hub.
        revision: Branch, tag or commit of the repository.
        offline: Never use the network; None follows ``HF_HUB_OFFLINE``.
        check: Read the file through although it has passed all checks before.

    Returns:
        SAELens' ``JumpReLUSAE``, ``JumpReLUTranscoder`` or ``JumpReLUSkipTranscoder``; for other
        kinds a ``CrossCoder``, ``CrossLayerTranscoder`` or ``TreeSAE``.  As SAELens has it, an
        attention SAE takes ``[batch, pos, head, d_head]``.

    Raises:
        UnknownNameError: The release, the id, the device or the type does not exist.
        MissingFileError: A file is nowhere, and may not or could not be downloaded.
        BadFileError: A file is damaged or is not this dictionary.
        WidthMismatchError: The file reads or writes tensors of another width.

    Example:
        >>> spec = gs.find(model="gemma-2-tiny", site="res", layer=1, l0="canonical").one()
        >>> sae = gs.load(spec)
        >>> sae.cfg.architecture(), tuple(sae.W_dec.shape)
        ('jumprelu', (512, 128))
    """
    device, dtype = as_device(device), as_dtype(dtype)
    if not isinstance(spec, SaeSpec) or sae_id is not None:
        spec = get(*_pair(spec if sae_id is None else (spec, sae_id)))
    files = locate(spec, local_dir=local_dir, revision=revision, offline=offline)
    if saelens_registry.registered is not None:  # SAELens may have forgotten since
        saelens_registry.register()
    if opener := _OPENERS.get(spec.format):
        return opener(spec, files, device=device, dtype=dtype, check=check)
    sae = skeleton(config(spec, dtype=dtype_name(dtype)))
    tensors = state(spec, files, device=device, dtype=dtype, check=check)
    return fill(sae, tensors, device=device, dtype=dtype)


def _pair(value: object) -> tuple[str, str]:
    pair = list(value) if isinstance(value, (tuple, list)) else []
    if len(pair) == 2 and all(isinstance(name, str) for name in pair):
        return str(pair[0]), str(pair[1])
    shown = repr(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        shown = f"{type(value).__name__} with {len(value)} entries"
    raise GemmaScopeError(
        f"load() got {shown}",
        exists="a SaeSpec or a pair (release, sae_id)",
        fix="load(find(model='2b', site='res', layer=20, width='16k', l0='canonical').one()), or "
        "load_suite(specs) for several",
    )


def spec_of(sae: SAE) -> SaeSpec | None:
    """The spec that a dictionary was loaded from; None when it did not come from this package.

    Args:
        sae: What ``load`` returns, or any SAELens object; saving and loading it there keeps the
            spec.

    Returns:
        The spec, equal to the one it was loaded with.
    """
    details: Any = sae.cfg.metadata
    values = details.to_dict() if hasattr(type(details), "to_dict") else details
    fields = dict(values.items()).get(SPEC_KEY)
    if fields is None:
        return None
    tuples = {name: tuple(fields.get(name, ())) for name in ("levels", "layers")}
    names = {field.name for field in dataclasses.fields(SaeSpec)}
    return SaeSpec(**{n: v for n, v in {**fields, **tuples}.items() if n in names})
