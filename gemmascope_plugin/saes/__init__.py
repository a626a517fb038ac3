"""Encode and decode of dictionaries, and classes for SAELens to train and load.

The classes that build on SAELens' are lazy (PEP 562): its import costs seconds, and the rest of the
floor does without it.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from gemmascope_plugin.saes.coder import (
    Coder,
    Weights,
    check_architecture,
    coder_of,
    decode,
    has_skip,
    layer_weights,
    level_width,
    reconstruct,
    weights_of,
    write_features,
)
from gemmascope_plugin.saes.cross_layer import (
    CrossCoder,
    CrossLayerConfig,
    CrossLayerTranscoder,
    LayerWeights,
)
from gemmascope_plugin.saes.jumprelu import encode, encode_sparse, jump
from gemmascope_plugin.saes.lapsum import keep_top, soft_topk
from gemmascope_plugin.saes.sparse import SparseActs, write
from gemmascope_plugin.saes.two_stage import Bf16Prefilter, has_bf16_instructions

if TYPE_CHECKING:
    from gemmascope_plugin.saes.cross_layer_sae import (
        CLTSAE,
        CLTSAEConfig,
        CrossCoderSAE,
        CrossCoderSAEConfig,
    )
    from gemmascope_plugin.saes.matryoshka import (
        MatryoshkaSAE,
        MatryoshkaSAEConfig,
        from_dictionary_learning,
        with_levels,
    )
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
    "check_architecture",
    "coder_of",
    "decode",
    "encode",
    "encode_sparse",
    "from_dictionary_learning",
    "has_bf16_instructions",
    "has_skip",
    "jump",
    "keep_top",
    "layer_weights",
    "level_width",
    "reconstruct",
    "register_all",
    "soft_topk",
    "weights_of",
    "with_levels",
    "write",
    "write_features",
]

_SAELENS_MODULES = (
    *("cross_layer_sae", "matryoshka", "soft", "tree", "tree_config"),
    *("training.cross_layer_training", "training.jumprelu_training"),
    *("training.matryoshka_training", "training.soft_training", "training.tree_training"),
)
"""Where the lazy names are; importing one of these registers its classes with SAELens."""


@cache
def register_all() -> None:
    """Makes every class of this package known to SAELens; calling it again changes nothing."""
    for module in _SAELENS_MODULES:
        import_module(f"{__name__}.{module}")


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in _SAELENS_MODULES:
            home = import_module(f"{__name__}.{module}")
            if hasattr(home, name):
                return getattr(home, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
