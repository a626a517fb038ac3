"""The gate for dictionaries: what may stand where SAEs do, and what to type where something else does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from gemmascope_plugin.catalog import SaeSpec
from gemmascope_plugin.errors import InputError, UnknownNameError
from gemmascope_plugin.models.check_model import describe, is_model, with_call
from gemmascope_plugin.saes.coder import cross_layer_of
from gemmascope_plugin.splice.hooked_sae import HookedCrossLayer, HookedSAE
from gemmascope_plugin.splice.hooked_site import HookedSite
from gemmascope_plugin.types import SAE

Saes = SAE | HookedSAE | HookedCrossLayer | Iterable[Any] | Mapping[Any, Any] | None
"""One dictionary, hooked or not, a sequence of them, or a mapping whose values they are."""


def check_saes(saes: Saes, call: str = "") -> None:
    """Refuses what is not one dictionary or several; None passes, where they may be left out."""
    if saes is None or hasattr(saes, "specs") and isinstance(saes, Mapping):
        return  # a suite opens its dictionaries when they are asked for
    for sae in as_list(saes, call):
        check_sae(sae, call)


def check_sae(sae: object, call: str = "") -> None:
    """Refuses what is not one dictionary, with what to type."""
    if isinstance(sae, HookedSite) or _is_dictionary(sae):
        return
    if isinstance(sae, (list, tuple)) and len(sae) and all(map(_is_dictionary, sae)):
        raise InputError(
            f"One dictionary is meant here, {len(sae)} were given",
            fix=f"{call} once for each" if call else "one call for each",
        )
    raise _no_dictionary(sae, call)


def as_list(saes: Saes, call: str = "") -> list[Any]:
    """One dictionary, a sequence or a mapping as a list, which is not empty."""
    if isinstance(saes, torch.nn.Module):
        return [saes]
    if isinstance(saes, (str, bytes)) or not isinstance(saes, Iterable):
        raise _no_dictionary(saes, call)
    listed = list(saes.values()) if isinstance(saes, Mapping) else list(saes)
    if not listed:
        fix = with_call("gemmascope_plugin.load(spec) for one", call)
        raise UnknownNameError("No dictionary was given", fix=fix)
    return listed


def _is_dictionary(sae: object) -> bool:
    if not isinstance(sae, torch.nn.Module) or is_model(sae):
        return False
    if isinstance(sae, HookedSite) or cross_layer_of(sae) is not None or hasattr(sae, "sites"):
        return True
    # of which architectures something can be made is said where it is made
    return hasattr(sae, "W_dec") or hasattr(getattr(sae, "cfg", None), "architecture")


def _no_dictionary(value: object, call: str) -> InputError:
    order = f"{call}: the model first, then dictionaries" if call else "a loaded dictionary"
    if isinstance(value, SaeSpec):
        fix = "gemmascope_plugin.load(spec), or load_suite(specs) for several"
    elif isinstance(value, (list, tuple)) and value and isinstance(value[0], (SaeSpec, str)):
        fix = "[gemmascope_plugin.load(spec) for spec in specs], or load_suite(specs)"
    elif isinstance(value, str):
        fix = f"gemmascope_plugin.load((release, sae_id)) for a dictionary; {order}"
    elif is_model(value):
        return InputError(
            "The model stands where a dictionary belongs",
            fix=order if call else "the model first, then dictionaries",
        )
    else:
        fix = f"gemmascope_plugin.load(spec); {order}"
    return InputError(f"{describe(value)} is not a loaded dictionary", fix=fix)
