"""Puts dictionaries into a TransformerLens model for the length of a ``with`` block.

1. Everything is checked before anything is touched: hooks, widths, edits.
2. Each site gets one plain forward hook at its output point and, if its input is another tensor, one at
   its input point; where the model class has no hook with that tensor, at the one before the norm's
   gain, which is then applied (``models/points.py``). No module is replaced, so other hooks at the same
   points keep working. Several dictionaries at one point run in the given order, nested blocks from the
   outer to the inner one.
3. Before a point fires, a second hook moves ours behind all others. What users read or change under the
   model's own name is therefore the original activation, and the dictionary works on what they leave.
   The same hook notices when somebody has removed ours (``reset_hooks(including_permanent=True)``).
4. At exit every hook is removed, exceptions included. A site whose hook never fired although the model
   ran is an error.

Cost: that of :class:`HookedSAE` per site and pass, and a microsecond or two per hook.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from transformer_lens.hook_points import HookPoint

from gemmascope_plugin.errors import HookNotFiredError, InputError, UnknownNameError, shorten
from gemmascope_plugin.models.gate import gate
from gemmascope_plugin.models.passes import PassWatch
from gemmascope_plugin.models.points import hook_points, reading
from gemmascope_plugin.models.protocol import HookedModel, check_model, describe
from gemmascope_plugin.models.record import claim, refuse_compiled, refuse_compiling, refuse_unseen
from gemmascope_plugin.splice.edit import Edit
from gemmascope_plugin.splice.hooked_sae import (
    Hooked,
    HookedCrossLayer,
    Saes,
    as_hooked,
    as_list,
    check_saes,
)
from gemmascope_plugin.splice.hooked_site import HookedSite
from gemmascope_plugin.splice.pass_features import PassFeatures
from gemmascope_plugin.splice.spliced_model import SplicedModel
from gemmascope_plugin.splice.window import Positions, TokenMask
from gemmascope_plugin.types import ErrorMode, HookFn


@gate(model=check_model, saes=check_saes)
@contextmanager
def splice(
    model: HookedModel,
    saes: Saes,
    *,
    error: ErrorMode = "keep",
    exclude: str | int | Sequence[str | int] = ("bos", "eos", "pad"),
    positions: Positions = None,
    edits: Sequence[Edit] | Edit = (),
) -> Iterator[SplicedModel]:
    """Runs dictionaries at their sites inside the block and leaves the model as it was.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``.
        saes: Dictionaries from :func:`gemmascope_plugin.load`, one or several: SAEs, transcoders,
            crosscoders, cross-layer transcoders. A :class:`HookedSAE` or :class:`HookedCrossLayer`
            keeps its own options.
        error: ``"keep"``, ``"drop"`` or ``"detach"`` the reconstruction error.
        exclude: Special tokens that the dictionaries leave alone.
        positions: Positions where the dictionaries work; None for all.
        edits: Feature edits, applied in order at every forward pass.

    Yields:
        The spliced model: call it, or ``run_with_cache``, ``run_with_hooks``, ``generate``.

    Raises:
        MissingHookError: The model lacks a dictionary's hook, or its norms were folded and the
            dictionary reads one with its gain.
        WidthMismatchError: A dictionary of another width than the tensor at its site.
        FeatureIndexError: An edit names a feature outside its dictionary.
        HookNotFiredError: The model ran and a dictionary was never reached.
        ModelError: The model was compiled with ``torch.compile``, or another thread has hooks in it: they
            belong to the model, and two threads would get each other's.

    Example:
        >>> suite = gs.tiny()
        >>> with gs.splice(suite.model, suite.load("res", 1)) as spliced:
        ...     logits, cache = spliced.run_with_cache("today the keys near the cabinet")
        >>> cache["blocks.1.hook_resid_post.hook_sae_acts_post"].shape
        torch.Size([1, 7, 512])
    """
    refuse_compiled(model)
    hooked: list[Hooked] = []
    for sae in as_list(saes):
        dictionary = as_hooked(sae, error, exclude, positions)
        # the same object once more gets hook points of its own
        is_new = dictionary not in hooked
        hooked.append(dictionary if is_new else dictionary.with_error(dictionary.error))
    sites = [site for dictionary in hooked for site in dictionary.sites]
    with ExitStack() as stack:
        at = ", ".join(dict.fromkeys(site.hook_out for site in sites))
        stack.enter_context(claim(model, f"a splice of dictionaries at {at}"))
        _name_apart(stack, sites)
        by_site = _edits_by_site(hooked, _as_edits(edits))
        points = hook_points(model)
        for site in sites:
            site.check(model, points)
        watch = PassWatch(model)
        watch.attach()
        stack.callback(watch.detach)
        mask = TokenMask(model, watch)
        hooks = [
            DictionaryHooks(dictionary.sites, [by_site[site] for site in dictionary.sites], mask)
            for dictionary in hooked
        ]
        for of_dictionary in hooks:
            of_dictionary.attach(stack, model, points)
        yield SplicedModel(model, hooked, watch)
    if watch.ran:
        _refuse_silent(hooks)
    else:
        refuse_unseen()


def _as_edits(edits: Sequence[Edit] | Edit) -> list[Edit]:
    """One edit or several as a list; anything else is refused."""
    listed = [edits] if isinstance(edits, Edit) or not isinstance(edits, Iterable) else list(edits)
    for edit in listed:
        if not isinstance(edit, Edit):
            raise InputError(
                f"{describe(edit)} is not an edit",
                exists="Ablate, Clamp, Scale, Add, Replace, Project, Custom",
                fix="edits=gemmascope_plugin.Ablate(features=12), or several in a list",
            )
    return listed


def _edits_by_site(hooked: Sequence[Hooked], edits: Sequence[Edit]) -> dict[HookedSite, list[Edit]]:
    """The edits of each site, bound to it, in the order in which they apply."""
    pairs = [(dictionary, site) for dictionary in hooked for site in dictionary.sites]
    by_site: dict[HookedSite, list[Edit]] = {site: [] for _, site in pairs}
    for edit in edits:
        named = [site for dictionary, site in pairs if _is_named(edit, dictionary, site)]
        fits = [site for site in named if edit.layer in (None, site.layer)]
        if len(fits) != 1:
            raise _unclear(edit, named, len(fits), list(by_site))
        site = fits[0]
        by_site[site].append(edit.bind(f"{site.name}.hook_sae_acts_post", site.d_sae))
    return by_site


def _is_named(edit: Edit, dictionary: Hooked, site: HookedSite) -> bool:
    if isinstance(edit.sae, str):
        return edit.sae in (site.name, site.hook_out)
    source = dictionary.source if isinstance(dictionary, HookedCrossLayer) else dictionary.sae
    return any(edit.sae is sae for sae in (None, dictionary, dictionary.sae, source))


def _unclear(
    edit: Edit, named: list[HookedSite], fits: int, sites: list[HookedSite]
) -> UnknownNameError:
    kind = type(edit).__name__
    if edit.sae is not None and named:
        layers = sorted({str(site.layer) for site in named})
        return UnknownNameError(
            f"{kind}(layer={edit.layer}) fits {fits} layers of the dictionary",
            exists=f"layers {', '.join(layers)}",
            fix=f"{kind}(..., layer={layers[0]})",
        )
    is_word = edit.sae is None or isinstance(edit.sae, str)
    name = repr(edit.sae) if is_word else type(edit.sae).__name__
    layer = "" if edit.layer is None else f", layer={edit.layer}"
    return UnknownNameError(
        f"{kind}(sae={name}{layer}) fits {fits} of the spliced dictionaries",
        exists=shorten(repr(site.name) for site in sites),
        fix="sae=<the object that you spliced>, or the name; layer=<layer> for one of several layers",
    )


def _name_apart(stack: ExitStack, sites: Sequence[HookedSite]) -> None:
    """Numbers the sites that share an output hook, until the stack is closed."""
    shared = {hook for hook, n in Counter(site.hook_out for site in sites).items() if n > 1}
    counts: Counter[str] = Counter()
    for site in sites:
        stack.callback(setattr, site, "name", site.name)
        number = f"[{counts[site.hook_out]}]" if site.hook_out in shared else ""
        site.name = site.hook_out + number
        counts[site.hook_out] += 1


def _refuse_silent(hooks: Sequence[DictionaryHooks]) -> None:
    silent = [
        site.hook_out
        for of_dictionary in hooks
        for site, times in zip(of_dictionary.sites, of_dictionary.fired, strict=True)
        if not times
    ]
    if silent:
        raise HookNotFiredError(
            f"The model ran but never reached {shorten(silent)}",
            fix="run past that layer (stop_at_layer), or splice fewer dictionaries",
        )


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
