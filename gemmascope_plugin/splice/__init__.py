"""Dictionaries inside a model: splicing, editing, steering."""

from gemmascope_plugin.splice.edits import Ablate, Add, Clamp, Edit, Scale
from gemmascope_plugin.splice.hooked_sae import HookedSAE
from gemmascope_plugin.splice.spliced_model import SplicedModel
from gemmascope_plugin.splice.splicing import splice
from gemmascope_plugin.splice.steering import Steering, steer

__all__ = [
    "Ablate",
    "Add",
    "Clamp",
    "Edit",
    "HookedSAE",
    "Scale",
    "SplicedModel",
    "Steering",
    "splice",
    "steer",
]
