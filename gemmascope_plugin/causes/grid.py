"""All patches of one sweep: which entries of which activations, in the order of the axes; puts them in.

1. An axis that is named has one patch per coordinate. Along one that is not, a patch covers every
   coordinate at once, several layers included.
2. ``layers``, ``heads``, ``positions``, ``neurons`` restrict both: fewer coordinates along a named axis,
   fewer entries in each patch otherwise.
3. Every copy of the prompts gets its own patch, whatever the number of patches. Those that touch a hook
   name the same dimensions; these are moved to the front, copies before them, so that all patches are one
   indexed assignment. Of a dimension that is not named a patch covers all, or a part that is masked.

Cost: one small object per patch, one copy of the activation per hook.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, SupportsIndex

import torch
from jaxtyping import Bool, Float, Shaped

from gemmascope_plugin.arguments import as_indices
from gemmascope_plugin.causes.components import COMPONENTS
from gemmascope_plugin.errors import (
    EmptySelectionError,
    FeatureIndexError,
    InputError,
    UnknownNameError,
    check_choice,
    check_feature,
)
from gemmascope_plugin.graphs.node import FeatureId
from gemmascope_plugin.models.record import write

_WORDS = {"pos": "position"}
At = int | slice | tuple[int, ...]
"""One coordinate, all of them, or some."""
NamedHooks = list[tuple[str, Callable[..., Any]]]
Features = FeatureId | SupportsIndex | Iterable[Any]
"""Features as people give them: with their sites, or as indices of the only dictionary."""


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


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What of a component is patched, and what separately."""

    axes: Sequence[str] | None = None
    per_position: bool = True
    """Whether components without heads have the axis ``pos``, where ``axes`` does not say."""
    layers: Sequence[int] | None = None
    heads: Sequence[int] | None = None
    positions: Sequence[int] | None = None
    neurons: Sequence[int] | None = None
    features: Features | None = None

    def of(self, dim: str) -> Sequence[int] | None:
        """The coordinates that are wanted along a dimension; None for all."""
        names = {"layer": "layers", "head": "heads", "pos": "positions", "neuron": "neurons"}
        return getattr(self, names[dim])

    def indices(self) -> dict[str, tuple[int, ...] | None]:
        """What is chosen along the dimensions of the model, as plain numbers."""
        names = ("layers", "heads", "positions", "neurons")
        numbers = {name: as_indices(getattr(self, name)) for name in names}
        return {name: None if chosen is None else tuple(chosen) for name, chosen in numbers.items()}

    def axes_of(self, component: str) -> tuple[str, ...]:
        """The named axes, checked."""
        kind = COMPONENTS[component]
        if self.axes is None:
            axes = tuple(a for a in kind.axes if a != "pos" or self.per_position)
        else:
            axes = (self.axes,) if isinstance(self.axes, str) else tuple(self.axes)
        for axis in axes:
            check_choice(f"axis of {component}", axis, kind.all_axes)
        if not axes:
            raise EmptySelectionError(
                f"The effects of {component} have no axis", exists=", ".join(kind.all_axes)
            )
        if len(set(axes)) < len(axes):
            raise UnknownNameError(f"An axis is named twice in {axes}")
        if (
            kind.reads is not None
            and "layer" not in axes
            and len(as_indices(self.layers) or ()) != 1
        ):
            raise UnknownNameError(
                f"{component} is written through another hook, one layer at a time",
                fix='axes=("layer", "pos")',
            )
        if kind.place == "feature" and "feature" not in axes:
            raise UnknownNameError(
                f"The axes {axes} do not tell features apart", fix='axes=("feature", "pos")'
            )
        return axes

    def check(self, component: str) -> None:
        """Refuses choices that the component has no use for."""
        kind = COMPONENTS[component]
        has_layers = kind.place is not None
        offered = {
            "layers": has_layers,
            "heads": "head" in kind.dims,
            "neurons": "neuron" in kind.dims,
            "features": "feature" in kind.dims,
        }
        for name, is_offered in offered.items():
            if getattr(self, name) is not None and not is_offered:
                raise UnknownNameError(
                    f"{component} has no {name} to choose from",
                    exists=", ".join(n for n, is_there in offered.items() if is_there)
                    or "positions",
                )


