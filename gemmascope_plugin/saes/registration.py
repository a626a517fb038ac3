"""What every class of this package that SAELens registers has in common.

1. A config refuses keys that it does not know. SAELens drops them, so that a misspelt setting is
   silently the default.
2. A class is registered once, under its architecture's name; importing its module again, or reloading
   it, changes nothing. A foreign class under the same name is an error.

SAELens' own ``SAE.load_from_disk`` filters a config before any class of ours sees it; call
``load_from_disk`` on the class itself, or ``gemmascope_plugin.load``, to have unknown keys refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import SAE, SAEConfig, TrainingSAE

from gemmascope_plugin.errors import ModelError, UnknownNameError, nearest

if TYPE_CHECKING:
    _Config = SAEConfig
else:
    # A mixin that inherited SAELens' fields would set them back to SAELens' defaults.
    _Config = object


def check_keys(config_class: type[Any], keys: Iterable[str]) -> None:
    """Refuses settings that a dataclass does not have."""
    names = [field.name for field in fields(config_class)]
    for key in keys:
        if key not in names:
            raise UnknownNameError(
                f"{config_class.__name__} has no setting {key!r}",
                exists=", ".join(names),
                nearest=nearest(key, names),
            )


_READERS = ("architecture", "finetuning_scaling_factor")
"""Keys that SAELens' reader of ``cfg.json`` needs or adds, and that are not settings."""


class StrictConfig(_Config):
    """Mixin for SAELens configs: ``from_dict`` refuses unknown keys."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> Any:
        """SAELens' ``from_dict``."""
        check_keys(cls, (key for key in config_dict if key not in _READERS))
        return super().from_dict(config_dict)


def register_class(sae_class: type[SAE[Any]], config_class: type[SAEConfig]) -> None:
    """Teaches SAELens a class, for inference or for training, if it does not know it yet."""
    registry: Any = (
        SAE_TRAINING_CLASS_REGISTRY if issubclass(sae_class, TrainingSAE) else SAE_CLASS_REGISTRY
    )
    name = config_class.architecture()
    classes: Mapping[str, tuple[type[Any], type[Any]]] = registry
    if name in classes and _path(classes[name][0]) != _path(sae_class):
        raise ModelError(
            f"SAELens already has a class for the architecture {name!r}",
            exists=_path(classes[name][0]),
            fix="a version of gemmascope_plugin made for this version of SAELens",
        )
    registry[name] = (sae_class, config_class)


def _path(sae_class: type[Any]) -> str:
    return f"{sae_class.__module__}.{sae_class.__qualname__}"
