"""Puts dictionaries into a TransformerLens model for the length of a ``with`` block.

1. Everything is checked before anything is touched: hooks, widths, edits.
2. Each site gets one forward hook at its output point and, if its input is another tensor, one at its
   input point (``dictionary_hooks.py``); where the model class has no hook with that tensor,
   at the one before the norm's gain, which is then applied (``models/points.py``). Several
   dictionaries at one point run in the given order, nested blocks from the outer to the inner one.
3. At exit every hook is removed, exceptions included. A site whose hook never fired although the model
   ran is an error.

Cost: that of :class:`HookedSAE` per site and pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from transformer_lens.hook_points import HookPoint

from gemmascope_plugin.errors import (
    HookNotFiredError,
    InputError,
    UnknownNameError,
    WidthMismatchError,
    shorten,
)
from gemmascope_plugin.models import hook_point, special_ids
from gemmascope_plugin.models.check_model import check_model, describe
from gemmascope_plugin.models.gate import gate
from gemmascope_plugin.models.hooks import claim, refuse_compiled, refuse_unseen
from gemmascope_plugin.models.passes import PassWatch
from gemmascope_plugin.models.points import hook_points, reading, width_at
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.saes.coder import cross_layer_of
from gemmascope_plugin.splice.check_saes import Saes, as_list, check_sae, check_saes
from gemmascope_plugin.splice.dictionary_hooks import DictionaryHooks, TokenMask
from gemmascope_plugin.splice.edit import Edit
from gemmascope_plugin.splice.hooked_sae import HookedCrossLayer, HookedSAE
from gemmascope_plugin.splice.hooked_site import HookedSite
from gemmascope_plugin.splice.spliced_model import SplicedModel
from gemmascope_plugin.splice.window import Positions
from gemmascope_plugin.types import SAE, ErrorMode

Hooked = HookedSAE | HookedCrossLayer


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
        dictionary = _as_hooked(sae, error, exclude, positions)
        # the same object once more gets hook points of its own
        is_new = dictionary not in hooked
        hooked.append(dictionary if is_new else dictionary.with_error(dictionary.error))
    sites = [site for dictionary in hooked for site in dictionary.sites]
    with ExitStack() as stack:
        at = ", ".join(dict.fromkeys(site.hook_out for site in sites))
        stack.enter_context(claim(model, f"a splice of dictionaries at {at}"))
        _name_apart(stack, sites)
        by_site = _assign(hooked, _as_edits(edits))
        points = hook_points(model)
        for site in sites:
            check_site(model, site, points)
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


def _as_hooked(
    sae: SAE | Hooked,
    error: ErrorMode,
    exclude: str | int | Sequence[str | int],
    positions: Positions,
) -> Hooked:
    if isinstance(sae, Hooked):
        return sae
    check_sae(sae)
    if (layers := cross_layer_of(sae)) is not None:
        return HookedCrossLayer(layers, error=error, exclude=exclude, positions=positions)
    return HookedSAE(sae, error=error, exclude=exclude, positions=positions)


def _name_apart(stack: ExitStack, sites: Sequence[HookedSite]) -> None:
    """Numbers the sites that share an output hook, until the stack is closed."""
    shared = {hook for hook, n in Counter(site.hook_out for site in sites).items() if n > 1}
    counts: Counter[str] = Counter()
    for site in sites:
        stack.callback(setattr, site, "name", site.name)
        number = f"[{counts[site.hook_out]}]" if site.hook_out in shared else ""
        site.name = site.hook_out + number
        counts[site.hook_out] += 1


def check_site(model: HookedModel, site: HookedSite, points: Mapping[str, HookPoint]) -> None:
    """Refuses a dictionary that does not fit the model; ``points`` are the model's, by name."""
    special_ids(model, site.exclude)
    hook_point(model, site.hook_out, points)
    reading(model, site.hook_in, points)
    for name, width in zip((site.hook_in, site.hook_out), site.widths, strict=True):
        width_here = width_at(model, name)
        if width_here is not None and width_here != width:
            raise WidthMismatchError(
                f"The dictionary for {site.hook_out} has width {width}, the model's {name} has "
                f"{width_here}",
                fix=f"a dictionary of this model; this one says {site.model_name}",
            )


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


def _assign(hooked: Sequence[Hooked], edits: Sequence[Edit]) -> dict[HookedSite, list[Edit]]:
    """The edits of each site, bound to it, in the order in which they apply."""
    pairs = [(dictionary, site) for dictionary in hooked for site in dictionary.sites]
    by_site: dict[HookedSite, list[Edit]] = {site: [] for _, site in pairs}
    for edit in edits:
        named = [site for dictionary, site in pairs if _is_named(edit, dictionary, site)]
        fits = [site for site in named if edit.layer in (None, _layer(site))]
        if len(fits) != 1:
            raise _unclear(edit, named, len(fits), list(by_site))
        site = fits[0]
        by_site[site].append(edit.bind(f"{site.name}.hook_sae_acts_post", site.d_sae))
    return by_site


def _is_named(edit: Edit, dictionary: Hooked, site: HookedSite) -> bool:
    if isinstance(edit.sae, str):
        return edit.sae in (site.name, site.hook_out)
    return edit.sae is None or edit.sae is dictionary or edit.sae is dictionary.sae


def _layer(site: HookedSite) -> int | None:
    """The layer whose tensor the features read; None outside the blocks."""
    parts = site.hook_in.split(".")
    return int(parts[1]) if parts[0] == "blocks" else None


def _unclear(
    edit: Edit, named: list[HookedSite], fits: int, sites: list[HookedSite]
) -> UnknownNameError:
    kind = type(edit).__name__
    layers = sorted({str(_layer(site)) for site in named})
    if edit.sae is not None and named:
        return UnknownNameError(
            f"{kind}(layer={edit.layer}) fits {fits} layers of the dictionary",
            exists=f"layers {', '.join(layers)}",
            fix=f"{kind}(..., layer={layers[0]})",
        )
    layer = "" if edit.layer is None else f", layer={edit.layer}"
    return UnknownNameError(
        f"{kind}(sae={_name(edit.sae)}{layer}) fits {fits} of the spliced dictionaries",
        exists=shorten(repr(site.name) for site in sites),
        fix="sae=<the object that you spliced>, or the name; layer=<layer> for one of several layers",
    )


def _name(sae: object) -> str:
    return repr(sae) if sae is None or isinstance(sae, str) else type(sae).__name__
