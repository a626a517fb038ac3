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
from importlib import import_module
from typing import TYPE_CHECKING, Any

from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import SAE, SAEConfig, TrainingSAE

from gemmascope_plugin.errors import ModelError, UnknownNameError, nearest

if TYPE_CHECKING:
    _Config = SAEConfig
else:
    # A mixin that inherited SAELens' fields would set them back to SAELens' defaults.
    _Config = object

_MODULES = (
    *("jumprelu_training", "matryoshka_training", "soft_training", "tree_training"),
    *("matryoshka", "soft", "tree", "cross_layer_sae", "cross_layer_training"),
)
"""Each registers its classes when it is imported."""


def register_all() -> None:
    """Makes every class of this package known to SAELens; calling it again changes nothing.

    Raises:
        ModelError: SAELens has another class under one of the names.
    """
    for module in _MODULES:
        import_module(f"gemmascope_plugin.saes.{module}")


def check_keys(what: type[Any], given: Iterable[str]) -> None:
    """Refuses settings that a dataclass does not have.

    Args:
        what: The dataclass.
        given: Names of settings.

    Raises:
        UnknownNameError: With the nearest field.
    """
    known = [field.name for field in fields(what)]
    for key in given:
        if key not in known:
            raise UnknownNameError(
                f"{what.__name__} has no setting {key!r}",
                exists=", ".join(known),
                nearest=nearest(key, known),
            )


_READERS = ("architecture", "finetuning_scaling_factor")
"""Keys that SAELens' reader of ``cfg.json`` needs or adds, and that are no settings."""


class StrictConfig(_Config):
    """Mixin for SAELens configs: ``from_dict`` refuses unknown keys."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> Any:
        """SAELens' ``from_dict``.

        Args:
            config_dict: Fields of the config, and what SAELens' reader adds.

        Raises:
            UnknownNameError: Another key.
        """
        check_keys(cls, (key for key in config_dict if key not in _READERS))
        return super().from_dict(config_dict)


def register_class(sae_class: type[SAE[Any]], config_class: type[SAEConfig]) -> None:
    """Teaches SAELens a class, for inference or for training, if it does not know it yet.

    Args:
        sae_class: The class.
        config_class: Its config, which names the architecture.

    Raises:
        ModelError: SAELens has another class of that name.
    """
    registry: Any = (
        SAE_TRAINING_CLASS_REGISTRY if issubclass(sae_class, TrainingSAE) else SAE_CLASS_REGISTRY
    )
    name = config_class.architecture()
    known: Mapping[str, tuple[type[Any], type[Any]]] = registry
    if name in known and _path(known[name][0]) != _path(sae_class):
        raise ModelError(
            f"SAELens already has a class for the architecture {name!r}",
            exists=_path(known[name][0]),
            fix="a version of gemmascope_plugin made for this version of SAELens",
        )
    registry[name] = (sae_class, config_class)


def _path(sae_class: type[Any]) -> str:
    return f"{sae_class.__module__}.{sae_class.__qualname__}"
