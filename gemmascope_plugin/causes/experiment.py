"""What exact and first-order patching share: both runs, the grid of nodes, and the form of the result.

1. Clean and corrupted prompts are run once; the activations at the nodes' hooks are kept.
2. The base run is the corrupted one (denoising: clean values are inserted) or the clean one (noising).
3. What is inserted is the other run's activation, or what ``replacement`` makes of it.
4. With dictionaries, they are spliced in with their error kept for as long as the experiment lasts.
5. Where passes can be run again from any layer and position (``replayed.py``), both runs come from there.

Cost: a forward pass over the prompts of the base run and one over the ends of the others, or two each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from jaxtyping import Bool, Float, Int

from gemmascope_plugin.causes.bound_task import BoundTask
from gemmascope_plugin.causes.components import (
    COMPONENTS,
    Runner,
    acts_hook,
    excluded,
    layer_of,
    needs_dictionaries,
    patchable,
    sites_in,
    sizes_of,
)
from gemmascope_plugin.causes.effects import Effects
from gemmascope_plugin.causes.grid import (
    Choice,
    Grid,
    Patch,
    component_grid,
    coordinates,
    error_grid,
    feature_grid,
)
from gemmascope_plugin.causes.memory import Limit, footprint
from gemmascope_plugin.causes.method import unused_option
from gemmascope_plugin.causes.replace import PatchReplacement, check_replacement, replaced
from gemmascope_plugin.causes.replayed import Part, joined, replayed
from gemmascope_plugin.causes.task import Task
from gemmascope_plugin.errors import EmptySelectionError, check_choice
from gemmascope_plugin.graphs.node import FeatureId
from gemmascope_plugin.models import token_strings
from gemmascope_plugin.models.protocol import HookedModel, check_finite
from gemmascope_plugin.splice.hooked_sae import Saes
from gemmascope_plugin.splice.hooked_site import HookedSite
from gemmascope_plugin.types import Direction


@dataclass(frozen=True)
class Experiment:
    """A task on a model, ready to be patched."""

    model: HookedModel
    runner: Runner
    """The model, or the model with dictionaries spliced in."""
    bound: BoundTask
    grid: Grid
    base: Int[torch.Tensor, "prompt pos"]
    """Tokens of the run that is patched."""
    here: dict[str, torch.Tensor]
    """Activations of that run, by hook name."""
    other: dict[str, torch.Tensor]
    """What is inserted there: the other run's activations, unless ``replacement`` says otherwise."""
    metadata: dict[str, Any]
    """What the result will say of itself, the metric at both ends among it."""
    base_by_prompt: Float[torch.Tensor, " prompt"]
    """The metric of the run that is patched, on the CPU."""
    rows: int
    """Prompts in one forward pass."""
    parts: tuple[Part, ...] = ()
    """Its prompts, ready to be run again."""

    @property
    def base_metric(self) -> float:
        """Mean metric of the run that is patched."""
        denoising = self.metadata["direction"] == "denoising"
        return self.metadata["metric_corrupt" if denoising else "metric_clean"]

    def changes(self, patch: Patch) -> bool:
        """Whether the patch inserts anything that is not there already."""
        return any(
            not torch.equal(patch.entries(self.here[hook]), patch.entries(self.other[hook]))
            for hook in patch.hooks
        )

    def effects(
        self,
        values: Float[torch.Tensor, " patch"],
        method: str,
        *,
        by_prompt: Float[torch.Tensor, "patch prompt"] | None = None,
    ) -> Effects:
        """Changes of the metric per patch, in the shape of the grid."""
        check_finite(values, f"The effect by {method}", self.model)
        shape, metadata = self.grid.shape, {**self.metadata, "method": method}
        each = None if by_prompt is None else self.bound.fold(by_prompt).reshape(*shape, -1)
        return Effects(values.reshape(shape), self.grid.axes, self.grid.labels, metadata, each)


def _order(replacement: str, seed: int | None) -> int:
    """The seed of the order in which prompts are resampled."""
    if seed is not None and replacement != "resample":
        raise unused_option(
            "seed",
            f"replacement={replacement!r}, which draws nothing",
            fix='replacement="resample", or without seed=',
        )
    return 0 if seed is None else seed


