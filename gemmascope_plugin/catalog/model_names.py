"""Names of models: what people type for a model of the catalog.

1. ``google/gemma-3-4b-it``, ``gemma-3-4b-it`` and ``4b-it`` are one model; case does not matter.
2. The pretrained models of Gemma 3 end in ``-pt`` (``gemma-3-4b`` is understood), but for the 270M
   (``gemma-3-270m-pt`` is understood); those of Gemma 2 have no ending (``gemma-2-2b-pt`` is understood).
3. A short name that two models share, ``27b``, is refused.
"""

from __future__ import annotations

from collections.abc import Iterable

from gemmascope_plugin.errors import UnknownNameError

_OWNERS = ("google/", "openai-community/")
_FAMILIES = ("gemma-2-", "gemma-3-")
_OTHER_NAMES = {"gpt2-small": ("gpt2",)}


def resolve_model(given: str, names: Iterable[str]) -> str | None:
    """The model that is meant.

    Args:
        given: What was typed.
        names: Models of the catalog.

    Returns:
        One of ``names``; None when none is meant.

    Raises:
        UnknownNameError: Several could be meant.
    """
    word = given.lower().replace("gemma-v3-", "gemma-3-")
    for owner in _OWNERS:
        word = word.removeprefix(owner)
    options = sorted(set(names))
    if word in options:
        return word
    meant = [name for name in options if word in _other_names(name)]
    if len(meant) > 1:
        raise UnknownNameError(
            f"model {given!r} could be several",
            exists=", ".join(meant),
            fix=" or ".join(f"model={name!r}" for name in meant),
        )
    return meant[0] if meant else None


def _other_names(name: str) -> set[str]:
    full = {name, *_OTHER_NAMES.get(name, ())}
    if name.startswith("gemma-3-") and name.endswith("-pt"):
        full.add(name.removesuffix("-pt"))
    elif name.startswith(_FAMILIES) and not name.endswith("-it"):
        full.add(f"{name}-pt")
    short = {each.removeprefix(family) for each in full for family in _FAMILIES}
    return full | short
