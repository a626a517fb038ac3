"""Which tokens of the running forward pass each site works on.

1. The pass is known from hooks before the model, its embedding and its first block
   (``models/passes.py``), whatever way the model was called: directly, with a cache, with hooks, or
   token by token during generation.
2. Left alone are special tokens, padding by the caller's attention mask, and everything outside the
   dictionary's own positions. Sites with the same choice share one mask per pass.
"""

from __future__ import annotations

import torch
from jaxtyping import Int

from gemmascope_plugin.errors import EmptySelectionError, HookNotFiredError
from gemmascope_plugin.models.passes import Pass, PassWatch
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.models.tokens import kept_positions, special_ids
from gemmascope_plugin.splice.hooked_site import HookedSite
from gemmascope_plugin.splice.window import Window


class TokenMask:
    """The tokens of the running forward pass, by site.

    Args:
        model: Model whose special tokens count.
        watch: What watches its passes.
    """

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
        """The tokens that the site works on in this pass.

        Raises:
            HookNotFiredError: The token ids of this pass are not known.
            EmptySelectionError: A prompt has nothing but tokens that are left alone.
        """
        seen = self._watch.current(site, activation.shape[:2])
        if self._serial != self._watch.serial:
            self._serial = self._watch.serial
            self._windows.clear()
        if seen.tokens is None and site.exclude:
            raise HookNotFiredError(
                f"The tokens at {site.hook_out} are not known: the embedding did not run",
                fix="run from the tokens instead of start_at_layer, or splice with exclude=()",
            )
        key = (site.exclude, id(site.positions), activation.shape[:2], seen.tokens is None)
        if key not in self._windows:
            self._windows[key] = self._made(site, seen, activation)
        window = self._windows[key]
        return window.narrowed(window.keep.to(activation.device))

    def _made(self, site: HookedSite, seen: Pass, activation: torch.Tensor) -> Window:
        keep = torch.ones(activation.shape[:2], dtype=torch.bool, device=activation.device)
        if seen.tokens is not None and site.exclude:
            ids = special_ids(self._model, site.exclude)
            keep = kept_positions(seen.tokens, ids).to(keep.device)
        if seen.attention is not None:
            keep = keep & seen.attention.to(keep.device)
        # A pass of one token belongs to a generation, as a rule, and that token may be special.
        if keep.shape[1] > 1 and not keep.any(-1).all():
            raise _empty(site)
        batch = (seen.rows, seen.n_rows)
        ends = _ends(seen, keep.shape[1])
        window = Window(keep, seen.start, seen.prompt, seen.horizon, ends, *batch, seen.grown)
        if site.positions is None:
            return window
        own = window.narrowed(keep & window.select(site.positions))
        if seen.start == 0 and own.stop == seen.horizon and not own.keep.any():
            raise EmptySelectionError(
                f"positions={site.positions} of the dictionary at {site.hook_out} are excluded tokens",
                exists=f"exclude={site.exclude}",
                fix="other positions, or exclude=()",
            )
        return own


def _ends(seen: Pass, n_pos: int) -> Int[torch.Tensor, " batch"] | None:
    """Where the prompts end that are padded behind their ends; None where all end together."""
    if seen.attention is None or seen.start > 0 or seen.rows is not None:
        return None
    ends = n_pos - seen.attention.int().flip(1).argmax(1)
    return None if bool((ends == n_pos).all()) else ends


def refuse_empty(
    model: HookedModel, site: HookedSite, tokens: Int[torch.Tensor, "batch pos"]
) -> None:
    """Refuses prompts in which ``site`` would do nothing at all.

    Raises:
        EmptySelectionError: A prompt has only excluded tokens.
    """
    if not kept_positions(tokens, special_ids(model, site.exclude)).any(-1).all():
        raise _empty(site)


def _empty(site: HookedSite) -> EmptySelectionError:
    return EmptySelectionError(
        "The prompt has only excluded tokens",
        exists=f"exclude={site.exclude}",
        fix="a prompt with at least one word, or exclude=()",
    )
