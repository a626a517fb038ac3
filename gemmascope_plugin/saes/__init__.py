"""Encode and decode of dictionaries."""

from gemmascope_plugin.saes.jumprelu import (
    check_architecture,
    decode,
    encode,
    encode_features,
    jump,
    pre_activations,
    write_features,
)

__all__ = [
    "check_architecture",
    "decode",
    "encode",
    "encode_features",
    "jump",
    "pre_activations",
    "write_features",
]
