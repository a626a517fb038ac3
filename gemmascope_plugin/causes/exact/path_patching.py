"""Path patching: the effect of senders through chosen receivers alone (Wang et al., arXiv 2211.00593).

1. Run both kinds of prompts. The base run is the corrupted one (denoising: senders take their clean
   values) or the clean one (noising).
2. Find how the stream that each receiver reads differs when the senders change, along the paths that
   ``paths`` allows (``path_flow.py``).
3. Run the base prompts again. Each receiver, and nothing else, sees that difference added to the stream
   that it reads (``path_receivers.py``); everything after it is recomputed. Read the metric.

Of a set of receivers each gets its difference in one run. Where one lies behind another, it also sees
what the first makes of its own; in the original method that was overwritten.

Many pairs of senders and receivers ride on the batch axis of one forward pass, which starts at the first
layer where a receiver lies and at the first position where both runs differ (``replayed.py``).

Cost: four to six forward passes over the prompts and ``pairs / copies`` ends of passes of
``copies * prompts`` rows; unless ``paths="direct"``, a copy of the prompts more for each set of senders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, get_args

import torch
from jaxtyping import Float, Int

from gemmascope_plugin.causes.bound_task import BoundTask
from gemmascope_plugin.causes.components import (
    Runner,
    excluded,
    layer_of,
    patchable,
    sites_in,
    stream_time,
)
from gemmascope_plugin.causes.effects import Effects
from gemmascope_plugin.causes.exact.path_changes import (
    Sender,
    changes_of,
    check_senders,
    first_time,
    hooks_of,
)
from gemmascope_plugin.causes.exact.path_flow import Flow, Paths, read_by_flow
from gemmascope_plugin.causes.exact.path_receivers import (
    Delivery,
    Receiver,
    check_overlap,
    delivering,
    is_copy,
    stream_of,
)
from gemmascope_plugin.causes.names import Name, Named, node_of, reader_of
from gemmascope_plugin.causes.replayed import Part, replayed
from gemmascope_plugin.causes.task import Task, check_task
from gemmascope_plugin.errors import EmptySelectionError, check_choice, shorten
from gemmascope_plugin.graphs.edge_map import EdgeMap
from gemmascope_plugin.graphs.node import FeatureId, Reader
from gemmascope_plugin.models import token_strings
from gemmascope_plugin.models.anatomy import Anatomy
from gemmascope_plugin.models.gate import gate
from gemmascope_plugin.models.protocol import HookedModel, check_model
from gemmascope_plugin.models.replay_points import Entry
from gemmascope_plugin.splice.hooked_sae import Saes, check_saes
from gemmascope_plugin.types import Direction

MAX_ROWS = 512
"""Prompt copies in one forward pass by default."""


@gate(model=check_model, task=check_task, saes=check_saes)
def path_patching(
    model: HookedModel,
    task: Task,
    senders: Name | Sequence[Name | Sequence[Name]],
    receivers: Named | Sequence[Named | Sequence[Named]],
    *,
    paths: Paths = "direct",
    direction: Direction = "denoising",
    joint: bool = False,
    saes: Saes = None,
    max_rows: int = MAX_ROWS,
) -> Effects:
    """The effect on the metric of senders through the inputs of receivers, and on no other way.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``.
        task: Clean and corrupted prompts and a metric.
        senders: Names (``embed``, ``L1H3``, ``MLP2``, ``blocks.2.hook_resid_pre``,
            ``blocks.1.hook_mlp_out/17`` of a spliced dictionary; see ``names.py``), nodes or features. A
            list in the list is a set that changes together.
        receivers: Likewise: ``L2H0.q``, ``L1KV0.k``, ``L1KV0.v`` (seen by all heads of the group),
            ``L1H3.k``, ``L1H3.v`` (the copy that one head sees), ``MLP2``, streams, features of
            dictionaries that read a stream or an MLP's input, ``logits``.
        paths: ``direct``: through nothing; every other head and MLP is frozen until the receiver.
            ``mlps``: MLPs in between are recomputed. ``total``: heads and MLPs in between are.
        direction: ``denoising`` puts clean values into the corrupted run, ``noising`` the reverse.
        joint: All senders are one set and all receivers another.
        saes: Dictionaries, for features; spliced in with their error kept.
        max_rows: Prompt copies per forward pass.

    Returns:
        Effects along ``sender`` and ``receiver``: ``metric(patched) - metric(base)``, averaged over
        prompts; 0 where no path leads from one to the other.

    Raises:
        TaskError: Prompts that cannot be compared, a metric that does not tell them apart, or a set with
            a component and a part of it.
        UnknownNameError: An unknown name, with the nearest.
        EmptySelectionError: Nothing is named, or no path leads from any sender to any receiver.

    Example:
        >>> suite = gs.tiny()
        >>> task = suite.task("agreement", n=8)
        >>> effects = gs.path_patching(suite.model, task, ["L2H3", "MLP2"], "logits", direction="noising")
        >>> effects.top(2).round(2)
          sender receiver  effect  share
        0   MLP2   logits   -4.59  -0.22
        1   L2H3   logits   -3.42  -0.17
    """
    check_choice("paths", paths, get_args(Paths))
    check_choice("direction", direction, get_args(Direction))
    anatomy = Anatomy(model)
    edges = EdgeMap.of(anatomy)
    sending = _groups(senders, joint, lambda name: node_of(name, edges))
    receiving = _groups(receivers, joint, lambda name: reader_of(name, edges))
    for group in receiving:
        check_overlap(group)
    bound = task.bind(model)
    with nullcontext(model) if saes is None else patchable(model, "feature", saes) as runner:
        with torch.no_grad():
            clean, corrupt = (bound.measure(runner, t).cpu() for t in (bound.clean, bound.corrupt))
        ends = bound.metric_values(float(clean.mean()), float(corrupt.mean()), model)
        sweep = _Sweep(runner, anatomy, bound, bound.runs(direction), sending, receiving, paths)
        each = sweep.run(max_rows)
        metadata = _described(model, runner, bound, saes is not None)
    metadata |= {"method": f"path patching, {paths}", "direction": direction, **ends}
    labels = {"sender": _labels(sending), "receiver": _labels(receiving)}
    return Effects(each.mean(-1), ("sender", "receiver"), labels, metadata, bound.fold(each))


def _described(
    model: HookedModel, runner: Runner, bound: BoundTask, spliced: bool
) -> dict[str, Any]:
    """What the result says of model and task."""
    sites = sites_in(runner).values() if spliced else ()
    return {
        "component": "path",
        **bound.details(model),
        "sign": "positive = patching raises the metric",
        "tokens": token_strings(model, bound.clean[0]),
        "exclude": excluded(sites),
        "error": "keep" if spliced else None,
    }


@dataclass(frozen=True, eq=False)
class _Sweep:
    """All pairs of one call."""

    runner: Runner
    anatomy: Anatomy
    bound: BoundTask
    tokens: tuple[Int[torch.Tensor, "prompt pos"], Int[torch.Tensor, "prompt pos"]]
    """Those of the base run and of the other."""
    senders: Sequence[tuple[Sender, ...]]
    receivers: Sequence[tuple[Receiver, ...]]
    paths: Paths

    @torch.no_grad()
    def run(self, max_rows: int) -> Float[torch.Tensor, "sender receiver prompt"]:
        """How far each pair moves the metric of each prompt; 0 where no path leads."""
        check_senders(self.runner, self.senders)
        reached = self._reached()
        values = torch.zeros(len(self.senders), len(self.receivers), len(self.bound))
        rows = max(1, min(len(self.bound), max_rows))
        streams = sorted({self._stream(r) for pair in reached.values() for r in pair})
        hooks = hooks_of(self.runner, self.senders)
        base_points, other_points = read_by_flow(self.anatomy, *hooks, streams, self.paths)
        parts = replayed(
            self.runner,
            self.bound,
            *self.tokens,
            rows=rows,
            base_points=base_points,
            other_points=other_points,
        )
        for part in parts:
            width = part.bound.clean.shape[1]
            tokens = tuple(x[part.index, :width] for x in self.tokens)
            some = replace(self, bound=part.bound, tokens=tokens)
            values[:, :, part.index.cpu()] = some._part_values(part, reached, max_rows)
        return values

    def _part_values(
        self, part: Part, reached: dict[tuple[int, int], list[Receiver]], max_rows: int
    ) -> Float[torch.Tensor, "sender receiver part"]:
        """The same of some prompts, whose tokens these are."""
        changes = changes_of(self.runner, self.senders, *self.tokens)
        streams = sorted({self._stream(r) for pair in reached.values() for r in pair})
        window = part.replay.window(part.start)
        flow = Flow(self.anatomy, part, window, self.paths)
        copies = max(1, max_rows // len(self.bound))
        values = torch.zeros(len(self.senders), len(self.receivers), len(self.bound))
        for senders in torch.arange(len(changes)).split(max(1, copies // len(streams))):
            chosen = senders.tolist()
            streamed = flow.differences([changes[i] for i in chosen], streams)
            differences = dict(zip(chosen, streamed, strict=True))
            pairs = [pair for pair in reached if pair[0] in differences]
            for chunk in self._chunks(pairs, reached, copies, together=part.replay.runs_whole):
                metric = self._measure(chunk, reached, differences, part)
                for pair, value in zip(chunk, metric, strict=True):
                    values[pair] = value - part.base
        return values

    def _chunks(
        self,
        pairs: Sequence[tuple[int, int]],
        reached: dict[tuple[int, int], list[Receiver]],
        copies: int,
        *,
        together: bool,
    ) -> Iterator[list[tuple[int, int]]]:
        """Pairs that ride together: those that start at one layer, unless passes run whole."""

        def layer(pair: tuple[int, int]) -> int:
            return 0 if together else self._first_layer(reached[pair])

        for _, group in groupby(sorted(pairs, key=layer), key=layer):
            chunk = list(group)
            for start in range(0, len(chunk), copies):
                yield chunk[start : start + copies]

    def _measure(
        self,
        pairs: Sequence[tuple[int, int]],
        reached: dict[tuple[int, int], list[Receiver]],
        differences: dict[int, dict[str, torch.Tensor]],
        part: Part,
    ) -> Float[torch.Tensor, "pair part"]:
        """The metric in one forward pass, a copy of the prompts for each pair."""
        n, base = len(self.bound), self.tokens[0]
        # the keys of single heads take a pass of their own, over all positions
        keys = any(is_copy(receiver, "k") for pair in pairs for receiver in reached[pair])
        window = slice(0, base.shape[1]) if keys else part.replay.window(part.start)
        deliveries = [
            Delivery(
                slice(j * n, (j + 1) * n),
                receiver,
                differences[i][self._stream(receiver)][:, window],
            )
            for j, (i, k) in enumerate(pairs)
            for receiver in reached[i, k]
        ]
        tokens = base.repeat(len(pairs), 1)
        start = min(self._first_layer(reached[pair]) for pair in pairs)
        hooks, stream = [], None
        if start < self.anatomy.n_layers or part.replay.runs_whole:
            hooks = delivering(self.runner, self.anatomy, deliveries, tokens)
        else:  # all at the end of the stream, where no block is left to run
            stream = part.replay.pre[start][:, window].repeat(len(pairs), 1, 1)
            for d in deliveries:
                stream[d.rows] += d.difference.to(stream)
        layer = 0 if part.replay.runs_whole else start
        entry = Entry(layer, copies=len(pairs), hooks=hooks, stream=stream)
        return part.metric(part.replay.run(entry, window)).cpu()

    def _reached(self) -> dict[tuple[int, int], list[Receiver]]:
        """Sender and receiver sets to the receivers that anything reaches."""
        first = [min(first_time(self.runner, s) for s in group) for group in self.senders]
        reached = {}
        for i, start in enumerate(first):
            for k, group in enumerate(self.receivers):
                receivers = [r for r in group if start <= stream_time(self._stream(r))]
                if receivers:
                    reached[i, k] = receivers
        if not reached:
            raise EmptySelectionError(
                f"No path leads from {shorten(_labels(self.senders))} to "
                f"{shorten(_labels(self.receivers))}",
                fix="receivers that lie behind the senders",
            )
        return reached

    def _first_layer(self, receivers: Sequence[Receiver]) -> int:
        """The first layer in which a set of receivers lies; the number of layers for the end."""
        n = self.anatomy.n_layers
        hooks = [self._stream(receiver) for receiver in receivers]
        last = f"blocks.{n - 1}.hook_resid_post"
        return min(n if hook == last else layer_of(hook) for hook in hooks)

    def _stream(self, receiver: Receiver) -> str:
        return stream_of(self.runner, self.anatomy, receiver)


def _groups(names: Any, joint: bool, read: Callable[[Any], Any]) -> list[tuple[Any, ...]]:
    """What is named as sets, each once."""
    listed = list(names) if _is_list(names) else [names]
    named = [map(read, entry if _is_list(entry) else (entry,)) for entry in listed]
    groups = [tuple(dict.fromkeys(group)) for group in named]
    if joint:
        groups = [tuple(dict.fromkeys(name for group in groups for name in group))]
    if not groups or not all(groups):
        raise EmptySelectionError("No sender or no receiver is named", fix='e.g. "L1H3", "logits"')
    return groups


def _is_list(names: object) -> bool:
    # features and readers are tuples too
    return isinstance(names, (list, tuple)) and not isinstance(names, (FeatureId, Reader))


def _labels(groups: Sequence[tuple[Any, ...]]) -> tuple[str, ...]:
    return tuple(" + ".join(name.label for name in group) for group in groups)
