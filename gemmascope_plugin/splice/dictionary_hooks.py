"""Hooks of dictionaries in a model: always the last at their point, and removed without a trace.

1. A plain forward hook per point; no module is replaced, so other hooks at the same points keep working.
2. Before the point fires, a second hook moves ours behind all others. What users read or change under the
   model's own name is therefore the original activation, and the dictionary works on what they leave.
   Of several dictionaries at one point the one attached first runs first.
3. The same hook notices when somebody has removed ours (``reset_hooks(including_permanent=True)``).

Which tokens of a pass a site works on follows from hooks before the model, its embedding and its first
block (``models/passes.py``), whatever way the model was called: directly, with a cache, with hooks, or
token by token during generation. Left alone are special tokens, padding by the caller's attention mask,
and everything outside the dictionary's own positions. Sites with the same choice share one mask per pass.

Cost: a microsecond or two per point and pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Int
from transformer_lens.hook_points import HookPoint

from gemmascope_plugin.errors import EmptySelectionError, HookNotFiredError
from gemmascope_plugin.models.hooks import refuse_compiling
from gemmascope_plugin.models.passes import Pass, PassWatch
from gemmascope_plugin.models.points import reading
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.models.tokens import kept_positions, special_ids
from gemmascope_plugin.splice.edit import Edit
from gemmascope_plugin.splice.hooked_site import HookedSite
from gemmascope_plugin.splice.pass_features import PassFeatures
from gemmascope_plugin.splice.window import Window
from gemmascope_plugin.types import HookFn


class DictionaryHooks:
    """The sites of one dictionary, in the order in which a pass reaches them; edits are bound."""

    def __init__(
        self, sites: Sequence[HookedSite], edits: Sequence[Sequence[Edit]], mask: TokenMask
    ) -> None:
        self.sites = sites
        self.fired = [0] * len(sites)
        """How often each site was reached."""
        self._edits = edits
        self._mask = mask
        self._serial = -1
        self._input: torch.Tensor | None = None
        self._features: list[PassFeatures] = []

    def attach(self, stack: ExitStack, model: HookedModel, points: Mapping[str, HookPoint]) -> None:
        """Adds the hooks; the stack removes them."""
        for index, site in enumerate(self.sites):
            if site.is_transcoder:
                read = reading(model, site.hook_in, points)
                add_last(stack, points[read.hook], self._capture(read))
            add_last(stack, points[site.hook_out], self._replace(index))
        stack.callback(self._forget)

    def _capture(self, read: Callable[[torch.Tensor], torch.Tensor]) -> HookFn:
        def hook_fn(x: torch.Tensor, hook: object) -> None:
            self._begin_pass()
            self._input = read(x)

        return hook_fn

    def _replace(self, index: int) -> HookFn:
        def hook_fn(y: torch.Tensor, hook: object) -> torch.Tensor | None:
            refuse_compiling()
            self._begin_pass()
            self.fired[index] += 1
            x, self._input = (self._input if self.sites[index].is_transcoder else y), None
            if x is None:
                site = self.sites[index]
                raise HookNotFiredError(
                    f"The transcoder's input {site.hook_in} did not fire before {site.hook_out}"
                )
            # with nothing to compute not even the tokens need to be known
            idle = all(map(HookedSite.idle, self.sites, self._edits))
            return None if idle else self._run(index, x, y)

        return hook_fn

    def _begin_pass(self) -> None:
        """Forgets what a pass left behind that stopped half-way."""
        if self._serial != self._mask.serial:
            self._forget()
            self._serial = self._mask.serial

    def _run(self, index: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        site = self.sites[index]
        if index == 0:
            self._features.clear()
        if len(self._features) != index:
            raise HookNotFiredError(
                f"The pass reached {site.hook_out} without {self.sites[0].hook_out}, whose features "
                "write there too",
                fix="run from the tokens instead of start_at_layer",
            )
        features = site.read(x, self._mask.window(site, y), self._edits[index])
        earlier = tuple(self._features)
        self._features.append(features)
        out = site.write(y, features, earlier)
        if index == len(self.sites) - 1:
            self._forget()
        return out

    def _forget(self) -> None:
        self._features.clear()
        self._input = None


def add_last(stack: ExitStack, point: HookPoint, fn: HookFn) -> None:
    """Adds a forward hook that runs after all others at its point; the stack removes it."""
    # permanent, so that reset_hooks() and run_with_hooks() inside the block leave it in place
    point.add_hook(fn, is_permanent=True)
    handle = point.fwd_hooks[-1]

    def to_the_end(module: torch.nn.Module, args: object) -> None:
        hooks: Any = module._forward_hooks
        if handle.hook.id not in hooks:
            raise HookNotFiredError(
                f"The dictionary's hook at {point.name} was removed inside the splice block",
                fix="reset_hooks() without including_permanent=True",
            )
        hooks.move_to_end(handle.hook.id)

    order = point.register_forward_pre_hook(to_the_end)

    def remove() -> None:
        order.remove()
        handle.hook.remove()
        point.fwd_hooks = [h for h in point.fwd_hooks if h is not handle]

    stack.callback(remove)


class TokenMask:
    """The tokens of the running forward pass, by site."""

    def __init__(self, model: HookedModel, watch: PassWatch) -> None:
        self._model = model
        self._watch = watch
        self._serial = -1
        self._windows: dict[object, Window] = {}

    @property
    def serial(self) -> int:
        """Changes with every pass."""
        return self._watch.serial

    def window(self, site: HookedSite, activation: torch.Tensor) -> Window:
        """The tokens that the site works on in this pass."""
        run = self._watch.current(site, activation.shape[:2])
        if self._serial != self._watch.serial:
            self._serial = self._watch.serial
            self._windows.clear()
        if run.tokens is None and site.exclude:
            raise HookNotFiredError(
                f"The tokens at {site.hook_out} are not known: the embedding did not run",
                fix="run from the tokens instead of start_at_layer, or splice with exclude=()",
            )
        key = (site.exclude, id(site.positions), activation.shape[:2], run.tokens is None)
        if key not in self._windows:
            self._windows[key] = self._window(site, run, activation)
        window = self._windows[key]
        return window.narrowed(window.keep.to(activation.device))

    def _window(self, site: HookedSite, run: Pass, activation: torch.Tensor) -> Window:
        keep = torch.ones(activation.shape[:2], dtype=torch.bool, device=activation.device)
        if run.tokens is not None and site.exclude:
            ids = special_ids(self._model, site.exclude)
            keep = kept_positions(run.tokens, ids).to(keep.device)
        if run.attention is not None:
            keep = keep & run.attention.to(keep.device)
        # A pass of one token belongs to a generation, as a rule, and that token may be special.
        if keep.shape[1] > 1 and not keep.any(-1).all():
            raise _empty(site)
        batch = (run.rows, run.n_rows)
        ends = _ends(run, keep.shape[1])
        window = Window(keep, run.start, run.prompt, run.horizon, ends, *batch, run.grown)
        if site.positions is None:
            return window
        inside = window.narrowed(keep & window.select(site.positions))
        if run.start == 0 and inside.stop == run.horizon and not inside.keep.any():
            raise EmptySelectionError(
                f"positions={site.positions} of the dictionary at {site.hook_out} are excluded tokens",
                exists=f"exclude={site.exclude}",
                fix="other positions, or exclude=()",
            )
        return inside


def _ends(run: Pass, n_pos: int) -> Int[torch.Tensor, " batch"] | None:
    """Where the prompts end that are padded behind their ends; None where all end together."""
    if run.attention is None or run.start > 0 or run.rows is not None:
        return None
    ends = n_pos - run.attention.int().flip(1).argmax(1)
    return None if bool((ends == n_pos).all()) else ends


def refuse_empty(
    model: HookedModel, site: HookedSite, tokens: Int[torch.Tensor, "batch pos"]
) -> None:
    """Refuses prompts in which ``site`` would do nothing at all."""
    if not kept_positions(tokens, special_ids(model, site.exclude)).any(-1).all():
        raise _empty(site)


def _empty(site: HookedSite) -> EmptySelectionError:
    return EmptySelectionError(
        "The prompt has only excluded tokens",
        exists=f"exclude={site.exclude}",
        fix="a prompt with at least one word, or exclude=()",
    )
