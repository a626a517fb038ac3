"""How many prompts ride one forward pass within a budget of memory.

Counted per row (one prompt) of a pass without gradients, where one block is alive at a time:

========== =============================================================================================
stream     ``STREAM`` tensors ``[pos, d_model]``: the stream, what is beside it, norms
attention  ``HEADS`` tensors ``[pos, head, d_head]``: queries, keys, values, ``z``, their copies
scores     ``SCORES`` tensors ``[head, pos, pos]``: raw, capped, masked, softmax
MLP        ``MLP`` tensors ``[pos, d_mlp]``: gate, its activation, up, their product
dictionary ``CODES`` tensors ``[pos, d_sae]`` of the widest, where some are spliced in
patch      one more copy of the patched activation
logits     ``LOGITS`` tensors ``[d_vocab]``, at one position only, where the metric reads all of them
========== =============================================================================================

Attention, MLP and dictionary are not at work together: the largest counts. Beside the rows lie, as long
as the sweep lasts, the activations of both runs at the patched hooks, what is made of them, and the
streams, keys and values from which it restarts. Weights are not counted, they are there already; nor are
tiles of the vocabulary, which most metrics need or not even that, and whose size knows no rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemmascope_plugin.arguments import human_size, parse_size
from gemmascope_plugin.causes.bound_task import BoundTask
from gemmascope_plugin.causes.components import COMPONENTS, sizes_of
from gemmascope_plugin.errors import GemmaScopeError, UnknownNameError
from gemmascope_plugin.models.asked import has_hooks
from gemmascope_plugin.models.points import n_heads, n_layers
from gemmascope_plugin.models.protocol import HookedModel, dtype_of

STREAM, HEADS, SCORES, MLP, CODES, LOGITS = 8, 8, 4, 4, 3, 4
"""Tensors of each kind that are alive at once."""


@dataclass(frozen=True)
class Limit:
    """How large a forward pass may be: rows, and bytes, a text such as ``"2 GB"``, or None."""

    max_rows: int
    memory: int | str | None = None

    def __post_init__(self) -> None:
        parse_size(self.memory)
        if self.max_rows < 1:
            raise UnknownNameError(
                f"max_rows={self.max_rows} leaves no row", exists="1, 2, 3, ... rows"
            )

    def rows(self, need: Footprint) -> int:
        """Rows of a pass."""
        budget = parse_size(self.memory)
        if budget is None:
            return self.max_rows
        fitting = (budget - need.fixed) // need.row
        if fitting < 1:
            raise GemmaScopeError(
                f"The memory budget of {human_size(budget)} is too small: activations take about "
                f"{human_size(need.fixed)}, and each prompt of a forward pass {human_size(need.row)}",
                fix=f"memory_budget={need.fixed + need.row:_} or more, fewer or shorter prompts, or "
                "fewer layers",
            )
        return min(self.max_rows, fitting)


@dataclass(frozen=True)
class Footprint:
    """Bytes that a sweep needs."""

    fixed: int
    """As long as it lasts."""
    row: int
    """For each row of a forward pass."""


def footprint(
    model: HookedModel,
    component: str,
    bound: BoundTask,
    hooks: Sequence[str],
    sites: Mapping[str, Any],
) -> Footprint:
    """What a sweep needs, estimated from the sizes of the model."""
    cfg, (n_prompts, n_pos) = model.cfg, bound.clean.shape
    codes = [site.d_sae for site in sites.values()]
    patched = _entries(model, component, n_pos, sites)
    stream = n_pos * int(cfg.d_model)
    scores = SCORES * n_pos * n_pos * (n_heads(model) + 1)  # and the mask
    attention = HEADS * n_pos * n_heads(model) * int(cfg.d_head) + scores
    work = max(attention, MLP * n_pos * int(cfg.d_mlp), CODES * n_pos * max(codes, default=0))
    row = STREAM * stream + work + max(patched) + logits_held(model, bound)
    copies = 3 if COMPONENTS[component].reads is None else 4
    activations = sum(patched) if sites else patched[0] * len(hooks)
    n_kv = int(getattr(cfg, "n_key_value_heads", None) or n_heads(model))
    streams = 2 * (n_layers(model) + 1) * stream  # before and within each layer
    earlier = 2 * n_layers(model) * n_pos * n_kv * int(cfg.d_head)  # keys and values
    fixed = n_prompts * (copies * activations + streams + earlier)
    size = max(4, dtype_of(model).itemsize)  # norms and softmax are taken in float32
    return Footprint(size * fixed, size * row)


def logits_held(model: HookedModel, bound: BoundTask) -> int:
    """Logits of a row that are alive at once: all of them, in copies, or none that would count.

    A hook at the logits is shown all of them.
    """
    unembed: Any = model.unembed  # pyright: ignore[reportAttributeAccessIssue]
    if bound.metric.metric.reads_all_logits or has_hooks(unembed.hook_out):
        return LOGITS * int(model.cfg.d_vocab)
    return 0


def _entries(model: HookedModel, component: str, n_pos: int, sites: Mapping[str, Any]) -> list[int]:
    """Numbers per prompt at each site, or at one hook of the model."""
    if sites:
        features = "feature" in COMPONENTS[component].dims
        return [n_pos * (s.d_sae if features else s.widths[1]) for s in sites.values()]
    kind = COMPONENTS[component]
    n = 1
    sizes = sizes_of(model, component, n_pos)
    for dim in kind.dims:
        n *= sizes[dim]
    widths = {"pos": n_pos, "d_model": model.cfg.d_model, "d_head": model.cfg.d_head, None: 1}
    return [n * int(widths[kind.width])]
