"""One vocabulary over ``HookedTransformer`` and ``TransformerBridge``."""

from gemmascope_plugin.models.gradients import gradients
from gemmascope_plugin.models.load_model import load_model
from gemmascope_plugin.models.parity import Parity, parity
from gemmascope_plugin.models.points import (
    flatten_heads,
    hook_names,
    hook_point,
    restore_heads,
)
from gemmascope_plugin.models.prompts import to_tokens
from gemmascope_plugin.models.tokens import special_ids, token_id, token_label, token_strings

__all__ = [
    "Parity",
    "flatten_heads",
    "gradients",
    "hook_names",
    "hook_point",
    "load_model",
    "parity",
    "restore_heads",
    "special_ids",
    "to_tokens",
    "token_id",
    "token_label",
    "token_strings",
]
