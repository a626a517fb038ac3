"""Learning a dictionary."""

from gemmascope_plugin.training.activations import collect_activations
from gemmascope_plugin.training.train import Recipe, train_dictionary

__all__ = ["Recipe", "collect_activations", "train_dictionary"]
