"""What passes leave at hooks, and what is put there: one capture and one put for all floors.

:func:`record` makes passes of its own and stops each after the last activation that is asked for. In
passes that somebody else makes, :func:`keeping` and :func:`keep` note activations, and :func:`put` and
:func:`write` replace them.

Cost: none beside the pass; activations are kept as they are, not copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping, Sequence
from contextlib import nullcontext
from typing import TypeVar

import torch
from jaxtyping import Int

from gemmascope_plugin.errors import HookNotFiredError, shorten
from gemmascope_plugin.models.asked import no_logits
from gemmascope_plugin.models.hooks import hooking
from gemmascope_plugin.models.protocol import Runner
from gemmascope_plugin.types import Hooks

Key = TypeVar("Key")


def record(
    runner: Runner,
    tokens: Int[torch.Tensor, "batch pos"],
    names: Sequence[str],
    *,
    fwd_hooks: Hooks = (),
) -> dict[str, torch.Tensor]:
    """Activations by hook name.

    Args:
        runner: A model, whose passes end where the last activation has been read; or what runs one as its
            ``model``, as with dictionaries, whose passes are whole.
        tokens: Token ids.
        names: Hooks to read.
        fwd_hooks: Attached before, so that what is read is what they leave.

    Raises:
        HookNotFiredError: A hook that a pass never reached.
    """
    names = list(dict.fromkeys(names))
    acts: dict[str, torch.Tensor] = {}
    ends_early = hasattr(runner, "hook_dict")

    def stop(x: torch.Tensor, hook: object) -> None:
        if len(acts) == len(names):
            raise _Enough

    readers = [hook for name in names for hook in ((name, keep(acts, name)), (name, stop))]
    readers = readers if ends_early else keeping(acts, names)
    with hooking(runner, fwd_hooks=[*fwd_hooks, *readers]):
        try:
            if names:
                with torch.no_grad(), nullcontext() if ends_early else no_logits(runner):
                    runner(tokens)
        except _Enough:
            pass
    check_reached(acts, names)
    return acts


class _Enough(Exception):  # noqa: N818
    """Ends a forward pass; never leaves this file."""


def check_reached(acts: MutableMapping[str, torch.Tensor], names: Iterable[str]) -> None:
    """Refuses a pass that left out hooks that were to be read.

    Raises:
        HookNotFiredError: With their names.
    """
    silent = [name for name in names if name not in acts]
    if silent:
        raise HookNotFiredError(f"The model ran but never reached {shorten(silent)}")


def keeping(
    acts: MutableMapping[str, torch.Tensor], names: Iterable[str]
) -> list[tuple[str, Callable[..., None]]]:
    """Hooks that note activations by name."""
    return [(name, keep(acts, name)) for name in dict.fromkeys(names)]


def keep(
    acts: MutableMapping[Key, torch.Tensor],
    key: Key,
    of: Callable[[torch.Tensor], torch.Tensor] | None = torch.Tensor.detach,
) -> Callable[..., None]:
    """Hook that notes an activation.

    Args:
        acts: Where.
        key: Under which name.
        of: What is noted of it; None for the activation with its gradient.
    """

    def hook_fn(x: torch.Tensor, hook: object) -> None:
        acts[key] = x if of is None else of(x)

    return hook_fn


def put(value: torch.Tensor) -> Callable[..., torch.Tensor]:
    """Hook that gives an activation this value, whatever it is."""
    return write(lambda x: value)


def write(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Hook that gives an activation the value that a function makes of it."""

    def hook_fn(x: torch.Tensor, hook: object) -> torch.Tensor:
        return change(x)

    return hook_fn