def component_grid(component: str, choice: Choice, sizes: Mapping[str, int]) -> Grid:
    """The patches of a component of the model itself."""
    kind = COMPONENTS[component]
    dims = (*([kind.place] if kind.place else []), *kind.dims)
    labels = {dim: coordinates(_WORDS.get(dim, dim), choice.of(dim), sizes[dim]) for dim in dims}

    def hooks(at: Mapping[str, Any]) -> tuple[str, ...]:
        if kind.place is None:
            return (kind.hook,)
        chosen = [at["layer"]] if "layer" in at else labels["layer"]
        return tuple(kind.hook.format(layer=layer) for layer in chosen)

    return _grid(component, choice, labels, hooks)


def feature_grid(sites: Mapping[str, Any], choice: Choice, n_pos: int) -> Grid:
    """The patches of features, each at all positions unless ``pos`` is an axis."""
    features = _features(choice.features, tuple(sites))
    if not features:
        raise EmptySelectionError("No feature is named", fix="features=None for all that differ")
    for site, index in features:
        check_choice("dictionary site", site, sites)
        check_feature(index, sites[site].d_sae, site)
    hook = COMPONENTS["feature"].hook
    labels = {"feature": features, "pos": coordinates("position", choice.positions, n_pos)}
    return _grid("feature", choice, labels, lambda at: (hook.format(site=at["feature"].site),))


def _features(features: Any, sites: Sequence[str]) -> tuple[FeatureId, ...]:
    """Features with their sites; plain indices are those of the only dictionary."""
    indices = as_indices(features)
    if indices is None and isinstance(features, Iterable):
        pairs: list[Any] = [features] if isinstance(features, FeatureId) else list(features)
        if all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
            return tuple(FeatureId(*pair) for pair in pairs)
    if indices is None or (indices and len(sites) > 1):
        raise FeatureIndexError(
            f"features={features!r} does not say which features of which dictionary are meant",
            exists=f"dictionaries at {', '.join(sites)}",
            fix=f"features=[FeatureId({sites[0]!r}, 3), ...]",
        )
    return tuple(FeatureId(sites[0], index) for index in indices)


def error_grid(sites: Mapping[str, Any], choice: Choice, n_pos: int) -> Grid:
    """The patches of whole reconstruction errors, one per dictionary site."""
    hook = COMPONENTS["error"].hook

    def hooks(at: Mapping[str, Any]) -> tuple[str, ...]:
        chosen = [at["site"]] if "site" in at else list(sites)
        return tuple(hook.format(site=site) for site in chosen)

    labels = {"site": tuple(sites), "pos": coordinates("position", choice.positions, n_pos)}
    return _grid("error", choice, labels, hooks)


def _grid(
    component: str,
    choice: Choice,
    along: Mapping[str, tuple[Any, ...]],
    hooks: Callable[[Mapping[str, Any]], tuple[str, ...]],
) -> Grid:
    axes = choice.axes_of(component)
    labels = {axis: along[axis] for axis in axes}
    dims = COMPONENTS[component].dims
    covered: dict[str, At] = {
        dim: along[dim] if dim != "feature" and choice.of(dim) is not None else slice(None)
        for dim in dims
    }

    def patch(at: Mapping[str, Any]) -> Patch:
        index = tuple(_entry(at.get(dim, covered[dim])) for dim in dims)
        return Patch(hooks(at), index)

    cells = product(*labels.values())
    patches = tuple(patch(dict(zip(axes, cell, strict=True))) for cell in cells)
    return Grid(component, axes, labels, patches)


def _entry(at: At | FeatureId) -> At:
    return at.feature if isinstance(at, FeatureId) else at


def coordinates(noun: str, chosen: Sequence[int] | None, size: int) -> tuple[int, ...]:
    """Coordinates in the given order; all of them when none are named."""
    if chosen is None:
        return tuple(range(size))
    numbers = as_indices(chosen)
    if numbers is None:
        raise InputError(
            f"{noun}s={chosen!r} are not numbers", fix=f"{noun}s=[0, 1], a range, or {noun}s=None"
        )
    if not numbers:
        raise EmptySelectionError(f"No {noun} is named", fix=f"{noun}s=None for all")
    for index in numbers:
        if not 0 <= index < size:
            raise UnknownNameError(
                f"{noun.capitalize()} {index} does not exist", exists=f"{noun}s 0 to {size - 1}"
            )
    if len(set(numbers)) < len(numbers):
        raise UnknownNameError(f"A {noun} is named twice in {numbers}")
    return tuple(numbers)


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