@contextmanager
def experiment(
    model: HookedModel,
    task: Task,
    component: str,
    choice: Choice | None = None,
    *,
    direction: Direction,
    saes: Saes = None,
    replacement: PatchReplacement = "other",
    seed: int | None = None,
    limit: Limit | None = None,
) -> Iterator[Experiment]:
    """Checks everything, runs both prompts, and splices for the length of the block.

    ``choice`` says what is patched, and what separately; where no features are chosen, they are all that
    the replacement changes. Without a limit all prompts go in one pass.
    """
    check_choice("component", component, COMPONENTS)
    check_choice("direction", direction, get_args(Direction))
    check_replacement(replacement, component)
    order = _order(replacement, seed)
    choice = Choice() if choice is None else choice
    choice.check(component)
    bound = task.bind(model)
    denoising = direction == "denoising"
    base, away = bound.runs(direction)
    with patchable(model, component, saes) as runner:
        sizes = sizes_of(model, component, base.shape[1])
        sites = _sites(runner, component, choice.layers, sizes["layer"])
        grid = _grid(component, sites, choice, sizes)
        hooks = [acts_hook(site) for site in sites] if grid is None else grid.hooks
        need = footprint(model, component, bound, hooks, sites)
        rows = len(base) if limit is None else limit.rows(need)

        def insert(x: torch.Tensor) -> torch.Tensor:
            return replaced(
                x,
                bound.mask,
                replacement,
                pos_axis=1 + COMPONENTS[component].dims.index("pos"),
                seed=order,
                rows_per_prompt=bound.metric.rows_per_prompt,
            )

        parts = _parts(runner, bound, component, hooks, (base, away), rows)
        metrics = [_joined_metric(parts, is_other=(clean == denoising)) for clean in (True, False)]
        ends = bound.metric_values(*(float(metric.mean()) for metric in metrics), runner=model)
        here, other = _Reads.of(component, hooks, (base, away), parts).inserted(insert)
        if grid is None:
            chosen = _differing(sites, here, other, bound.mask)
            grid = feature_grid(sites, replace(choice, features=chosen), base.shape[1])
        metadata = {
            **_describe(model, runner, bound, component),
            **{"direction": direction, "replacement": replacement},
            **({"seed": order} if replacement == "resample" else {}),
            **ends,
        }
        by_prompt = metrics[int(denoising)]
        yield Experiment(
            model, runner, bound, grid, base, here, other, metadata, by_prompt, rows, parts
        )


def _sites(
    runner: Runner, component: str, layers: Sequence[int] | None, n_layers: int
) -> dict[str, HookedSite]:
    """Dictionary sites of the chosen layers; none for components of the model itself."""
    if not needs_dictionaries(component):
        return {}
    if layers is None:
        return dict(sites_in(runner))
    numbers = coordinates("layer", layers, n_layers)
    sites = {name: site for name, site in sites_in(runner).items() if layer_of(name) in numbers}
    if not sites:
        raise EmptySelectionError(
            f"No dictionary lies in layers {list(numbers)}", exists=", ".join(sites_in(runner))
        )
    return sites


def _grid(
    component: str,
    sites: Mapping[str, HookedSite],
    choice: Choice,
    sizes: Mapping[str, int],
) -> Grid | None:
    """The patches; None while it is not known which features differ."""
    choice.axes_of(component)
    if component == "feature":
        return None if choice.features is None else feature_grid(sites, choice, sizes["pos"])
    if component == "error":
        return error_grid(sites, choice, sizes["pos"])
    return component_grid(component, choice, sizes)


def _places(component: str, hooks: Sequence[str]) -> dict[str, str]:
    """Where what is written at each hook is read."""
    elsewhere = COMPONENTS[component].reads
    return {h: h if elsewhere is None else elsewhere.format(layer=layer_of(h)) for h in hooks}


