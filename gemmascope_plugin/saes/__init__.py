"""Encode and decode of dictionaries, and classes for SAELens to train and load.

The classes that build on SAELens' are lazy (PEP 562): its import costs seconds, and the rest of the
floor does without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gemmascope_plugin.saes.coder import (
    Coder,
    Weights,
    coder_of,
    layer_weights,
    level_width,
    reconstruct,
    weights_of,
)
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
from gemmascope_plugin.saes.two_stage import Bf16Prefilter, has_bf16_instructions

if TYPE_CHECKING:
    from gemmascope_plugin.saes.cross_layer_sae import CLTSAE, CrossCoderSAE
    from gemmascope_plugin.saes.cross_layer_sae_config import CLTSAEConfig, CrossCoderSAEConfig
    from gemmascope_plugin.saes.matryoshka import MatryoshkaSAE, MatryoshkaSAEConfig
    from gemmascope_plugin.saes.matryoshka_sources import from_dictionary_learning, with_levels
    from gemmascope_plugin.saes.soft import SoftSAE, SoftSAEConfig
    from gemmascope_plugin.saes.training.cross_layer_training import (
        CLTTrainingConfig,
        CLTTrainingSAE,
        CrossCoderTrainingConfig,
        CrossCoderTrainingSAE,
    )
    from gemmascope_plugin.saes.training.jumprelu_training import (
        GemmaScopeConfig,
        GemmaScopeTrainingSAE,
    )
    from gemmascope_plugin.saes.training.matryoshka_training import (
        MatryoshkaBatchTopK,
        MatryoshkaBatchTopKConfig,
        MatryoshkaJumpReLU,
        MatryoshkaJumpReLUConfig,
    )
    from gemmascope_plugin.saes.training.soft_training import (
        SoftTopKTrainingSAE,
        SoftTopKTrainingSAEConfig,
        SoftTrainingSAE,
        SoftTrainingSAEConfig,
    )
    from gemmascope_plugin.saes.training.tree_training import TreeTrainingSAE, TreeTrainingSAEConfig
    from gemmascope_plugin.saes.tree import TreeSAE
    from gemmascope_plugin.saes.tree_config import TreeSAEConfig

__all__ = [
    "CLTSAE",
    "Bf16Prefilter",
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
    "matryoshka": ("MatryoshkaSAE", "MatryoshkaSAEConfig"),
    "matryoshka_sources": ("from_dictionary_learning", "with_levels"),
    "soft": ("SoftSAE", "SoftSAEConfig"),
    "tree": ("TreeSAE",),
    "tree_config": ("TreeSAEConfig",),
    "training.cross_layer_training": (
        *("CLTTrainingConfig", "CLTTrainingSAE"),
        *("CrossCoderTrainingConfig", "CrossCoderTrainingSAE"),
    ),
    "training.jumprelu_training": ("GemmaScopeConfig", "GemmaScopeTrainingSAE"),
    "training.matryoshka_training": (
        *("MatryoshkaBatchTopK", "MatryoshkaBatchTopKConfig"),
        *("MatryoshkaJumpReLU", "MatryoshkaJumpReLUConfig"),
    ),
    "training.soft_training": (
        *("SoftTopKTrainingSAE", "SoftTopKTrainingSAEConfig"),
        *("SoftTrainingSAE", "SoftTrainingSAEConfig"),
    ),
    "training.tree_training": ("TreeTrainingSAE", "TreeTrainingSAEConfig"),
}
_HOME_OF = {name: f"{__name__}.{home}" for home, names in _LAZY.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)
