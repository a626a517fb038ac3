"""Learning a dictionary."""

from gemmascope_plugin.training.architectures import ARCHITECTURES, Architecture
from gemmascope_plugin.training.buckets import collect_activations
from gemmascope_plugin.training.driver import train, train_many
from gemmascope_plugin.training.presets import PRESETS, preset_spec
from gemmascope_plugin.training.run import TrainingStoppedError
from gemmascope_plugin.training.store import ActivationStore, store_activations
from gemmascope_plugin.training.train_spec import TrainSpec

__all__ = [
    "ARCHITECTURES",
    "PRESETS",
    "ActivationStore",
    "Architecture",
    "TrainSpec",
    "TrainingStoppedError",
    "collect_activations",
    "preset_spec",
    "store_activations",
    "train",
    "train_many",
]
