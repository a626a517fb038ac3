"""Hooks of dictionaries in a model: always the last at their point, and removed without a trace.

1. A plain forward hook per point; no module is replaced, so other hooks at the same points keep working.
2. Before the point fires, a second hook moves ours behind all others. What users read or change under the
   model's own name is therefore the original activation, and the dictionary works on what they leave.
   Of several dictionaries at one point the one attached first runs first.
3. The same hook notices when somebody has removed ours (``reset_hooks(including_permanent=True)``).

Cost: a microsecond or two per point and pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from gemmascope_plugin.errors import HookNotFiredError
from gemmascope_plugin.models.compiled import refuse_compiling
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.models.site_hooks import reading
from gemmascope_plugin.splice.edit import Edit
from gemmascope_plugin.splice.hooked_site import HookedSite
from gemmascope_plugin.splice.pass_features import PassFeatures
from gemmascope_plugin.splice.token_mask import TokenMask

HookFn = Callable[..., Any]


class Course:
    """The sites of one dictionary, in the order in which a pass reaches them.

    Args:
        sites: One site, or those of a cross-layer dictionary.
        edits: Edits of each site's features, bound.
        mask: Which tokens count.
    """

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

    def attach(self, stack: ExitStack, model: HookedModel, points: Mapping[str, Any]) -> None:
        """Adds the hooks; the stack removes them."""
        for index, site in enumerate(self.sites):
            if site.is_transcoder:
                read = reading(model, site.hook_in, points)
                add_last(stack, points[read.hook], self._capture(read))
            add_last(stack, points[site.hook_out], self._replace(index))
        stack.callback(self._forget)

    def _capture(self, read: Callable[[torch.Tensor], torch.Tensor]) -> HookFn:
        def hook_fn(x: torch.Tensor, hook: Any) -> None:
            self._begin_pass()
            self._input = read(x)

        return hook_fn

    def _replace(self, index: int) -> HookFn:
        def hook_fn(y: torch.Tensor, hook: Any) -> torch.Tensor | None:
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
        own = site.read(x, self._mask.window(site, y), self._edits[index])
        earlier = tuple(self._features)
        self._features.append(own)
        out = site.write(y, own, earlier)
        if index == len(self.sites) - 1:
            self._forget()
        return out

    def _forget(self) -> None:
        self._features.clear()
        self._input = None


def add_last(stack: ExitStack, point: Any, fn: HookFn) -> None:
    """Adds a forward hook that runs after all others at its point; the stack removes it."""
    # permanent, so that reset_hooks() and run_with_hooks() inside the block leave it in place
    point.add_hook(fn, is_permanent=True)
    handle = point.fwd_hooks[-1]

    def to_the_end(module: Any, args: Any) -> None:
        if handle.hook.id not in module._forward_hooks:
            raise HookNotFiredError(
                f"The dictionary's hook at {point.name} was removed inside the splice block",
                fix="reset_hooks() without including_permanent=True",
            )
        module._forward_hooks.move_to_end(handle.hook.id)

    order = point.register_forward_pre_hook(to_the_end)

    def remove() -> None:
        order.remove()
        handle.hook.remove()
        point.fwd_hooks = [h for h in point.fwd_hooks if h is not handle]

    stack.callback(remove)
