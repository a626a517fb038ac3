"""``load()``: a spec becomes an object that encodes and decodes.

1. Find the files (``sources.py``) and compare their headers with the spec (``readers.py``).
2. The first time in a file's life, read it through once: checksums, finite values (``integrity.py``).
3. Map it.  Dictionaries of one layer become SAELens' own classes (``convert.py``, ``assemble.py``);
   crosscoders, CLTs and trees become those of ``saes``.  float32 on the CPU stays memory-mapped;
   other types and devices are converted tensor by tensor.

Opening a file that has been verified before costs a few milliseconds and no memory, whatever its
size.  SAELens' import on the first call of a process costs several seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gemmascope_plugin.catalog import SaeSpec, get
from gemmascope_plugin.dtypes import as_device, as_dtype, dtype_name
from gemmascope_plugin.errors import GemmaScopeError
from gemmascope_plugin.loading.assemble import fill, skeleton
from gemmascope_plugin.loading.convert import config, spec_from_metadata, state
from gemmascope_plugin.loading.multi_layer import open_multi_layer
from gemmascope_plugin.loading.register import renew
from gemmascope_plugin.loading.saelens_format import open_saelens
from gemmascope_plugin.loading.sources import locate
from gemmascope_plugin.loading.tree_file import open_tree

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
    """
    device, dtype = as_device(device), as_dtype(dtype)
    if not isinstance(spec, SaeSpec) or sae_id is not None:
        spec = get(*_pair(spec if sae_id is None else (spec, sae_id)))
    files = locate(spec, local_dir=local_dir, revision=revision, offline=offline)
    renew()
    if opener := _OPENERS.get(spec.format):
        return opener(spec, files, device=device, dtype=dtype, check=check)
    sae = skeleton(config(spec, dtype=dtype_name(dtype)))
    tensors = state(spec, files, device=device, dtype=dtype, check=check)
    return fill(sae, tensors, device=device, dtype=dtype)


def _pair(given: Any) -> tuple[str, str]:
    is_pair = isinstance(given, (tuple, list)) and len(given) == 2
    if is_pair and all(isinstance(name, str) for name in given):
        return str(given[0]), str(given[1])
    several = not isinstance(given, str) and isinstance(given, Sequence)
    shown = f"{len(given)} entries" if several else repr(given)
    raise GemmaScopeError(
        f"load() got {type(given).__name__} with {shown}" if several else f"load() got {shown}",
        exists="a SaeSpec or a pair (release, sae_id)",
        fix="load(find(model='2b', site='res', layer=20, width='16k', l0='canonical').one()), or "
        "load_suite(specs) for several",
    )


def spec_of(sae: Any) -> SaeSpec | None:
    """The spec that a dictionary was loaded from; None when it did not come from this package.

    Args:
        sae: What ``load`` returns, or any SAELens object; saving and loading it there keeps the
            spec.

    Returns:
        The spec, equal to the one it was loaded with.
    """
    known = sae.cfg.metadata
    return spec_from_metadata(known.to_dict() if hasattr(type(known), "to_dict") else known)
