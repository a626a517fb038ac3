"""Learning a dictionary."""

from gemmascope_plugin.training.activations import collect_activations
from gemmascope_plugin.training.export import folder_name, write_npz
from gemmascope_plugin.training.train import Recipe, train_dictionary

__all__ = ["Recipe", "collect_activations", "folder_name", "train_dictionary", "write_npz"]
