"""The model with its dictionaries, as long as the ``splice`` block lasts.

Hook and cache names are those of the model, which keep meaning the model's own activations, plus, per
site of a dictionary, ``<output hook>.hook_sae_input``, ``...acts_pre``, ``...acts_post``, ``...recons``,
``...error`` (not where the error is dropped) and ``...output``, what flows on. Where several dictionaries
write to one hook they are numbered: ``blocks.5.hook_mlp_out[0].hook_sae_acts_post``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Int

from gemmascope_plugin.errors import HookNotFiredError, MissingHookError, nearest, shorten
from gemmascope_plugin.models import hook_point
from gemmascope_plugin.models.chat import Words, stop_ids
from gemmascope_plugin.models.passes import PassWatch
from gemmascope_plugin.models.points import Reading, reading
from gemmascope_plugin.models.prompts import PromptLike, check_room, read_prompts
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.models.record import attached, claim, keep
from gemmascope_plugin.models.threads import threads_for_tokens
from gemmascope_plugin.models.tokens import kept_positions, special_ids
from gemmascope_plugin.splice.hooked_sae import HookedCrossLayer, HookedSAE
from gemmascope_plugin.splice.hooked_site import HookedSite
from gemmascope_plugin.splice.window import refuse_empty
from gemmascope_plugin.types import Hooks

_CONTINUES = {"past_kv_cache", "past_key_values", "start_at_layer"}
"""What a pass is given that does not start with the first token."""
NamesFilter = str | Sequence[str] | Callable[[str], bool] | None


class SplicedModel:
    """A model whose sites run through dictionaries.

    Args:
        model: The model, with hooks attached by :func:`gemmascope_plugin.splice`.
        saes: The dictionaries, in the order in which they were given.
        watch: What watches the model's passes.
    """

    def __init__(
        self, model: HookedModel, saes: Sequence[HookedSAE | HookedCrossLayer], watch: PassWatch
    ) -> None:
        self.model = model
        self.saes = tuple(saes)
        self._watch = watch
        self._points = dict(model.hook_dict)

    def __repr__(self) -> str:
        sites = ", ".join(self.sites)
        return f"SplicedModel({self.model.cfg.n_layers} layers, dictionaries at {sites})"

    def __call__(self, text: PromptLike, **kwargs: Any) -> Any:
        """Logits ``[batch, pos, d_vocab]`` of prompts in any form, at the places where they were given.

        Texts of unequal length are padded behind their ends; what stands at padding is masked and means
        nothing.
        """
        if kwargs.keys() & _CONTINUES:  # with a cache of earlier tokens a special token is in order
            return self.model(read_prompts(self.model, text, mask=True).tokens, **kwargs)
        prompts = read_prompts(self.model, text, kwargs.pop("attention_mask", None))
        if prompts.is_padded:
            kwargs["attention_mask"] = prompts.mask.long()
        for exclude in dict.fromkeys(site.exclude for site in self.sites.values()):
            special = special_ids(self.model, exclude)
            refuse_empty(kept_positions(prompts.tokens, special), exclude)
        return self.model(prompts.tokens, **kwargs)

    forward = __call__

    @cached_property
    def sites(self) -> dict[str, HookedSite]:
        """Name to site, of every dictionary: the output hook, numbered if several share it."""
        return {site.name: site for sae in self.saes for site in sae.sites}

    @cached_property
    def sub_hooks(self) -> dict[str, Any]:
        """Name to hook point of every dictionary."""
        return {
            f"{name}.{part}": point
            for name, site in self.sites.items()
            for part, point in site.points.items()
        }

    def hook_point(self, name: str) -> Any:
        """A hook point of the model or of a dictionary.

        Raises:
            MissingHookError: Neither has it.
        """
        sub = self.sub_hooks
        if name in sub:
            return sub[name]
        if ".hook_sae_" in name:
            raise MissingHookError(
                f"No spliced dictionary has the hook {name!r}",
                exists=shorten(self.sites),
                nearest=nearest(name, sub),
            )
        return hook_point(self.model, name, self._points)

    @contextmanager
    def hooks(self, fwd_hooks: Hooks = (), bwd_hooks: Hooks = ()) -> Iterator[SplicedModel]:
        """Attaches hooks by name, on model and dictionaries alike, and removes them."""
        with_direction = [(n, f, "fwd") for n, f in fwd_hooks] + [
            (n, f, "bwd") for n, f in bwd_hooks
        ]
        points = [(self.hook_point(name), fn, way) for name, fn, way in with_direction]
        with claim(self.model, "a run with hooks"), attached(points):
            yield self

    def run_with_hooks(
        self, text: PromptLike, *, fwd_hooks: Hooks = (), bwd_hooks: Hooks = (), **kwargs: Any
    ) -> Any:
        """Logits with temporary hooks."""
        with self.hooks(fwd_hooks, bwd_hooks):
            return self(text, **kwargs)

    def run_with_cache(
        self, text: PromptLike, *, names_filter: NamesFilter = None, **kwargs: Any
    ) -> tuple[Any, dict[str, torch.Tensor]]:
        """Logits and activations by name, of model and dictionaries.

        Args:
            text: Text or token ids.
            names_filter: A name, names, or a predicate; None for everything.
            **kwargs: For the model's forward pass.

        Returns:
            The logits and a dict from hook name to detached activation.

        Raises:
            MissingHookError: A name that neither model nor dictionaries have.
            HookNotFiredError: A name that was asked for and that the pass never reached.
        """
        cache: dict[str, torch.Tensor] = {}

        names = self._select(names_filter)
        readings = [self._reading(name) for name in names]
        with self.hooks([(r.hook, keep(cache, r.name, r.detached)) for r in readings]):
            logits = self(text, **kwargs)
        silent = [name for name in names if name not in cache]
        if silent and names_filter is not None and not callable(names_filter):
            raise HookNotFiredError(f"The model ran but never reached {shorten(silent)}")
        return logits, cache

    def _select(self, names_filter: NamesFilter) -> list[str]:
        if isinstance(names_filter, str):
            return [names_filter]
        if names_filter is not None and not callable(names_filter):
            return list(names_filter)
        names = [*self._points, *self.sub_hooks]
        live = [name for name in names if self._fires(name)]
        return [name for name in live if names_filter is None or names_filter(name)]

    def _reading(self, name: str) -> Reading:
        """Hooks as they fire; a tensor that this model class has no hook for, from its neighbour."""
        is_hook = name in self.sub_hooks or name in self._points or ".hook_sae_" in name
        return Reading(name, name) if is_hook else reading(self.model, name, self._points)

    def _fires(self, name: str) -> bool:
        try:
            self.hook_point(name)
        except MissingHookError:
            return False
        return True

    def continuing(self, prompt: int, new: int) -> AbstractContextManager[None]:
        """Inside the block, texts are prompts of ``prompt`` tokens and up to ``new`` tokens after them.

        Positions of dictionaries and edits then mean the same in a forward pass over a whole text as in
        the generation that wrote it: negative ones count from the end of the prompt.
        """
        return self._watch.generation(prompt, new)

    def generate(
        self, text: PromptLike, *, max_new_tokens: int = 20, stop: Words = (), **kwargs: Any
    ) -> Int[torch.Tensor, "batch pos"]:
        """Continues prompts in any form, of any lengths.

        Args:
            text: The prompts.
            max_new_tokens: Longest continuation.
            stop: Words or ids of tokens that end a continuation, beside those that end one for this model
                (``models/chat.py``).
            **kwargs: For the model's ``generate``.

        Returns:
            Token ids, each prompt and what follows it, padded behind the end. Prompts of one length are
            continued together, others one length after another: no padding is ever attended to.

        Raises:
            ModelError: Prompt and continuation are longer than the model's context.
        """
        options: dict[str, Any] = {"verbose": False, "stop_at_eos": True, "prepend_bos": False}
        ends = stop_ids(self.model, stop)
        if ends and options["stop_at_eos"]:
            options["eos_token_id"] = ends
        options.update(kwargs)
        prompts = read_prompts(self.model, text)
        lengths = prompts.lengths.tolist()
        check_room(self.model, max(lengths), max_new_tokens)
        by_length: dict[int, list[int]] = {}
        for row, length in enumerate(lengths):
            by_length.setdefault(length, []).append(row)
        texts: dict[int, torch.Tensor] = {}
        for length, rows in by_length.items():
            part = None if len(by_length) == 1 else rows
            tokens = torch.stack([prompts.tokens[row][prompts.mask[row]] for row in rows])
            # each step is a product of a few tokens
            threads = threads_for_tokens(self.model, len(rows))
            with threads, self._watch.generation(length, max_new_tokens, part, len(lengths)):
                out = self.model.generate(
                    tokens, max_new_tokens=max_new_tokens, return_type="tokens", **options
                )
            texts.update(zip(rows, out, strict=True))
        listed = [texts[row] for row in range(len(lengths))]
        return torch.nn.utils.rnn.pad_sequence(listed, batch_first=True, padding_value=prompts.pad)
