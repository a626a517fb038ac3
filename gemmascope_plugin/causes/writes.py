"""What every writer of a run adds to the residual stream, what replaces it, and how they differ.

1. Heads are kept as ``z`` (``d_head`` numbers instead of ``d_model``); their results ``r_h = z_h W_O[h]``
   are formed for the tokens that are asked for.
2. Attention writes ``ln1_post(a)``, ``a = sum_h r_h + b_O``, which is **not linear** in one head.  The
   difference that one head makes, ``dr_h = r'_h - r_h``, has four forms:

   ``exact``     ``ln1_post(a + dr_h) - ln1_post(a)``: what the stream gets if this head alone changes
   ``jacobian``  ``J(a) dr_h``: with it, edge scores of a head sum to its node score exactly
   ``frozen``    ``gain * dr_h / s(a)``: the norm's scale taken as given
   ``naive``     ``dr_h``: the norm ignored. Wrong wherever there is one; for comparison only.

   They are the same in a model without a norm after attention.
3. ``mlp_out`` and the embedding are what is added: their difference needs no correction.
4. A writer is replaced by its value in the other run, by nothing or by a mean (``replace.py``); means are
   those of the whole task, also when it is run in parts.

``a`` and ``s`` are those of the base run, the run that is patched.

Cost: two forward passes, one more over the task for means; ``tokens * writers * d_model`` numbers for
the tokens that are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int

from gemmascope_plugin.causes.bound_task import BoundTask
from gemmascope_plugin.causes.replace import REPLACEMENTS, MaskedMean, Replacement
from gemmascope_plugin.causes.replayed import Part, replayed
from gemmascope_plugin.errors import check_choice
from gemmascope_plugin.graphs.edge_map import EdgeMap
from gemmascope_plugin.models.anatomy import Anatomy
from gemmascope_plugin.models.protocol import HookedModel, wide
from gemmascope_plugin.models.record import record

DeltaForm = Literal["exact", "jacobian", "frozen", "naive"]


@dataclass(frozen=True)
class Writes:
    """The writers' activations of one run, at least in float32; layers are the first axis."""

    embed: Float[torch.Tensor, "row pos d_model"]
    z: Float[torch.Tensor, "layer row pos head d_head"]
    mlp: Float[torch.Tensor, "layer row pos d_model"]

    @classmethod
    def hooks(cls, n_layers: int) -> list[str]:
        """Names of what is read, in the order of the forward pass."""
        layers = [
            (f"blocks.{layer}.attn.hook_z", f"blocks.{layer}.hook_mlp_out")
            for layer in range(n_layers)
        ]
        return ["hook_embed", *(name for pair in layers for name in pair)]

    @classmethod
    def of(cls, cache: Mapping[str, torch.Tensor], n_layers: int) -> Writes:
        """From activations by hook name."""
        names = cls.hooks(n_layers)
        z, mlp = (torch.stack([wide(cache[name]) for name in names[start::2]]) for start in (1, 2))
        return cls(wide(cache[names[0]]), z, mlp)

    @classmethod
    def read(
        cls, runner: HookedModel, tokens: Int[torch.Tensor, "row pos"], n_layers: int
    ) -> Writes:
        """From one forward pass."""
        return cls.of(record(runner, tokens, cls.hooks(n_layers)), n_layers)

    def map(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> Writes:
        """Another run, made from this one."""
        return Writes(fn(self.embed), fn(self.z), fn(self.mlp))

    def window(self, positions: slice) -> Writes:
        """Some positions."""
        return Writes(self.embed[:, positions], self.z[:, :, positions], self.mlp[:, :, positions])

    def repeated(self, rows: int, width: int) -> Writes:
        """One row as many, of the first positions."""
        return Writes(
            self.embed[:, :width].expand(rows, -1, -1),
            self.z[:, :, :width].expand(-1, rows, -1, -1, -1),
            self.mlp[:, :, :width].expand(-1, rows, -1, -1),
        )

    def tokens(self, index: slice) -> Writes:
        """Some tokens, rows and positions flattened, with one row."""
        z, mlp = self.z.flatten(1, 2)[:, index], self.mlp.flatten(1, 2)[:, index]
        return Writes(self.embed.flatten(0, 1)[None, index], z[:, None], mlp[:, None])


def write_deltas(
    anatomy: Anatomy, base: Writes, other: Writes, form: DeltaForm = "exact"
) -> Float[torch.Tensor, "row pos writer d_model"]:
    """How the stream changes if one writer alone changes from the base run to the other."""
    edges = EdgeMap.of(anatomy)
    row, pos, d = base.embed.shape
    out = base.embed.new_empty(row, pos, len(edges.writers), d)
    out[:, :, 0] = other.embed - base.embed
    for layer in range(anatomy.n_layers):
        dz = other.z[layer] - base.z[layer]
        out[:, :, edges.heads(layer)] = head_deltas(anatomy, layer, base.z[layer], dz, form)
        out[:, :, edges.mlp(layer)] = other.mlp[layer] - base.mlp[layer]
    return out


def head_deltas(
    anatomy: Anatomy,
    layer: int,
    z: Float[torch.Tensor, "row pos head d_head"],
    dz: Float[torch.Tensor, "row pos head d_head"],
    form: DeltaForm = "exact",
) -> Float[torch.Tensor, "row pos head d_model"]:
    """The same for the heads of one layer, each changing alone by ``dz``."""
    dr, post = anatomy.head_results(layer, dz), anatomy.norm(layer, "ln1_post")
    if post is None or form == "naive":
        return dr
    a = anatomy.head_sum(layer, z)[:, :, None]
    if form == "exact":
        return post(a + dr) - post(a)
    return post.jvp(a, dr) if form == "jacobian" else post.frozen(a, dr)


def replayed_writers(
    runner: HookedModel,
    bound: BoundTask,
    tokens: Callable[[BoundTask], tuple[torch.Tensor, torch.Tensor]],
    n_layers: int,
    replacement: Replacement,
    *,
    rows: int,
    size: int,
) -> Iterator[tuple[Part, Writes]]:
    """The parts of a task, with what replaces the writers of each.

    ``tokens`` gives those of the base run and of the other, of a part of the task; ``rows`` are the
    prompts of one pass for means, ``size`` those of a part at most.
    """
    check_choice("replacement", replacement, REPLACEMENTS)
    names, is_other = Writes.hooks(n_layers), replacement == "other"
    means = None
    if replacement in ("mean", "overall_mean"):
        others = ((tokens(part)[1], part.mask) for part in bound.parts(rows))
        means = _means(runner, others, n_layers, replacement == "overall_mean")
    parts = replayed(
        runner,
        bound,
        *tokens(bound),
        rows=size,
        base_points=names,
        other_points=names if is_other else (),
        whole=not is_other,
    )
    for part in parts:
        if is_other:
            yield part, Writes.of(part.other_acts, n_layers)
        elif means is None:
            yield part, Writes.of(part.base_acts, n_layers).map(torch.zeros_like)
        else:
            yield part, means.repeated(*part.bound.clean.shape)


def _means(
    runner: HookedModel,
    runs: Iterable[tuple[Int[torch.Tensor, "row pos"], Bool[torch.Tensor, "row pos"]]],
    n_layers: int,
    over_positions: bool,
) -> Writes:
    """Means of the writers over runs, with one row; the embedding has no layer axis in front."""
    embed, z, mlp = (MaskedMean(over_positions, axes) for axes in ((0, 1), (1, 2), (1, 2)))
    dtype = torch.float32
    for tokens, mask in runs:
        writes = Writes.read(runner, tokens, n_layers)
        dtype = writes.embed.dtype
        for mean, x in ((embed, writes.embed), (z, writes.z), (mlp, writes.mlp)):
            mean.add(x, mask)
    return Writes(embed.value(dtype), z.value(dtype), mlp.value(dtype))
