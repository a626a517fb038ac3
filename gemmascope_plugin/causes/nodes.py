"""Patches as entries of activations, and the model that they are read from, bare or with dictionaries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Shaped

from gemmascope_plugin.causes.components import COMPONENTS
from gemmascope_plugin.errors import UnknownNameError
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.splice import HookedCrossLayer, HookedSAE, splice
from gemmascope_plugin.splice.check_saes import as_list

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


@contextmanager
def patchable(model: HookedModel, component: str, saes: Any) -> Iterator[Any]:
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
    kept = [
        sae.with_error("keep") if isinstance(sae, (HookedSAE, HookedCrossLayer)) else sae
        for sae in as_list(saes)
    ]
    with splice(model, kept) as spliced:
        yield spliced
