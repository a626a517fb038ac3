"""Dictionaries inside a model: splicing, editing, steering, verifying."""

from gemmascope_plugin.splice.edit import Edit
from gemmascope_plugin.splice.edits import Ablate, Add, Clamp, Custom, Project, Replace, Scale
from gemmascope_plugin.splice.hooked_sae import HookedCrossLayer, HookedSAE
from gemmascope_plugin.splice.sampling import SteeringError
from gemmascope_plugin.splice.spliced_model import SplicedModel
from gemmascope_plugin.splice.splicing import splice
from gemmascope_plugin.splice.steering import steer
from gemmascope_plugin.splice.steering_report import Steering, SteeringSweep
from gemmascope_plugin.splice.verify import Report, verify

__all__ = [
    "Ablate",
    "Add",
    "Clamp",
    "Custom",
    "Edit",
    "HookedCrossLayer",
    "HookedSAE",
    "Project",
    "Replace",
    "Report",
    "Scale",
    "SplicedModel",
    "Steering",
    "SteeringError",
    "SteeringSweep",
    "splice",
    "steer",
    "verify",
]
