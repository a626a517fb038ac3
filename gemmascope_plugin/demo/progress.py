"""What the demos share: a progress bar that names the running step, and the versions for a footer."""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import ParamSpec, TypeVar

LIBRARIES = ("gemmascope_plugin", "torch", "transformer-lens", "sae-lens", "transformers")
_BAR = "{desc:<32} |{bar}| {n_fmt}/{total_fmt} {elapsed}"

P = ParamSpec("P")
T = TypeVar("T")


def versions() -> str:
    """Python's and the libraries' versions, in one line."""
    names = [f"{name} {_version(name)}" for name in LIBRARIES]
    return ", ".join([f"Python {platform.python_version()}", *names])


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # this package itself, used from a source tree
        return "from source"


class Steps:
    """A progress bar that names the running step.

    Args:
        total: Number of steps.
        progress: Whether it is shown.
    """

    def __init__(self, total: int, progress: bool) -> None:
        from tqdm.auto import tqdm

        self._bar = tqdm(total=total, disable=not progress, bar_format=_BAR)

    def __call__(self, name: str, run: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs one step under its name."""
        self._bar.set_description_str(name)
        result = run(*args, **kwargs)
        self._bar.update()
        return result

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
