"""Exact edge patching: one reader sees another value of one writer, everything else stays as it was.

1. Both runs are read once. What the stream would gain if the writer alone changed is
   ``ln1_post(a + dr_h) - ln1_post(a)`` for a head, ``z' - z`` for an MLP and the embedding.
2. The base run is repeated with the reader's input moved by that: queries
   ``q[h] + (ln1(x + d) - ln1(x)) W_Q[h]``, keys and values likewise per **key-value** head, an MLP's
   input, or the last residual stream.  No other reader sees the change directly.
3. Many edges ride one pass on the batch axis. Passes start at the layer of their readers, and at the
   first position where the runs differ (``replayed.py``).

It is what the brute-force definition gives (patch the writer, freeze all others, splice the stream into
one reader), for one pass instead of two per edge.

Cost: one row of a pass, from the reader's layer and the first difference on, per edge and prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import get_args

import torch
from jaxtyping import Float, Int

from gemmascope_plugin.causes.bound_task import BoundTask
from gemmascope_plugin.causes.effects import Effects
from gemmascope_plugin.causes.memory import Footprint, Limit, logits_held
from gemmascope_plugin.causes.names import Named, edges_of
from gemmascope_plugin.causes.replace import (
    REPLACEMENTS,
    Replacement,
    Writes,
    replayed_writers,
    write_deltas,
)
from gemmascope_plugin.causes.replayed import Part
from gemmascope_plugin.causes.task import Task, check_task
from gemmascope_plugin.errors import EmptySelectionError, check_choice
from gemmascope_plugin.graphs.edge_map import EdgeMap
from gemmascope_plugin.models.anatomy import Anatomy
from gemmascope_plugin.models.gate import gate
from gemmascope_plugin.models.protocol import HookedModel, check_model, dtype_of, wide
from gemmascope_plugin.models.record import write
from gemmascope_plugin.models.replay_points import Entry, Stage
from gemmascope_plugin.types import Direction

MAX_ROWS = 512
"""Prompt copies in one pass by default."""
Edges = Iterable[tuple[Named, Named]]


@gate(model=check_model, task=check_task)
def edge_patching(
    model: HookedModel,
    task: Task,
    *,
    edges: Edges | None = None,
    direction: Direction = "noising",
    replacement: Replacement = "other",
    memory_budget: int | str = "2 GB",
    max_rows: int = MAX_ROWS,
    progress: bool = False,
) -> Effects:
    """The exact effect on the metric of patching each edge alone.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``.
        task: Clean and corrupted prompts and a metric.
        edges: Which edges, each a writer and a reader by name (``("L1H3", "L2H0.q")``; see
            ``names.py``) or as nodes; None for all. The others stay at 0 in the result.
        direction: ``noising`` patches the clean run, ``denoising`` the corrupted one.
        replacement: What a writer is replaced by: the ``other`` run, ``zero``, ``overall_mean``
            or ``mean``.
        memory_budget: Bytes, or ``"2 GB"``.
        max_rows: Prompt copies in one pass at most.
        progress: Show a progress bar.

    Returns:
        Effects ``[writer, reader]`` with the effects of every prompt; positive = patching the edge
        raises the metric.

    Raises:
        TaskError: Prompts that cannot be compared, or a metric that does not tell them apart.
        UnknownNameError: An unknown direction, replacement or edge.
        InputError: Something that is not a pair of ends.
        EmptySelectionError: No edge.
        GemmaScopeError: The memory budget is too small for one prompt.

    Example:
        >>> suite = gs.tiny()
        >>> task = suite.task("agreement", n=8)
        >>> effects = gs.edge_patching(suite.model, task, edges=[("L2H3", "logits"), ("MLP3", "logits")])
        >>> effects.top(2).round(2)
          source  target port  effect  share
        0   MLP3  logits       -10.81  -0.53
        1   L2H3  logits        -3.42  -0.17
    """
    check_choice("direction", direction, get_args(Direction))
    check_choice("replacement", replacement, REPLACEMENTS)
    anatomy, bound = Anatomy(model), task.bind(model)
    edge_map = EdgeMap.of(anatomy)
    places = _places(edge_map, edges)
    ends = bound.ends(model)
    run = _Run(anatomy, places, replacement, Limit(max_rows, memory_budget), direction, progress)
    by_row = run.values(bound)
    details = {
        "component": "edge",
        "method": "exact",
        "direction": direction,
        "replacement": replacement,
        **bound.details(model),
        "sign": "positive = patching the edge raises the metric",
        "n_patched": len(places),
        **ends,
    }
    labels = {"writer": edge_map.writers, "reader": edge_map.readers}
    by_prompt = bound.fold(by_row.movedim(0, -1))
    return Effects(by_row.mean(0), ("writer", "reader"), labels, details, by_prompt)


def _places(edges: EdgeMap, pairs: Edges | None) -> Int[torch.Tensor, "edge two"]:
    """Writer and reader of each edge, sorted by reader."""
    places = edges.mask.nonzero() if pairs is None else torch.tensor(edges_of(pairs, edges))
    if not len(places):
        raise EmptySelectionError("No edge is named", fix="edges=None for all")
    return places[places[:, 1].argsort(stable=True)]


@dataclass(frozen=True)
class _Run:
    """One call of ``edge_patching``."""

    anatomy: Anatomy
    places: Int[torch.Tensor, "edge two"]
    replacement: Replacement
    limit: Limit
    direction: Direction
    progress: bool

    @torch.no_grad()
    def values(self, bound: BoundTask) -> Float[torch.Tensor, "prompt writer reader"]:
        """Effects of every prompt."""
        from tqdm.auto import tqdm

        need = edge_footprint(self.anatomy, bound)
        rows = self.limit.rows(need)
        # half of the rows' memory for what lies beside a pass: the writers' differences
        size = max(1, min(len(bound), rows))
        anatomy, replacement = self.anatomy, self.replacement
        parts = replayed_writers(
            anatomy.model,
            bound,
            self.direction,
            anatomy.n_layers,
            replacement,
            rows=size,
            size=size,
        )
        out = torch.zeros(len(bound), *EdgeMap.of(self.anatomy).mask.shape)
        out = out.to(torch.float64 if dtype_of(self.anatomy.model) == torch.float64 else out.dtype)
        total = len(self.places) * len(bound)
        with tqdm(total=total, desc="patching edges", disable=not self.progress) as bar:
            for part, other in parts:
                patches, index = _Patches(self.anatomy, part, other), part.index.cpu()
                for chunk in self._chunks(max(1, rows // len(index))):
                    effects = patches.effects(chunk).to(out)
                    out[index[:, None], chunk[:, 0], chunk[:, 1]] = effects.T
                    bar.update(len(chunk) * len(index))
        return out

    def _chunks(self, copies: int) -> Iterator[Int[torch.Tensor, "edge two"]]:
        """Edges into attention, or into the MLP, of one layer, ``copies`` at a time."""
        edges = EdgeMap.of(self.anatomy)
        mlp = torch.tensor([reader.node.kind == "mlp" for reader in edges.readers])
        starts = (2 * _start_layers(edges) + mlp)[self.places[:, 1]]
        for start in starts.unique().tolist():
            yield from self.places[starts == start].split(copies)


class _Patches:
    """Some prompts, ready for edges to be patched."""

    def __init__(self, anatomy: Anatomy, part: Part, other: Writes) -> None:
        self.anatomy, self.part, self.edges = anatomy, part, EdgeMap.of(anatomy)
        self.starts = _start_layers(self.edges)
        self.window = part.replay.window(part.start)
        base = Writes.of(part.base_acts, anatomy.n_layers)
        self.deltas = write_deltas(anatomy, base.window(self.window), other.window(self.window))

    def effects(self, edges: Int[torch.Tensor, "edge two"]) -> Float[torch.Tensor, "edge prompt"]:
        """Change of the metric under each edge alone; all readers are of one layer, MLPs or not."""
        start = int(self.starts[edges[0, 1]])
        moved = self.deltas[:, :, edges[:, 0]].movedim(2, 0)
        replay, hooks, stream = self.part.replay, [], None
        stage: Stage = "pre"
        if start == self.anatomy.n_layers:
            stream = (replay.pre[start][:, self.window] + moved).flatten(0, 1).to(replay.pre[start])
        else:
            hooks = list(self._hooks(start, edges[:, 1], moved))
            readers = [self.edges.readers[i] for i in edges[:, 1].tolist()]
            stage = "mid" if all(reader.node.kind == "mlp" for reader in readers) else "pre"
        entry = Entry(start, stage, len(edges), hooks, stream=stream)
        values = self.part.metric(self.part.replay.run(entry, self.window))
        return values.cpu() - self.part.base

    def _hooks(
        self,
        layer: int,
        readers: Int[torch.Tensor, " edge"],
        moved: Float[torch.Tensor, "edge prompt pos d_model"],
    ) -> Iterator[tuple[str, Callable[..., torch.Tensor]]]:
        x = wide(self.part.replay.pre[layer][:, self.window])
        ln1 = self.anatomy.norm(layer, "ln1")
        assert ln1 is not None, "models without it are refused"
        weights = {"q": self.anatomy.W_Q, "k": self.anatomy.W_K, "v": self.anatomy.W_V}
        for port, weight in weights.items():
            columns = self.edges.inputs(layer, port)
            rows = ((readers >= columns.start) & (readers < columns.stop)).nonzero().flatten()
            if len(rows):
                heads = readers[rows] - columns.start
                change = ln1(x + moved[rows]) - ln1(x)
                add = change.new_empty(*change.shape[:-1], self.anatomy.d_head)
                for head in heads.unique().tolist():
                    add[heads == head] = change[heads == head] @ weight(layer)[head].to(change)
                yield f"blocks.{layer}.attn.hook_{port}", _add_to_heads(rows, heads, add)
        rows = (readers == self.edges.inputs(layer, "mlp").start).nonzero().flatten()
        if len(rows):
            mlp_input = self.anatomy.mlp_input(layer)
            mid = self.part.replay.mid[layer][:, self.window]
            yield mlp_input.hook, _replace_rows(rows, mlp_input.value(mid + moved[rows]))


def _add_to_heads(
    rows: Int[torch.Tensor, " some"],
    heads: Int[torch.Tensor, " some"],
    add: Float[torch.Tensor, "some prompt pos d_head"],
) -> Callable[..., torch.Tensor]:
    """Hook that adds to one head of each of some copies of the prompts."""

    def changed(x: torch.Tensor) -> torch.Tensor:
        copies = x.clone().unflatten(0, (-1, add.shape[1]))
        copies[rows, :, :, heads] = (copies[rows, :, :, heads] + add).to(x.dtype)
        return copies.flatten(0, 1)

    return write(changed)


def _replace_rows(
    rows: Int[torch.Tensor, " some"], new: Float[torch.Tensor, "some prompt pos d_model"]
) -> Callable[..., torch.Tensor]:
    """Hook that gives some copies of the prompts another value."""

    def changed(x: torch.Tensor) -> torch.Tensor:
        copies = x.clone().unflatten(0, (-1, new.shape[1]))
        copies[rows] = new.to(x.dtype)
        return copies.flatten(0, 1)

    return write(changed)


def _start_layers(edges: EdgeMap) -> Int[torch.Tensor, " reader"]:
    """The layer from which on a pass differs if a reader sees something else."""
    return torch.tensor(
        [edges.n_layers if r.node.kind == "logits" else r.node.layer for r in edges.readers]
    )


def edge_footprint(anatomy: Anatomy, bound: BoundTask) -> Footprint:
    """Bytes per prompt: the writers' differences, and a row of a pass with one edge's change."""
    cfg, d, n_pos = anatomy.model.cfg, anatomy.d_model, bound.clean.shape[1]
    writers = len(EdgeMap.of(anatomy).writers) + 4 * anatomy.n_heads
    d_mlp = int(getattr(cfg, "d_mlp", None) or 4 * d)
    passing = 16 * d + 4 * max(d_mlp, anatomy.n_heads * (2 * anatomy.d_head + n_pos))
    row = n_pos * (writers * d + anatomy.n_layers * 4 * d + passing)
    return Footprint(0, 4 * (row + logits_held(anatomy.model, bound)))
