"""``<D_u, g_v>`` of every edge: what a writer would add, times what a reader would make of it.

1. Tokens are taken in blocks whose ``tokens * writers * d_model`` numbers fit the budget.
2. Per block the writers' differences are formed once and multiplied with the gradients of one layer's
   readers at a time, averaged over the runs that go with them; only writers before the readers take part.

Cost: ``2 * tokens * edges * d_model`` operations, and forming the differences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float

from gemmascope_plugin.causes.gradient.reader_gradients import ReaderGradients
from gemmascope_plugin.causes.writes import DeltaForm, Writes, write_deltas
from gemmascope_plugin.graphs.edge_map import EdgeMap
from gemmascope_plugin.models.anatomy import Anatomy

Deltas = Callable[[slice], Float[torch.Tensor, "token writer d_model"]]
"""Tokens, rows and positions flattened, to what each writer would add there."""


@dataclass(frozen=True)
class Path:
    """Differences of the writers, and the runs whose gradients they are multiplied with."""

    deltas: Deltas
    runs: Sequence[ReaderGradients]
    """Their mean is taken."""
    weight: float = 1.0
    only: slice | None = None
    """Rows of the writers that count; None for all."""


def deltas_between(anatomy: Anatomy, base: Writes, other: Writes, form: DeltaForm) -> Deltas:
    """The writers' differences between two runs, for the tokens that are asked for."""

    def some(tokens: slice) -> Float[torch.Tensor, "token writer d_model"]:
        return write_deltas(anatomy, base.tokens(tokens), other.tokens(tokens), form)[0]

    return some


def edge_products(
    edges: EdgeMap, path: Path, n_tokens: int, block: int
) -> Iterator[tuple[tuple[slice, slice, slice], torch.Tensor, torch.Tensor]]:
    """Blocks of tokens, writers and readers, and both factors of their products.

    Args:
        edges: The model's.
        path: What is multiplied with what.
        n_tokens: Tokens in all.
        block: Tokens at a time.
    """
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
                writers = _cut(path.only, upto)
                if writers.start < writers.stop:
                    g = _mean([of(run, layer, tokens) for run in path.runs])
                    yield (tokens, writers, readers), written[:, writers], g
        writers = _cut(path.only, len(edges.writers))
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
    for one in tensors[1:]:
        total = total + one
    return total / len(tensors)


def _cut(only: slice | None, stop: int) -> slice:
    """The rows of ``only`` below ``stop``."""
    return slice(0, stop) if only is None else slice(only.start, min(only.stop, stop))
