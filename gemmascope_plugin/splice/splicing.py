"""Puts dictionaries into a TransformerLens model for the length of a ``with`` block.

1. Everything is checked before anything is touched: hooks, widths, edits.
2. Each dictionary gets one forward hook at its output point and, if its input is another tensor, one
   at its input point; where the model class has no hook with that tensor, at the one before the
   norm's gain, which is then applied (``models/sites.py``). No module is replaced, so other hooks at
   the same points keep working; several dictionaries at one point run in the given order.
3. At exit every hook is removed, exceptions included. A dictionary whose hook never fired although
   the model ran is an error.

Cost: that of :class:`HookedSAE` per site and pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from gemmascope_plugin.errors import (
    HookNotFiredError,
    UnknownNameError,
    WidthMismatchError,
    shorten,
)
from gemmascope_plugin.models import hook_point, special_ids
from gemmascope_plugin.models.points import width_at
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.models.sites import reading
from gemmascope_plugin.splice.edits import Edit
from gemmascope_plugin.splice.hooked_sae import HookedSAE
from gemmascope_plugin.splice.spliced_model import SplicedModel
from gemmascope_plugin.splice.token_mask import TokenMask
from gemmascope_plugin.types import ErrorMode

Saes = Any
"""One SAE, transcoder or :class:`HookedSAE`, a sequence of them, or a mapping whose values they are."""


@contextmanager
def splice(
    model: HookedModel,
    saes: Saes,
    *,
    error: ErrorMode = "keep",
    exclude: Sequence[str | int] = ("bos", "eos", "pad"),
    edits: Sequence[Edit] | Edit = (),
) -> Iterator[SplicedModel]:
    """Runs dictionaries at their sites inside the block and leaves the model as it was.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``.
        saes: Dictionaries from :func:`gemmascope_plugin.load`, one or several; a :class:`HookedSAE`
            keeps its own ``error`` and ``exclude``.
        error: ``"keep"``, ``"drop"`` or ``"detach"`` the reconstruction error.
        exclude: Special tokens that the dictionaries leave alone.
        edits: Feature edits, applied in order at every forward pass.

    Yields:
        The spliced model: call it, or ``run_with_cache``, ``run_with_hooks``, ``generate``.

    Raises:
        MissingHookError: The model lacks a dictionary's hook, or its norms were folded and the
            dictionary reads one with its gain.
        WidthMismatchError: A dictionary of another width than the tensor at its site.
        FeatureIndexError: An edit names a feature outside its dictionary.
        HookNotFiredError: The model ran and a dictionary was never reached.
    """
    hooked = [_as_hooked(sae, error, exclude) for sae in as_list(saes)]
    by_sae = _assign(hooked, [edits] if isinstance(edits, Edit) else list(edits))
    for sae in hooked:
        _check_site(model, sae)
    mask = TokenMask(model)
    fired = [0] * len(hooked)
    with ExitStack() as stack:
        mask.attach()
        stack.callback(mask.detach)
        for i, sae in enumerate(hooked):
            _attach(stack, model, sae, by_sae[i], mask, fired, i)
        anywhere = all(edit.positions is None for mine in by_sae for edit in mine)
        yield SplicedModel(model, hooked, use_past_kv_cache=anywhere)
    if mask.ran:
        silent = [sae.hook_out for sae, times in zip(hooked, fired, strict=True) if not times]
        if silent:
            raise HookNotFiredError(
                f"The model ran but never reached {shorten(silent)}",
                fix="run past that layer (stop_at_layer), or splice fewer dictionaries",
            )


def as_list(saes: Saes) -> list[Any]:
    """One dictionary, a sequence or a mapping as a list.

    Raises:
        UnknownNameError: Nothing was given.
    """
    if isinstance(saes, torch.nn.Module) or not isinstance(saes, Iterable):
        return [saes]
    listed = list(saes.values()) if isinstance(saes, Mapping) else list(saes)
    if not listed:
        raise UnknownNameError(
            "No dictionary was given to splice", fix="saes=[gemmascope_plugin.load(spec)]"
        )
    return listed


def _as_hooked(sae: Any, error: ErrorMode, exclude: Sequence[str | int]) -> HookedSAE:
    if not isinstance(sae, torch.nn.Module):
        raise UnknownNameError(
            f"A {type(sae).__name__} is not a loaded dictionary", fix="gemmascope_plugin.load(spec)"
        )
    return sae if isinstance(sae, HookedSAE) else HookedSAE(sae, error=error, exclude=exclude)


def _assign(hooked: list[HookedSAE], edits: list[Edit]) -> list[list[Edit]]:
    """The edits of each dictionary, checked."""
    by_sae: list[list[Edit]] = [[] for _ in hooked]
    for edit in edits:
        matches = [i for i, sae in enumerate(hooked) if _is_meant(edit.sae, sae)]
        if len(matches) != 1:
            raise UnknownNameError(
                f"{type(edit).__name__}(sae={_name(edit.sae)}) fits {len(matches)} of the spliced "
                "dictionaries",
                exists=shorten(repr(sae.hook_out) for sae in hooked),
                fix="sae=<the object that you spliced>",
            )
        sae = hooked[matches[0]]
        edit.check(sae.d_sae, sae.hook_out)
        by_sae[matches[0]].append(edit)
    return by_sae


def _is_meant(named: Any, sae: HookedSAE) -> bool:
    if isinstance(named, str):
        return named == sae.hook_out
    return named is None or named is sae or named is sae.sae


def _name(named: Any) -> str:
    return repr(named) if named is None or isinstance(named, str) else type(named).__name__


def _check_site(model: HookedModel, sae: HookedSAE) -> None:
    widths = ((sae.hook_in, sae.sae.W_enc.shape[0]), (sae.hook_out, sae.sae.W_dec.shape[1]))
    special_ids(model, sae.exclude)
    hook_point(model, sae.hook_out)
    reading(model, sae.hook_in)
    for name, width in widths:
        there = width_at(model, name)
        if there is not None and there != width:
            raise WidthMismatchError(
                f"The dictionary for {sae.hook_out} has width {width}, the model's {name} has "
                f"{there}",
                fix="a dictionary of this model; this one is for "
                f"{sae.sae.cfg.metadata.model_name or 'an unnamed model'}",
            )


def _attach(
    stack: ExitStack,
    model: HookedModel,
    sae: HookedSAE,
    edits: list[Edit],
    mask: TokenMask,
    fired: list[int],
    index: int,
) -> None:
    """Adds the hooks of one dictionary; the stack removes them."""
    captured: list[torch.Tensor] = []
    read = reading(model, sae.hook_in)

    def capture(x: torch.Tensor, hook: Any) -> None:
        captured[:] = [read(x)]

    def replace(y: torch.Tensor, hook: Any) -> torch.Tensor:
        if sae.is_transcoder and not captured:
            raise HookNotFiredError(
                f"The transcoder's input {sae.hook_in} did not fire before {sae.hook_out}"
            )
        fired[index] += 1
        x = captured.pop() if sae.is_transcoder else y
        return sae(x, y, mask.keep(sae, y), edits)

    if sae.is_transcoder:
        _add(stack, hook_point(model, read.hook), capture)
    _add(stack, hook_point(model, sae.hook_out), replace)


def _add(stack: ExitStack, point: Any, fn: Any) -> None:
    # permanent, so that reset_hooks() and run_with_hooks() inside the block leave it in place
    point.add_hook(fn, is_permanent=True)
    handle = point.fwd_hooks[-1]

    def remove() -> None:
        handle.hook.remove()
        point.fwd_hooks = [h for h in point.fwd_hooks if h is not handle]

    stack.callback(remove)
