"""The gate for models: what comes first in every function, and what to type where something else does."""

from __future__ import annotations

from typing import cast

import torch

from gemmascope_plugin.errors import InputError
from gemmascope_plugin.models.protocol import HookedModel

_PARTS = ("cfg", "blocks", "embed", "hook_dict", "run_with_cache")


def check_model(model: object, call: str = "") -> HookedModel:
    """The model, if it is one; ``call`` is how the function is called: ``"splice(model, saes)"``."""
    if is_model(model) or hasattr(model, "_orig_mod"):  # compiled ones are refused where it matters
        return cast("HookedModel", model)
    raise InputError(
        f"{describe(model)} is not a model",
        exists="HookedTransformer, TransformerBridge",
        fix=_fix(model, call),
    )


def is_model(value: object) -> bool:
    """Whether something is a model of TransformerLens."""
    if isinstance(value, type) or value is None:
        return False
    # hook_dict of TransformerBridge is made anew whenever it is asked for: the class is asked instead
    if isinstance(value, torch.nn.Module):
        attributes = vars(value) | value._modules
        if all(part in attributes or hasattr(type(value), part) for part in _PARTS):
            return True
    return all(hasattr(value, part) for part in _PARTS)


def with_call(fix: str, call: str) -> str:
    """What to type, behind how the function is called where that is known."""
    return f"{call}; {fix}" if call else fix


def describe(value: object) -> str:
    """A value in words short enough for an error."""
    if isinstance(value, str):
        return f"The text {_short(repr(value))}"
    if isinstance(value, (list, tuple)):
        kinds = sorted({type(item).__name__ for item in value})
        return f"A {type(value).__name__} of {' and '.join(kinds) or 'nothing'}"
    if isinstance(value, torch.Tensor):
        return f"A tensor of shape {list(value.shape)}"
    if value is None:
        return "None"
    if isinstance(value, (bool, int, float)):
        return repr(value)
    if isinstance(value, type):
        return f"The class {value.__name__}"
    return f"A {type(value).__name__}"


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:56]}...'"


def _fix(model: object, call: str) -> str:
    first = f"{call}: the model comes first" if call else "the model comes first"
    if isinstance(model, str):
        return f"model = gemmascope_plugin.load_model({_short(repr(model))}), or {first}"
    if hasattr(model, "config") and hasattr(model, "get_input_embeddings"):
        return "model = gemmascope_plugin.load_model(model), which takes a transformers model"
    if isinstance(getattr(model, "model", None), torch.nn.Module):
        return f"its attribute .model, or {first}"
    return first
