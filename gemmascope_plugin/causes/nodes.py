"""Patches as entries of activations, hooks that put them in, and the model, bare or with dictionaries.

Every copy of the prompts gets its own patch, whatever the number of patches:

1. Patches of one sweep that touch a hook name the same dimensions. Those are moved to the front, copies
   before them, so that all patches are one indexed assignment.
2. Where a patch names no coordinate of a dimension it covers all of it, or a part that is masked.

Cost: one copy of the activation per hook.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped

from gemmascope_plugin.causes.components import COMPONENTS
from gemmascope_plugin.errors import UnknownNameError
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.models.record import write
from gemmascope_plugin.splice import HookedCrossLayer, HookedSAE, splice
from gemmascope_plugin.splice.hooked_sae import Saes, as_list
from gemmascope_plugin.splice.hooked_site import HookedSite
from gemmascope_plugin.splice.spliced_model import SplicedModel

Runner = HookedModel | SplicedModel
"""A model, or one with dictionaries spliced in."""
At = int | slice | tuple[int, ...]
"""One coordinate, all of them, or some."""


@dataclass(frozen=True)
class Patch:
    """One intervention: entries that are replaced, at one hook or at several."""

    hooks: tuple[str, ...]
    index: tuple[At, ...]
    """Index after the batch axis, the same at every hook: ``(pos,)``, ``(all, head)`` or the like."""

    @property
    def hook(self) -> str:
        """The only hook."""
        assert len(self.hooks) == 1, "the patch covers several layers"
        return self.hooks[0]

    def entries(self, x: Shaped[torch.Tensor, "prompt ..."]) -> Shaped[torch.Tensor, "prompt ..."]:
        """What the patch covers of an activation at one of its hooks."""
        for axis, at in reversed(list(enumerate(self.index, start=1))):
            if isinstance(at, int):
                x = x.select(axis, at)
            elif isinstance(at, tuple):
                x = x.index_select(axis, torch.tensor(at, device=x.device))
        return x


@dataclass(frozen=True)
class Grid:
    """All interventions of one sweep, in the order of the flattened axes."""

    component: str
    axes: tuple[str, ...]
    labels: dict[str, tuple[Any, ...]]
    patches: tuple[Patch, ...]

    @property
    def hooks(self) -> list[str]:
        """The hooks that the patches touch."""
        return list(dict.fromkeys(hook for patch in self.patches for hook in patch.hooks))

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of coordinates along each axis."""
        return tuple(len(self.labels[axis]) for axis in self.axes)

    def sums(
        self, products: Mapping[str, Float[torch.Tensor, "prompt ..."]]
    ) -> Float[torch.Tensor, "patch prompt"]:
        """Sum of a quantity per entry over what each patch covers, prompt by prompt."""
        sums = []
        for patch in self.patches:
            parts = [_row_sums(patch.entries(products[hook])) for hook in patch.hooks]
            sums.append(torch.stack(parts).sum(0))
        return torch.stack(sums)


def _row_sums(x: Float[torch.Tensor, "prompt ..."]) -> Float[torch.Tensor, " prompt"]:
    return x.reshape(len(x), -1).sum(1)


def acts_hook(site: str) -> str:
    """Hook of the feature activations of the dictionary at ``site``."""
    return COMPONENTS["feature"].hook.format(site=site)


def needs_dictionaries(component: str) -> bool:
    """Whether a component belongs to dictionaries and not to the model itself."""
    return "{site}" in COMPONENTS[component].hook


def sites_in(runner: Runner) -> Mapping[str, HookedSite]:
    """The sites of the dictionaries that are spliced in, by name."""
    return runner.sites if isinstance(runner, SplicedModel) else {}


def excluded(sites: Iterable[HookedSite]) -> tuple[str | int, ...]:
    """The tokens that any of the dictionaries leaves alone."""
    return tuple(dict.fromkeys(token for site in sites for token in site.exclude))


@contextmanager
def patchable(model: HookedModel, component: str, saes: Saes) -> Iterator[Runner]:
    """The model itself, or spliced with the error kept when features or errors are to be patched."""
    if not needs_dictionaries(component):
        yield model
        return
    if saes is None:
        raise UnknownNameError(
            f'component="{component}" needs dictionaries',
            fix="saes=[gemmascope_plugin.load(spec)]",
        )
    # A dictionary that was wrapped for another error mode is wrapped again: here the error is kept.
    hooked = [
        sae.with_error("keep") if isinstance(sae, (HookedSAE, HookedCrossLayer)) else sae
        for sae in as_list(saes)
    ]
    with splice(model, hooked) as spliced:
        yield spliced


NamedHooks = list[tuple[str, Callable[..., Any]]]


def inserting(chunk: Sequence[Patch], other: Mapping[str, torch.Tensor]) -> NamedHooks:
    """Hooks that give copy ``j`` of the prompts the patch ``chunk[j]``."""
    by_hook: dict[str, list[int]] = {}
    for copy, patch in enumerate(chunk):
        for hook in patch.hooks:
            by_hook.setdefault(hook, []).append(copy)
    return [
        (name, _replace(copies, [chunk[copy].index for copy in copies], other[name]))
        for name, copies in by_hook.items()
    ]


def inserted(
    x: Float[torch.Tensor, "row ..."],
    copies: Sequence[int],
    indices: Sequence[tuple[At, ...]],
    other: Float[torch.Tensor, "prompt ..."],
) -> Float[torch.Tensor, "row ..."]:
    """A copy of ``x`` with patches in some copies of the prompts."""
    out = x.clone()
    named = [dim for dim, at in enumerate(indices[0]) if isinstance(at, int)]
    where = [torch.tensor([index[dim] for index in indices], device=x.device) for dim in named]
    rows = out.unflatten(0, (-1, len(other)))
    rows = rows.movedim([2 + dim for dim in named], list(range(1, 1 + len(named))))
    new = other.to(x.device, x.dtype).movedim([1 + dim for dim in named], list(range(len(named))))
    # [patch, prompt, dimensions that are not named]
    new = new[tuple(where)] if named else new.expand(len(copies), *new.shape)
    place = (torch.tensor(list(copies), device=x.device), *where)
    inside = _inside(indices[0], x)
    rows[place] = new if inside is None else torch.where(inside, new, rows[place])
    return out


def _inside(index: tuple[At, ...], x: torch.Tensor) -> Bool[torch.Tensor, "*dims"] | None:
    """True at what a patch covers of the dimensions that it does not name; None for all of it."""
    if not any(isinstance(at, tuple) for at in index):
        return None
    mask = torch.ones((), dtype=torch.bool, device=x.device)
    for axis, size in enumerate(x.shape[1:]):
        at = index[axis] if axis < len(index) else slice(None)
        if isinstance(at, int):
            continue
        along = torch.zeros(size, dtype=torch.bool, device=x.device)
        along[list(at) if isinstance(at, tuple) else at] = True
        mask = mask[..., None] & along
    return mask


def _replace(
    copies: Sequence[int], indices: Sequence[tuple[At, ...]], other: torch.Tensor
) -> Callable[..., torch.Tensor]:
    return write(lambda x: inserted(x, copies, indices, other))
