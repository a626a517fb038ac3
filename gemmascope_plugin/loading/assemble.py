"""A config and tensors become SAELens' own object, without a second copy.

1. SAELens' class is built on the meta device: no memory, no random numbers.
2. The tensors become its parameters as they are, mapped or moved.
3. Evaluation mode; no parameter asks for a gradient.

Costs about two milliseconds, whatever the size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Shaped

from gemmascope_plugin.errors import BadFileError

if TYPE_CHECKING:
    from sae_lens import SAE


def skeleton(cfg: Mapping[str, Any]) -> SAE[Any]:
    """SAELens' object for a config, its parameters on the meta device.

    Args:
        cfg: SAELens' config with ``architecture``.

    Returns:
        The object, without values.

    Raises:
        BadFileError: SAELens has no such architecture, or refuses the config.
    """
    from sae_lens import SAE

    from gemmascope_plugin.saes.registration import register_all

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
    """Give a skeleton its parameters and freeze it.

    Args:
        sae: From ``skeleton``.
        tensors: Parameter name to tensor.
        device: Where they are.
        dtype: Their type.

    Returns:
        The same object.
    """
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
