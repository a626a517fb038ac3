"""Some prompts whose edges are scored: differences of their writers, times gradients at their readers.

``<D_u, g_v>`` of every edge: what a writer would add, times what one more unit of the stream at a reader
does to the metric.

1. ``EdgeRuns`` has the writers of the base run and of the other, and takes gradients of runs between.
   A method says which (``eap.py``): it gives *paths*, differences and the runs whose
   gradients they are multiplied with.
2. One backward pass gives the gradients at queries, keys and values, at the normalised input of each
   MLP and at the last residual stream (``ReaderGradients``). They are pulled back to what the reader
   reads, the stream before its norm: ``g_q[h] = J_ln1(x)^T (W_Q[h] dm/dq_h)``, keys and values likewise
   per **key-value** head; an MLP's through its norm where the hook lies behind it. A key-value head's
   gradient is the sum over the query heads that share it. So no gate of the model has to be switched, it
   is the same on both model classes and in every folding, and ``d_head`` numbers per head are kept.
3. Where prompts can be run again late (``models/replay.py``), both passes begin at the site whose line is
   followed, and at the first position that differs: what lies before has no edge to score.
4. Tokens are taken in blocks whose ``tokens * writers * d_model`` numbers fit the budget. Per block the
   writers' differences are formed once and multiplied with the gradients of one layer's readers at a
   time, averaged over the runs that go with them; only writers before the readers take part.

Cost: a forward and a backward pass per run; forming the differences, ``2 * tokens * edges * d_model``
operations and ``readers of a layer * d_model`` numbers per token of a block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int

from gemmascope_plugin.causes.components import Runner, layer_of
from gemmascope_plugin.causes.gradient.slopes import EMBED, late_slopes
from gemmascope_plugin.causes.method import Method
from gemmascope_plugin.causes.metric import Metric
from gemmascope_plugin.causes.replace import DeltaForm, Replacement, Writes, write_deltas
from gemmascope_plugin.causes.replayed import Part
from gemmascope_plugin.errors import TaskError
from gemmascope_plugin.graphs.edge_map import EdgeMap
from gemmascope_plugin.models.anatomy import Anatomy
from gemmascope_plugin.models.gradients import gradients_of
from gemmascope_plugin.models.protocol import dtype_of, wide
from gemmascope_plugin.models.record import keeping, record, write
from gemmascope_plugin.models.replay import Replay
from gemmascope_plugin.types import Direction

_PORTS = ("q", "k", "v")

Deltas = Callable[[slice], Float[torch.Tensor, "token writer d_model"]]
"""Tokens, rows and positions flattened, to what each writer would add there."""


@dataclass(frozen=True)
class Path:
    """Differences of the writers, and the runs whose gradients they are multiplied with."""

    deltas: Deltas
    runs: Sequence[ReaderGradients]
    """Their mean is taken."""
    weight: float = 1.0
    writers: slice | None = None
    """Rows of the writers that count; None for all."""


@dataclass(frozen=True)
class EdgeMethod(Method):
    """Which gradients the differences of the writers are multiplied with."""

    between_prompts: ClassVar[bool] = False
    """Whether its runs go from one prompt to the other, which zeros and means do not."""
    conserves: ClassVar[bool] = False
    """Whether the scores out of the embedding sum to the whole difference of the metric."""

    @property
    def n_steps(self) -> int:
        """Points at which gradients are taken along a line; 1 where there is no line."""
        return 1

    def check(
        self, metrics: Sequence[Metric], direction: Direction, replacement: Replacement
    ) -> None:
        """Refuses what would give zeros or nonsense."""
        if replacement != "other" and self.between_prompts:
            raise TaskError(
                f"{self.name!r} goes from one prompt's run to another's, and replacement="
                f"{replacement!r} is not the run of a prompt",
                fix="method='eap-ig-activations' or 'eap'",
            )

    def paths(self, runs: EdgeRuns) -> Iterator[Path]:
        """What is multiplied with what."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class EdgeRuns:
    """Some prompts: what their writers write in both runs, and gradients at readers in between."""

    anatomy: Anatomy
    part: Part
    window: slice
    """The positions that are run."""
    base: Writes
    """In the window, as the other run."""
    other: Writes
    other_tokens: Int[torch.Tensor, "part pos"]
    form: DeltaForm
    copies: int
    """Copies of the prompts in one pass."""

    @property
    def deltas(self) -> Deltas:
        """The writers' differences between the two runs."""
        return deltas_between(self.anatomy, self.base, self.other, self.form)

    def at(self, hook: str, points: Float[torch.Tensor, "row pos ..."]) -> ReaderGradients:
        """Gradients with these values at a hook, of copies of the prompts."""
        model = self.anatomy.model
        points = points.to(dtype_of(model))
        if isinstance(self.part.replay, Replay):
            return late_gradients(self.anatomy, self.part, self.window, hook, points)

        def put(x: torch.Tensor) -> torch.Tensor:
            # the values, with the graph of what was there
            return points.reshape(x.shape).to(x) + (x - x.detach())

        tokens = self.part.replay.tokens.repeat(len(points) // len(self.part.index), 1)
        measure = functools.partial(self.part.bound.measure, model, tokens)
        return read_gradients(self.anatomy, model, measure, [(hook, write(put))])

    def along(
        self, hook: str, start: torch.Tensor, end: torch.Tensor, n: int
    ) -> Iterator[ReaderGradients]:
        """Runs at the midpoints of a line; several points ride on the batch axis."""
        middles = (torch.arange(n, device=start.device) + 0.5) / n
        for alphas in middles.to(start.dtype).split(self.copies):
            shape = (-1, *[1] * start.ndim)
            points = (start + alphas.reshape(shape) * (end - start)).flatten(0, 1)
            yield from self.at(hook, points).split(len(self.part.index))

    def other_embedding(self) -> Float[torch.Tensor, "part pos d_model"]:
        """The embedding of the other run's tokens in the window."""
        if isinstance(self.part.replay, Replay):
            return self.part.replay.arithmetic.embedded(self.other_tokens[:, self.window])
        return record(self.anatomy.model, self.other_tokens, [EMBED])[EMBED][:, self.window]


def deltas_between(anatomy: Anatomy, base: Writes, other: Writes, form: DeltaForm) -> Deltas:
    """The writers' differences between two runs, for the tokens that are asked for."""

    def some(tokens: slice) -> Float[torch.Tensor, "token writer d_model"]:
        return write_deltas(anatomy, base.tokens(tokens), other.tokens(tokens), form)[0]

    return some


def edge_products(
    edges: EdgeMap, path: Path, n_tokens: int, block: int
) -> Iterator[tuple[tuple[slice, slice, slice], torch.Tensor, torch.Tensor]]:
    """Blocks of tokens, writers and readers, and both factors of their products."""
    for start in range(0, n_tokens, block):
        tokens = slice(start, min(start + block, n_tokens))
        written = path.deltas(tokens)
        for layer in range(edges.n_layers):
            first, mlp = edges.inputs(layer, "q").start, edges.inputs(layer, "mlp").start
            heads = edges.heads(layer)
            for readers, upto, of in (
                (slice(first, mlp), heads.start, ReaderGradients.of_heads),
                (slice(mlp, mlp + 1), heads.stop, ReaderGradients.of_mlp),
            ):
                writers = _cut(path.writers, upto)
                if writers.start < writers.stop:
                    g = _mean([of(run, layer, tokens) for run in path.runs])
                    yield (tokens, writers, readers), written[:, writers], g
        writers = _cut(path.writers, len(edges.writers))
        last = _mean([run.of_logits(tokens) for run in path.runs])
        yield (tokens, writers, edges.inputs(0, "logits")), written[:, writers], last


def add_sums(
    out: Float[torch.Tensor, "writer reader"],
    edges: EdgeMap,
    path: Path,
    n_tokens: int,
    block: int,
) -> None:
    """Adds the products, summed over tokens, to ``out``."""
    for (_, writers, readers), d, g in edge_products(edges, path, n_tokens, block):
        out[writers, readers] += path.weight * torch.einsum("twm,trm->wr", d, g)


def add_by_token(
    out: Float[torch.Tensor, "token writer reader"],
    edges: EdgeMap,
    path: Path,
    n_tokens: int,
    block: int,
) -> None:
    """Adds the products of every token to ``out``."""
    for (tokens, writers, readers), d, g in edge_products(edges, path, n_tokens, block):
        out[tokens, writers, readers] += path.weight * (d @ g.transpose(1, 2))


def _mean(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total / len(tensors)


def _cut(rows: slice | None, stop: int) -> slice:
    """The rows below ``stop``."""
    return slice(0, stop) if rows is None else slice(rows.start, min(rows.stop, stop))


@dataclass(frozen=True)
class ReaderGradients:
    """Activations and gradients of one run, as far as readers are concerned."""

    anatomy: Anatomy
    cache: dict[str, torch.Tensor]
    """Activations: the stream before each half layer, and what the writers wrote."""
    slopes: dict[str, torch.Tensor]
    """Gradients of the summed metric."""

    @property
    def writes(self) -> Writes:
        """What the writers wrote in this run."""
        return Writes.of(self.cache, self.anatomy.n_layers)

    def split(self, rows: int) -> list[ReaderGradients]:
        """The runs of copies of the prompts, copy after copy, one by one."""
        n_copies = len(next(iter(self.slopes.values()))) // rows
        parts = [
            [
                {name: value.split(rows)[i] for name, value in values.items()}
                for i in range(n_copies)
            ]
            for values in (self.cache, self.slopes)
        ]
        pairs = zip(*parts, strict=True)
        return [ReaderGradients(self.anatomy, cache, slopes) for cache, slopes in pairs]

    def of_heads(self, layer: int, tokens: slice) -> Float[torch.Tensor, "token reader d_model"]:
        """Gradients at the queries, keys and values of a layer, in the order of ``EdgeMap``."""
        name = f"blocks.{layer}."
        pre = self._at(self.cache, f"{name}hook_resid_pre", tokens)
        ln1 = self.anatomy.norm(layer, "ln1")
        assert ln1 is not None, "models without it are refused"
        weights = (self.anatomy.W_Q(layer), self.anatomy.W_K(layer), self.anatomy.W_V(layer))
        pulled = [
            torch.einsum(
                "thd,hmd->thm", self._at(self.slopes, f"{name}attn.hook_{port}", tokens), weight
            )
            for port, weight in zip(_PORTS, weights, strict=True)
        ]
        return ln1.vjp(pre[:, None], torch.cat(pulled, 1))

    def of_mlp(self, layer: int, tokens: slice) -> Float[torch.Tensor, "token 1 d_model"]:
        """Gradient at the input of an MLP."""
        mlp_input = self.anatomy.mlp_input(layer)
        mid = self._at(self.cache, f"blocks.{layer}.hook_resid_mid", tokens)
        return mlp_input.pulled(mid, self._at(self.slopes, mlp_input.hook, tokens))[:, None]

    def of_logits(self, tokens: slice) -> Float[torch.Tensor, "token 1 d_model"]:
        """Gradient at the end of the stream."""
        last = f"blocks.{self.anatomy.n_layers - 1}.hook_resid_post"
        return self._at(self.slopes, last, tokens)[:, None]

    @staticmethod
    def _at(
        values: dict[str, torch.Tensor], name: str, tokens: slice
    ) -> Float[torch.Tensor, "token ..."]:
        return wide(values[name].flatten(0, 1)[tokens])


def read_gradients(
    anatomy: Anatomy,
    runner: Runner,
    run: Callable[[], Float[torch.Tensor, " row"]],
    fwd_hooks: Sequence[tuple[str, Callable[..., Any]]] = (),
) -> ReaderGradients:
    """One forward and one backward pass; ``run`` gives the metric of each row."""
    hooks, streams = _behind(anatomy, EMBED)
    cache: dict[str, torch.Tensor] = {}

    reads = keeping(cache, [*streams, *Writes.hooks(anatomy.n_layers)])
    slopes = gradients_of(runner, lambda: run().sum(), hooks, fwd_hooks=[*fwd_hooks, *reads])
    return ReaderGradients(anatomy, cache, slopes)


def late_gradients(
    anatomy: Anatomy,
    part: Part,
    window: slice,
    hook: str,
    start: Float[torch.Tensor, "row pos ..."],
) -> ReaderGradients:
    """The same of readers behind a hook, from a value there on; of positions that are run again.

    ``hook`` is that of the embedding, or where a writer's activation is.
    """
    hooks, streams = _behind(anatomy, hook)
    writes = Writes.hooks(anatomy.n_layers) if hook == EMBED else []
    acts, slopes = late_slopes(part, window, hook, start, hooks, [*streams, *writes])
    return ReaderGradients(anatomy, acts, slopes)


def _behind(anatomy: Anatomy, hook: str) -> tuple[list[str], list[str]]:
    """Where readers behind a hook have their gradients, and the streams that they read."""
    n, first = anatomy.n_layers, 0 if hook == EMBED else layer_of(hook) + 1
    layers = range(first, n)
    mlps = range(first - hook.endswith("hook_z"), n)  # that of the same layer reads heads
    inputs = [f"blocks.{layer}.attn.hook_{port}" for layer in layers for port in _PORTS]
    inputs += [anatomy.mlp_input(layer).hook for layer in mlps]
    streams = [f"blocks.{layer}.hook_resid_pre" for layer in layers]
    streams += [f"blocks.{layer}.hook_resid_mid" for layer in mlps]
    return [*inputs, f"blocks.{n - 1}.hook_resid_post"], streams
