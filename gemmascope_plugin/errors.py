"""The error family. Every user mistake raises one of these; nothing warns and goes on.

A message has up to four parts, in this order: what was given, what exists, the nearest match, and
what to type instead. Broken invariants inside the package are asserts, not members of this family.
"""

from __future__ import annotations

import difflib
import operator
from collections.abc import Iterable
from typing import SupportsIndex


class GemmaScopeError(Exception):
    """Base of all errors that a user can cause and mend.

    Args:
        problem: What was given and why it cannot work, one sentence without the full stop.
        exists: What there is instead.
        nearest: The nearest valid value or values.
        fix: What to type or do.

    Example:
        >>> try:
        ...     gs.find(model="gemma-2-tiny", site="residue")
        ... except gs.GemmaScopeError as error:
        ...     print(error)
        no site 'residue'. There is: res, att, mlp, embedding, transcoder, crosscoder, clt. Did
          you mean 'resid' or 'residual' or 'res'? Try: site='resid'
    """

    def __init__(
        self,
        problem: str,
        *,
        exists: str | None = None,
        nearest: str | None = None,
        fix: str | None = None,
    ) -> None:
        parts = [f"{problem}."]
        if exists:
            parts.append(f"There is: {exists}.")
        if nearest:
            parts.append(f"Did you mean {nearest}?")
        if fix:
            parts.append(f"Try: {fix}")
        super().__init__(" ".join(parts))


class InputError(GemmaScopeError):
    """An argument of a kind that the function does not take, or arguments in another order."""


class UnknownNameError(GemmaScopeError):
    """A model, site, release, dictionary, task, label or option that does not exist."""


class AmbiguousSpecError(GemmaScopeError):
    """A query that should name one dictionary names none or several."""


class MissingFileError(GemmaScopeError):
    """A file that is neither in the given folder nor in the cache, and may not be downloaded."""


class BadFileError(GemmaScopeError):
    """A file that is truncated, has wrong members, wrong shapes or values that are not finite."""


class WidthMismatchError(GemmaScopeError):
    """A dictionary whose width does not fit the tensor it is attached to."""


class MissingHookError(GemmaScopeError):
    """A hook point that the model does not have, or that cannot give the tensor asked for."""


class HookNotFiredError(GemmaScopeError):
    """A hook was attached and the forward pass never reached it."""


class FeatureIndexError(GemmaScopeError):
    """A feature index outside the dictionary."""


class EmptySelectionError(GemmaScopeError):
    """An empty prompt, or a mask that leaves no token."""


class TaskError(GemmaScopeError):
    """Clean and corrupted prompts that cannot be compared, or a metric that cannot be read."""


class ModelError(GemmaScopeError):
    """A model that this package cannot work with as it is."""


class MissingExtraError(GemmaScopeError):
    """An optional library that is not installed."""


def nearest(name: str, options: Iterable[str]) -> str | None:
    """The options most like ``name``, at most three, quoted and joined by "or"; None if none is close."""
    lowered = {option.lower(): option for option in options}
    close = difflib.get_close_matches(str(name).lower(), list(lowered), n=3, cutoff=0.5)
    contained = [o for o in lowered if str(name).lower() in o][:3] if not close else []
    return " or ".join(repr(lowered[match]) for match in close or contained) or None


def check_choice(noun: str, value: object, options: Iterable[str]) -> None:
    """Refuses a name that is not one of the options; ``noun`` is what it names, e.g. ``"error mode"``."""
    names = tuple(options)
    if value not in names:
        raise UnknownNameError(
            f"Unknown {noun} {_shown(value)}",
            exists=", ".join(names),
            nearest=nearest(value, names) if isinstance(value, str) else None,
        )


def _shown(value: object) -> str:
    """A value in an error; what would fill the screen, such as a model, by its class."""
    text = repr(value)
    return text if len(text) <= 80 else f"(a {type(value).__name__})"


def check_feature(index: object, d_sae: int, where: str) -> None:
    """Refuses a feature index outside a dictionary."""
    if not isinstance(index, SupportsIndex) or not 0 <= operator.index(index) < d_sae:
        raise FeatureIndexError(
            f"Feature {index!r} does not exist in the dictionary at {where}",
            exists=f"features 0 to {d_sae - 1}",
        )


def number_of(n: int, noun: str) -> str:
    """``1 dictionary``, ``2 dictionaries``, ``13 biases``."""
    if n == 1:
        return f"1 {noun}"
    if noun.endswith("y"):
        return f"{n} {noun[:-1]}ies"
    return f"{n} {noun}{'es' if noun.endswith('s') else 's'}"


def shorten(options: Iterable[object], limit: int = 8) -> str:
    """A readable list of options: the first few and how many more."""
    items = [str(option) for option in options]
    head = ", ".join(items[:limit])
    return f"{head} and {len(items) - limit} more" if len(items) > limit else head
