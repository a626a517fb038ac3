"""Nodes of a trace that are given other values during a run.

A changed feature gets ``factor`` times its recorded value: what its dictionary writes moves by
``(value - f) W_dec``, at every layer that it writes to, where ``f`` is what the feature is in this very
run, or was recorded where everything else is held. Errors and tokens are scaled.

Cost: the encoder columns and decoder rows of the changed features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from gemmascope_plugin.models.finite import wide
from gemmascope_plugin.models.points import reading
from gemmascope_plugin.tracing.linear.trace_site import Activity
from gemmascope_plugin.tracing.traced_prompt import Hooks, Replay


def change_hooks(replay: Replay, changes: Mapping[int, float], *, recorded: bool) -> Hooks:
    """Hooks that put changes into a run.

    Args:
        replay: The prompt's.
        changes: Place in the layout to factor.
        recorded: Features are as recorded, not as they are in the run.
    """
    hooks: Hooks = []
    tokens = {node: f for node, f in changes.items() if node < replay.layout.n_pos}
    if tokens:
        hooks.append(("hook_embed", _scaled(tokens)))
    for site in range(len(replay.layout.activities)):
        hooks += _site_hooks(replay, site, changes, recorded)
    return hooks


def _site_hooks(replay: Replay, site: int, changes: Mapping[int, float], recorded: bool) -> Hooks:
    own = replay.layout.activities[site]
    features = _inside(replay.layout.features(site), changes)
    kept = own.keep.nonzero()[:, 0].tolist()
    errors = {kept[n]: f for n, f in _inside(replay.layout.errors(site), changes).items()}
    hooks: Hooks = []
    if features:
        hooks += _Changed(replay, site, features, recorded).hooks()
    if errors:
        hooks.append((replay.hook_of(own.site.hooked.hook_out), _error_scaled(own, errors)))
    return hooks


def _inside(part: slice, changes: Mapping[int, float]) -> dict[int, float]:
    """Changes of some nodes, counted from the first of them."""
    return {n - part.start: f for n, f in changes.items() if part.start <= n < part.stop}


class _Changed:
    """Features of one site that get other values, wherever their dictionary writes them.

    Args:
        replay: The prompt's.
        site: The site.
        factors: Active feature, counted within the site, to factor.
        recorded: See :func:`change_hooks`.
    """

    def __init__(
        self, replay: Replay, site: int, factors: Mapping[int, float], recorded: bool
    ) -> None:
        self._replay, self._site, self._recorded = replay, site, recorded
        own = replay.layout.activities[site]
        entries = torch.tensor(list(factors), device=own.acts.indices.device)
        self._own = own
        self._rows = own.acts.rows[entries]
        self._features = own.acts.indices[entries]
        self._before = own.acts.values[entries]
        self._values = self._before * torch.tensor(list(factors.values())).to(self._before)
        self._change: torch.Tensor | None = None

    def hooks(self) -> Hooks:
        """One where the features are read, one at each place where they are written."""
        model, site = self._replay.record.model, self._own.site
        how = reading(model, site.hooked.hook_in)
        hooks: Hooks = [(how.hook, self._look(how))]
        for index in self._replay.layout.hearing(self._site):
            hooked = self._replay.layout.activities[index].site.hooked
            W_dec = hooked.decoder_from(site.place)
            hooks.append((self._replay.hook_of(hooked.hook_out), self._write(W_dec)))
        return hooks

    def _look(self, how: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., None]:
        def hook_fn(x: torch.Tensor, hook: Any) -> None:
            now = self._before
            if not self._recorded:
                unique, index = self._features.unique(return_inverse=True)
                acts = self._own.site.weights.encode_features(how(x).flatten(2), unique)
                now = acts[0, self._rows, index].to(self._values)
            self._change = self._values - now

        return hook_fn

    def _write(self, W_dec: torch.Tensor) -> Callable[..., torch.Tensor]:
        def hook_fn(y: torch.Tensor, hook: Any) -> torch.Tensor:
            assert self._change is not None, "the features are read before they are written"
            rows = W_dec.detach()[self._features].to(self._change) * self._change[:, None]
            flat = y.flatten(2)
            change = wide(torch.zeros_like(flat)).index_add(
                1, self._rows, rows[None].to(flat.device)
            )
            return (flat + change).to(y).reshape(y.shape)

        return hook_fn


def _scaled(factors: Mapping[int, float]) -> Callable[..., torch.Tensor]:
    def hook_fn(x: torch.Tensor, hook: Any) -> torch.Tensor:
        scale = torch.ones(x.shape[1]).to(x)
        scale[list(factors)] = torch.tensor(list(factors.values())).to(x)
        return x * scale[:, None]

    return hook_fn


def _error_scaled(own: Activity, factors: Mapping[int, float]) -> Callable[..., torch.Tensor]:
    def hook_fn(y: torch.Tensor, hook: Any) -> torch.Tensor:
        change = torch.zeros_like(own.rest)
        for pos, factor in factors.items():
            change[pos] = (factor - 1) * own.rest[pos]
        return (y + change.reshape(y.shape[1:])).to(y)

    return hook_fn