def _parts(
    runner: Runner,
    bound: BoundTask,
    component: str,
    hooks: Sequence[str],
    tokens: tuple[torch.Tensor, torch.Tensor],
    rows: int,
) -> tuple[Part, ...]:
    """The task, ready to be run again."""
    other_points = list(dict.fromkeys(_places(component, hooks).values()))
    base_points = list(dict.fromkeys([*hooks, *other_points]))
    return tuple(
        replayed(
            runner, bound, *tokens, rows=rows, base_points=base_points, other_points=other_points
        )
    )


def _joined_metric(parts: Sequence[Part], is_other: bool) -> Float[torch.Tensor, " prompt"]:
    """The metric of each prompt of one of the runs."""
    values = torch.cat([part.other if is_other else part.base for part in parts])
    index = torch.cat([part.index for part in parts]).cpu()
    return torch.empty_like(values).index_copy(0, index, values)


@dataclass(frozen=True)
class _Reads:
    """Activations of both runs."""

    at: Mapping[str, str]
    """Hook that is written to, to where it is read."""
    base: Mapping[str, torch.Tensor]
    """Those of the base run, at both."""
    other: Mapping[str, torch.Tensor]
    """Those of the other run, where they are read."""

    @classmethod
    def of(
        cls,
        component: str,
        hooks: Sequence[str],
        tokens: tuple[torch.Tensor, torch.Tensor],
        parts: Sequence[Part],
    ) -> _Reads:
        """What parts have recorded, of the prompts of both runs."""
        at = _places(component, hooks)
        n, n_pos = tokens[0].shape
        names = list(dict.fromkeys(at.values()))
        base = joined(parts, list(dict.fromkeys([*hooks, *names])), n, n_pos, False)
        other = joined(parts, names, n, n_pos, True)
        for part in parts:  # one copy is enough
            part.base_acts, part.other_acts = {}, {}
        axis = COMPONENTS[component].dims.index("pos")
        for name in names:
            _agree(other[name], base[name], _n_shared(*tokens), axis)
        return cls(at, base, other)

    def inserted(
        self, insert: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """What is at the hooks in the base run, and what is inserted there."""
        before = {hook: self.base[hook] for hook in self.at}
        after = {hook: insert(self.other[name]) for hook, name in self.at.items()}
        for hook, name in self.at.items():
            if name != hook:
                # what to write so that the stream is as wanted, beside what the base run has there
                after[hook] = before[hook] + (after[hook] - self.base[name])
        return before, after


def _n_shared(
    tokens: Int[torch.Tensor, "prompt pos"], other: Int[torch.Tensor, "prompt pos"]
) -> list[int]:
    """Tokens of each prompt before the first that differs."""
    return (tokens == other).int().cumprod(1).sum(1).tolist()


def _agree(
    x: Float[torch.Tensor, "prompt ..."],
    here: Float[torch.Tensor, "prompt ..."],
    n_shared: Sequence[int],
    axis: int,
) -> None:
    """Makes two runs equal to the last bit where they must be: before their prompts differ.

    Rounding depends on the machine and on what else is in a batch; whether a node changes must not.
    """
    for row, shared in enumerate(n_shared):
        x[row].narrow(axis, 0, shared).copy_(here[row].narrow(axis, 0, shared))


def _differing(
    sites: Mapping[str, HookedSite],
    here: Mapping[str, torch.Tensor],
    other: Mapping[str, torch.Tensor],
    mask: Bool[torch.Tensor, "prompt pos"],
) -> list[FeatureId]:
    """Features that the replacement changes at any token; all others have no effect."""
    features = []
    for name in sites:
        hook = acts_hook(name)
        changed = (here[hook] != other[hook]) & mask.to(here[hook].device)[..., None]
        features += [
            FeatureId(name, i) for i in changed.flatten(0, 1).any(0).nonzero().flatten().tolist()
        ]
    if not features:
        raise EmptySelectionError("No feature differs between clean and corrupted prompts")
    return features


def _describe(
    model: HookedModel, runner: Runner, bound: BoundTask, component: str
) -> dict[str, Any]:
    spliced = needs_dictionaries(component)
    return {
        "component": component,
        **bound.details(model),
        "sign": "positive = patching raises the metric",
        "tokens": token_strings(model, bound.clean[0]),
        "exclude": excluded(sites_in(runner).values()),
        "error": "keep" if spliced else None,
    }
