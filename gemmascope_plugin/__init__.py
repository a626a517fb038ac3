"""Gemma Scope for SAELens and TransformerLens.

Public names are lazy (PEP 562): importing the package imports none of its floors and no third-party
library; the first use of a name imports the floor that holds it. What fewer people need is on the floors:
``gemmascope_plugin.measures.hierarchy``, ``gemmascope_plugin.tracing.Logit``.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

_HOMES = {
    "catalog": ("SaeSpec", "find", "refresh"),
    "causes": (
        *("Effects", "Task", "activation_patching", "attribution_patching", "cross_entropy"),
        *("custom", "direct_logit_attribution", "edge_attribution", "edge_patching"),
        *("kl_divergence", "logit_diff", "logit_lens", "margin", "path_patching"),
        *("probability", "sequence_logprob"),
    ),
    "circuits": ("discover", "evaluate"),
    "cli.doctor": ("doctor",),
    "demo": ("tiny",),
    "errors": ("GemmaScopeError",),
    "features": ("analyze",),
    "graphs": ("Circuit", "Graph", "Node", "contrast", "union"),
    "loading": ("footprint", "load", "load_suite", "register"),
    "measures": ("compare", "measure"),
    "models": ("load_model",),
    "splice": (
        *("Ablate", "Add", "Clamp", "Custom", "Project", "Replace", "Scale"),
        *("HookedCrossLayer", "HookedSAE", "splice", "steer", "verify"),
    ),
    "tracing": (
        *("check_by_ablation", "head_loadings", "intervene", "qk_attribution", "supernodes"),
        "trace",
    ),
    "training": ("TrainSpec", "train"),
}
"""Floors, and their names that everybody needs; ``__init__.pyi`` tells type checkers."""
_FLOORS = (
    *("catalog", "causes", "circuits", "features", "figures", "graphs", "loading", "measures"),
    *("models", "pages", "saes", "tracing", "training"),
)
"""Floors that are there by name: ``gemmascope_plugin.measures.hierarchy``."""
_HOME_OF = {name: f"{__name__}.{home}" for home, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)  # noqa: PLE0605  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        value = getattr(import_module(_HOME_OF[name]), name)
    elif name in _FLOORS:
        value = import_module(f"{__name__}.{name}")
    elif name == "__version__":
        value = _version()
    else:
        raise AttributeError(_unknown(name))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_FLOORS, "__version__", *globals()})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(__name__)
    except PackageNotFoundError:  # used from a source tree that was never installed
        return "0.0.0+source"


def _unknown(name: str) -> str:
    from gemmascope_plugin.errors import nearest

    text = f"module {__name__!r} has no attribute {name!r}."
    if floor := _floor_of(name):
        return f"{text} It is {__name__}.{floor}.{name}"
    close = nearest(name, __all__)
    hint = f"Did you mean {close}?" if close else f"There is: {', '.join(__all__)}."
    return f"{text} {hint}"


def _floor_of(name: str) -> str | None:
    """The floor that lists a name; its text is searched, as importing it would take seconds."""
    from pathlib import Path

    lists = {floor: Path(__file__).parent / floor / "__init__.py" for floor in _FLOORS}
    return next((floor for floor, path in lists.items() if f'"{name}",' in path.read_text()), None)


class _Package(ModuleType):
    """Keeps a public name from being replaced by the floor of the same name.

    Importing ``gemmascope_plugin.splice`` makes Python bind that module as the attribute
    ``splice``, where the public function belongs. ``from gemmascope_plugin.splice import ...`` is
    unaffected.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOME_OF and isinstance(value, ModuleType):
            return
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
