"""What readers miss is what the norm behind the heads says, digit for digit where heads cancel."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gemmascope_plugin.circuits.edge_ablation import WriterChanges
from gemmascope_plugin.graphs.edge_map import EdgeMap
from gemmascope_plugin.models.anatomy import Anatomy

CIRCUITS, PROMPTS, POS = 3, 2, 4
SHAPE = (CIRCUITS, PROMPTS, POS)


def _slowly(
    anatomy: Anatomy, edges: EdgeMap, removed: Any, plain: Any, heads: Any, column: int
) -> torch.Tensor:
    """Reader by reader and layer by layer, by the definition, in float64."""
    total = torch.zeros(*SHAPE, anatomy.d_model, dtype=torch.float64)
    for circuit, missing in enumerate(removed[:, :, column]):
        for row, moved in plain.items():
            total[circuit] += missing[row] * moved[circuit].double()
        for layer, (a, moved) in heads.items():
            post = anatomy.norm(layer, "ln1_post")
            share = missing[edges.heads(layer)].double()
            a, moved = a[circuit].double(), moved[circuit].double()
            mixed = a + torch.einsum("h,pshd->psd", share, moved)
            total[circuit] += mixed - a if post is None else post(mixed) - post(a)
    return total


@pytest.mark.parametrize("left", [1.0, 1e-3], ids=["ordinary", "heads that cancel"])
def test_what_readers_miss(hooked2: Any, left: float) -> None:
    anatomy = Anatomy(hooked2)
    edges, d = EdgeMap.of(anatomy), anatomy.d_model
    draw = torch.Generator().manual_seed(0)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    removed = (torch.rand(CIRCUITS, *edges.mask.shape, generator=draw) < 0.5) & edges.mask
    removed[0] = edges.mask  # all heads of every layer
    removed[1] = False
    written = WriterChanges(anatomy, edges, removed, some(PROMPTS, POS, d))
    plain, heads = {0: some(*SHAPE, d)}, {}
    written.add(0, plain[0])
    for layer in range(anatomy.n_layers):
        a = some(*SHAPE, d)
        # together the heads leave little of what there was
        moved = -a[..., None, :] / anatomy.n_heads + left * some(*SHAPE, anatomy.n_heads, d)
        heads[layer] = a, moved
        written.add_heads(layer, a, moved)
        row = edges.mlp(layer)
        plain[row] = some(*SHAPE, d)
        written.add(row, plain[row])
    columns = [*range(edges.inputs(2, "q").start, edges.inputs(2, "mlp").start)]
    columns.append(edges.inputs(0, "logits").start)
    removed[:, :, columns[:-1]] &= edges.mask[:, columns[:-1]]
    got = written.change(slice(columns[-1], columns[-1] + 1))
    want = _slowly(anatomy, edges, removed, plain, heads, columns[-1])
    # a and the heads are rounded to 24 bits before they cancel, and what is left is scaled up
    assert torch.allclose(got[..., 0, :].double(), want, rtol=0, atol=2e-5 / left**0.5)
    assert not got[1].any(), "a circuit that lacks nothing"
