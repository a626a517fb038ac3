"""``load()``: a spec becomes SAELens' own SAE object.

1. Find the file (``sources.py``), check it against the spec (``validate.py``).
2. Build SAELens' class on the meta device and hand it the checked tensors, so that the weights
   exist once; float32 on the CPU stays memory-mapped.
3. Freeze: eval mode, no parameter asks for a gradient.

Costs one pass over the file for checksums and finiteness, and SAELens' import on the first call.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gemmascope_plugin.catalog import SaeSpec, get
from gemmascope_plugin.errors import GemmaScopeError
from gemmascope_plugin.loading.convert import config, spec_from_metadata, state
from gemmascope_plugin.loading.register import register
from gemmascope_plugin.loading.sources import locate

if TYPE_CHECKING:
    from sae_lens import SAE


def load(
    spec: SaeSpec | tuple[str, str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    local_dir: str | Path | None = None,
    revision: str | None = None,
    offline: bool | None = None,
) -> SAE[Any]:
    """A dictionary as a SAELens object, frozen, with its spec in the metadata.

    Args:
        spec: A spec, or ``(release, sae_id)``.
        device: Where the parameters go.
        dtype: Their type.
        local_dir: Folder that mirrors the repository, instead of cache and hub.
        revision: Branch, tag or commit of the repository.
        offline: Never use the network; None follows ``HF_HUB_OFFLINE``.

    Returns:
        SAELens' ``JumpReLUSAE`` or ``JumpReLUTranscoder``.  As SAELens has it, an attention SAE
        takes ``[batch, pos, head, d_head]``.

    Raises:
        UnknownNameError: The release or the id does not exist.
        MissingFileError: The file is nowhere, and may not or could not be downloaded.
        BadFileError: The file is damaged or is not this dictionary.
        WidthMismatchError: The file reads or writes tensors of another width.
    """
    if not isinstance(spec, SaeSpec):
        spec = get(*_pair(spec))
    path = locate(spec, local_dir=local_dir, revision=revision, offline=offline)
    register()
    from sae_lens import SAE
    from sae_lens.util import dtype_to_str

    cfg = config(spec, device="meta", dtype=dtype_to_str(dtype))
    tensors = state(spec, path, device=device, dtype=dtype)
    config_class = SAE.get_sae_config_class_for_architecture(cfg["architecture"])
    sae_class: Any = SAE.get_sae_class_for_architecture(cfg["architecture"])
    sae = sae_class(config_class.from_dict(cfg))
    sae.load_state_dict(tensors, assign=True)
    sae.to(device=device, dtype=dtype)
    return sae.eval().requires_grad_(False)


def _pair(given: object) -> tuple[str, str]:
    if isinstance(given, (tuple, list)) and len(given) == 2:
        return str(given[0]), str(given[1])
    raise GemmaScopeError(
        f"load() got {type(given).__name__} {given!r}",
        exists="a SaeSpec or a pair (release, sae_id)",
        fix="load(find(model='2b', site='res', layer=20, width='16k', l0='canonical').one())",
    )


def spec_of(sae: SAE[Any]) -> SaeSpec | None:
    """The spec that an SAE was loaded from; None when it did not come from this package.

    Args:
        sae: Any SAELens object; saving and loading it there keeps the spec.

    Returns:
        The spec, equal to the one it was loaded with.
    """
    return spec_from_metadata(sae.cfg.metadata.to_dict())
