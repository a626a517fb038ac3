"""Encode and decode of dictionaries, and classes for SAELens to train and load.

The classes that build on SAELens' are lazy (PEP 562): its import costs seconds, and the rest of the
floor does without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gemmascope_plugin.saes.coder import Coder, coder_of, reconstruct
from gemmascope_plugin.saes.cross_layer import (
    CrossCoder,
    CrossLayerConfig,
    CrossLayerTranscoder,
    LayerWeights,
)
from gemmascope_plugin.saes.encode_sparse import encode_sparse
from gemmascope_plugin.saes.jumprelu import (
    bias,
    check_architecture,
    decode,
    encode,
    encode_features,
    has_skip,
    jump,
    pre_activations,
    write_features,
)
from gemmascope_plugin.saes.lapsum import keep_top, soft_topk
from gemmascope_plugin.saes.sparse import SparseActs, write
from gemmascope_plugin.saes.two_stage import TwoStage, has_bf16_instructions
from gemmascope_plugin.saes.weights import Weights, layer_weights, level_width, weights_of

if TYPE_CHECKING:
    from gemmascope_plugin.saes.cross_layer_sae import CLTSAE, CrossCoderSAE
    from gemmascope_plugin.saes.cross_layer_sae_config import CLTSAEConfig, CrossCoderSAEConfig
    from gemmascope_plugin.saes.cross_layer_training import (
        CLTTrainingConfig,
        CLTTrainingSAE,
        CrossCoderTrainingConfig,
        CrossCoderTrainingSAE,
    )
    from gemmascope_plugin.saes.jumprelu_training import GemmaScopeConfig, GemmaScopeTrainingSAE
    from gemmascope_plugin.saes.matryoshka import MatryoshkaSAE, MatryoshkaSAEConfig
    from gemmascope_plugin.saes.matryoshka_sources import from_dictionary_learning, with_levels
    from gemmascope_plugin.saes.matryoshka_training import (
        MatryoshkaBatchTopK,
        MatryoshkaBatchTopKConfig,
        MatryoshkaJumpReLU,
        MatryoshkaJumpReLUConfig,
    )
    from gemmascope_plugin.saes.soft import SoftSAE
    from gemmascope_plugin.saes.soft_config import (
        SoftSAEConfig,
        SoftTopKTrainingSAEConfig,
        SoftTrainingSAEConfig,
    )
    from gemmascope_plugin.saes.soft_training import SoftTopKTrainingSAE, SoftTrainingSAE
    from gemmascope_plugin.saes.tree import TreeSAE, TreeSAEConfig
    from gemmascope_plugin.saes.tree_training import TreeTrainingSAE
    from gemmascope_plugin.saes.tree_training_config import TreeTrainingSAEConfig

__all__ = [
    "CLTSAE",
    "CLTSAEConfig",
    "CLTTrainingConfig",
    "CLTTrainingSAE",
    "Coder",
    "CrossCoder",
    "CrossCoderSAE",
    "CrossCoderSAEConfig",
    "CrossCoderTrainingConfig",
    "CrossCoderTrainingSAE",
    "CrossLayerConfig",
    "CrossLayerTranscoder",
    "GemmaScopeConfig",
    "GemmaScopeTrainingSAE",
    "LayerWeights",
    "MatryoshkaBatchTopK",
    "MatryoshkaBatchTopKConfig",
    "MatryoshkaJumpReLU",
    "MatryoshkaJumpReLUConfig",
    "MatryoshkaSAE",
    "MatryoshkaSAEConfig",
    "SoftSAE",
    "SoftSAEConfig",
    "SoftTopKTrainingSAE",
    "SoftTopKTrainingSAEConfig",
    "SoftTrainingSAE",
    "SoftTrainingSAEConfig",
    "SparseActs",
    "TreeSAE",
    "TreeSAEConfig",
    "TreeTrainingSAE",
    "TreeTrainingSAEConfig",
    "TwoStage",
    "Weights",
    "bias",
    "check_architecture",
    "coder_of",
    "decode",
    "encode",
    "encode_features",
    "encode_sparse",
    "from_dictionary_learning",
    "has_bf16_instructions",
    "has_skip",
    "jump",
    "keep_top",
    "layer_weights",
    "level_width",
    "pre_activations",
    "reconstruct",
    "soft_topk",
    "weights_of",
    "with_levels",
    "write",
    "write_features",
]

_LAZY = {
    "cross_layer_sae": ("CLTSAE", "CrossCoderSAE"),
    "cross_layer_sae_config": ("CLTSAEConfig", "CrossCoderSAEConfig"),
    "cross_layer_training": (
        *("CLTTrainingConfig", "CLTTrainingSAE"),
        *("CrossCoderTrainingConfig", "CrossCoderTrainingSAE"),
    ),
    "jumprelu_training": ("GemmaScopeConfig", "GemmaScopeTrainingSAE"),
    "matryoshka": ("MatryoshkaSAE", "MatryoshkaSAEConfig"),
    "matryoshka_sources": ("from_dictionary_learning", "with_levels"),
    "matryoshka_training": (
        *("MatryoshkaBatchTopK", "MatryoshkaBatchTopKConfig"),
        *("MatryoshkaJumpReLU", "MatryoshkaJumpReLUConfig"),
    ),
    "soft": ("SoftSAE",),
    "soft_config": ("SoftSAEConfig", "SoftTopKTrainingSAEConfig", "SoftTrainingSAEConfig"),
    "soft_training": ("SoftTopKTrainingSAE", "SoftTrainingSAE"),
    "tree": ("TreeSAE", "TreeSAEConfig"),
    "tree_training": ("TreeTrainingSAE",),
    "tree_training_config": ("TreeTrainingSAEConfig",),
}
_HOME_OF = {name: f"{__name__}.{home}" for home, names in _LAZY.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)
