"""Encode and decode of dictionaries."""

from gemmascope_plugin.saes.cross_layer import (
    CrossCoder,
    CrossLayerConfig,
    CrossLayerTranscoder,
    LayerWeights,
)
from gemmascope_plugin.saes.jumprelu import (
    check_architecture,
    decode,
    encode,
    encode_features,
    has_skip,
    jump,
    pre_activations,
    write_features,
)
from gemmascope_plugin.saes.tree import TreeSAE, TreeSAEConfig

__all__ = [
    "CrossCoder",
    "CrossLayerConfig",
    "CrossLayerTranscoder",
    "LayerWeights",
    "TreeSAE",
    "TreeSAEConfig",
    "check_architecture",
    "decode",
    "encode",
    "encode_features",
    "has_skip",
    "jump",
    "pre_activations",
    "write_features",
]
