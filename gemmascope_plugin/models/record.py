"""Hooks in a model, for the length of a block: what passes leave there, and what is put there.

1. ``hooking`` attaches functions at hook points under a number of its own, and at the end removes what
   has this number: also what was attached when Ctrl-C came before it was noted, and when Ctrl-C comes
   while hooks are being removed, which leaves them behind in TransformerLens' own ``hooks()``.
2. Hooks belong to the model, not to a thread: a second thread that ran the model meanwhile would get
   them too. ``claim`` refuses it, naming what the first one does.
3. Models that ``torch.compile`` has changed are refused: compiled code checks neither for new hooks on
   submodules (``skip_nnmodule_hook_guards``) nor lets them return another tensor, so a dictionary
   spliced into it would silently do nothing.
4. There is one capture and one put for all floors. ``record`` makes passes of its own and stops each
   after the last activation that is asked for. In passes that somebody else makes, ``keeping`` and
   ``keep`` note activations, and ``put`` and ``write`` replace them.

Cost: a few microseconds a hook; activations are kept as they are, not copied.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import count
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int

from gemmascope_plugin.errors import HookNotFiredError, ModelError, shorten
from gemmascope_plugin.models.asked import no_logits
from gemmascope_plugin.models.points import hook_point
from gemmascope_plugin.models.protocol import HookedModel, Runner
from gemmascope_plugin.types import HookFn, Hooks

_LEVELS = count(-2, -1)
"""Numbers of blocks; those of TransformerLens are not negative."""
_GUARD = threading.Lock()
_CLAIMS: WeakKeyDictionary[Any, list[tuple[int, str]]] = WeakKeyDictionary()
"""Model to the threads that have hooks in it, and what for, the outermost first."""


@contextmanager
def hooking(runner: Runner, fwd_hooks: Hooks = (), bwd_hooks: Hooks = ()) -> Iterator[Any]:
    """Attaches functions to hook points of a model and removes them at the end of the block.

    Something with hooks of its own, as a model with dictionaries, is asked itself.
    """
    points = getattr(runner, "hook_dict", None)
    if points is None:
        with runner.hooks(fwd_hooks=fwd_hooks, bwd_hooks=bwd_hooks):
            yield runner
        return
    model = cast("HookedModel", runner)
    hooks = [(hook_point(model, name, points), fn, "fwd") for name, fn in fwd_hooks]
    hooks += [(hook_point(model, name, points), fn, "bwd") for name, fn in bwd_hooks]
    with claim(model, "a run with hooks"), attached(hooks):
        yield runner


@contextmanager
def attached(hooks: Sequence[tuple[Any, HookFn, Any]]) -> Iterator[None]:
    """Functions at hook points inside the block: point, function, and ``"fwd"`` or ``"bwd"``."""
    level = next(_LEVELS)
    try:
        for point, fn, way in hooks:
            point.add_hook(fn, dir=way, level=level)
        yield
    finally:
        _remove({id(point): point for point, _, _ in hooks}, level)


def _remove(points: dict[int, Any], level: int) -> None:
    """Removes the hooks of a block; an interruption is raised only when all are gone."""
    interruption = None
    while points:
        try:
            key, point = next(iter(points.items()))
            for handles in (point.fwd_hooks, point.bwd_hooks):
                for handle in [handle for handle in handles if handle.context_level == level]:
                    handle.hook.remove()
                    handles[:] = [h for h in handles if h is not handle]
            del points[key]
        except KeyboardInterrupt as error:
            interruption = error
    if interruption is not None:
        raise interruption


@contextmanager
def claim(model: HookedModel, purpose: str) -> Iterator[None]:
    """Inside the block only this thread may put hooks into the model; it may do so again and again.

    ``purpose`` is what the block does, for the error that another thread gets.
    """
    entry = (threading.get_ident(), purpose)
    with _GUARD:
        entries = _CLAIMS.setdefault(model, [])
        others = [text for thread, text in entries if thread != entry[0]]
        if others:
            raise ModelError(
                f"Another thread is inside {others[0]} of this model, and hooks of one thread run in "
                "the other's passes too",
                fix="one thread after the other, or a second copy of the model",
            )
        entries.append(entry)
    try:
        yield
    finally:
        with _GUARD:
            entries.remove(entry)


_FIX = "the model as it was before torch.compile (compiled._orig_mod, or load it again)"


def refuse_compiled(model: HookedModel) -> None:
    """Refuses a compiled model, and one that has a compiled part."""
    if hasattr(model, "_orig_mod"):
        raise ModelError("The model was compiled, hooks in it would not run", fix=_FIX)
    modules = model.named_modules() if isinstance(model, torch.nn.Module) else ()
    for name, module in modules:
        if getattr(module, "_compiled_call_impl", None) or hasattr(module, "_orig_mod"):
            raise ModelError(
                f"{repr(name) if name else 'The model'} was compiled, hooks in it would not run",
                fix=_FIX,
            )


def refuse_compiling() -> None:
    """Refuses to run while ``torch.compile`` traces the model."""
    if torch.compiler.is_compiling():
        raise ModelError(
            "A model with dictionaries in it cannot be compiled",
            fix="run it without torch.compile inside the splice block",
        )


def refuse_unseen() -> None:
    """Refuses a block in which the model never ran although this process holds compiled code.

    A *function* that calls the model may have been compiled before the block. What it runs has no
    dictionary in it, and nothing in the model tells that it ran.
    """
    dynamo = sys.modules.get("torch._dynamo.utils")
    if dynamo is not None and dynamo.counters["stats"]["unique_graphs"]:
        raise HookNotFiredError(
            "The model never ran inside the splice block, and this process has compiled code, in "
            "which dictionaries do not run",
            fix="call the model itself, not a function compiled with torch.compile",
        )


Key = TypeVar("Key")


def record(
    runner: Runner,
    tokens: Int[torch.Tensor, "batch pos"],
    names: Sequence[str],
    *,
    fwd_hooks: Hooks = (),
) -> dict[str, torch.Tensor]:
    """Activations by hook name; ``fwd_hooks`` are attached before, so what is read is what they leave.

    Passes of a model end where the last activation has been read; those of what runs one as its
    ``model``, as with dictionaries, are whole.
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
    """Refuses a pass that left out hooks that were to be read."""
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
    """Hook that notes what ``of`` makes of an activation; None for the activation with its gradient."""

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
