"""What takes the place of an activation: that of the other run, zero, a mean, or another prompt's.

================ ====================================================================================
``other``        the other run's activation at the same prompt and position
``zero``         zero
``mean``         the other run's mean at each position, over the prompts that reach it
``overall_mean`` the other run's mean over all tokens of all prompts, special tokens included
``resample``     the other run's activation of another prompt of the same length, at the same position
================ ====================================================================================

The other run is the clean one when denoising, the corrupted one when noising. Padding enters no mean.
The first four serve patches, edges and circuits alike; prompts are drawn for patches alone.

Of edges it is the writers of the stream that are replaced, and what the stream gains by it counts:

1. Heads are kept as ``z`` (``d_head`` numbers instead of ``d_model``); their results ``r_h = z_h W_O[h]``
   are formed for the tokens that are asked for.
2. Attention writes ``ln1_post(a)``, ``a = sum_h r_h + b_O``, which is **not linear** in one head.  The
   difference that one head makes, ``dr_h = r'_h - r_h``, has four forms:

   ``exact``     ``ln1_post(a + dr_h) - ln1_post(a)``: what the stream gets if this head alone changes
   ``jacobian``  ``J(a) dr_h``: with it, edge scores of a head sum to its node score exactly
   ``frozen``    ``gain * dr_h / s(a)``: the norm's scale taken as given
   ``naive``     ``dr_h``: the norm ignored. Wrong wherever there is one; for comparison only.

   They are the same in a model without a norm after attention. ``a`` and ``s`` are those of the run that
   is patched.
3. ``mlp_out`` and the embedding are what is added: their difference needs no correction.
4. Means are those of the whole task, also when it is run in parts.

Cost: one pass over the activations. Of writers two forward passes, one more over the task for means;
``tokens * writers * d_model`` numbers for the tokens that are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int

from gemmascope_plugin.causes.bound_task import BoundTask
from gemmascope_plugin.causes.components import COMPONENTS
from gemmascope_plugin.causes.replayed import Part, replayed
from gemmascope_plugin.errors import TaskError, check_choice
from gemmascope_plugin.graphs.edge_map import EdgeMap
from gemmascope_plugin.models.anatomy import Anatomy
from gemmascope_plugin.models.protocol import HookedModel, wide
from gemmascope_plugin.models.record import record
from gemmascope_plugin.types import Direction

Replacement = Literal["other", "zero", "overall_mean", "mean"]
REPLACEMENTS = get_args(Replacement)
PatchReplacement = Literal["other", "zero", "mean", "overall_mean", "resample"]
DeltaForm = Literal["exact", "jacobian", "frozen", "naive"]


def check_replacement(replacement: str, component: str) -> None:
    """Refuses what does not exist or has no meaning for a component."""
    check_choice("replacement", replacement, get_args(PatchReplacement))
    if replacement == "zero" and component.endswith("_scale"):
        raise TaskError("A norm cannot divide by zero", fix='replacement="mean"')
    if replacement == "zero" and COMPONENTS[component].reads is not None:
        raise TaskError(
            f"{component} is written as a difference, and the norm after it would blow up what "
            "rounding leaves of zero",
            fix='replacement="mean", or component="resid_post"',
        )
    if replacement == "overall_mean" and component == "pattern":
        raise TaskError(
            "The rows of an attention pattern have different lengths, their mean over positions is "
            "not a pattern",
            fix='replacement="mean", which is per position',
        )


@dataclass(eq=False)
class MaskedMean:
    """Mean of an activation over prompts, padding left out, from as many parts of them as come.

    Sums are float64: a mean over many tokens keeps the digits of its type.
    """

    over_positions: bool
    """Whether all positions get the mean over positions as well."""
    axes: tuple[int, int] = (0, 1)
    """Those of prompts and of positions."""
    total: Float[torch.Tensor, ...] | None = None
    count: Float[torch.Tensor, " pos"] = field(default_factory=lambda: torch.zeros(()))
    """Tokens in it, by position."""

    def add(self, x: Float[torch.Tensor, ...], mask: Bool[torch.Tensor, "prompt pos"]) -> None:
        """Adds prompts to the sum; ``mask`` is False at tokens that do not count."""
        weight = mask.to(x.device)
        shape = [1] * x.ndim
        shape[self.axes[0]], shape[self.axes[1]] = mask.shape
        counted = x * weight.reshape(shape).to(x.dtype)
        total = counted.sum(self.axes[0], keepdim=True, dtype=torch.float64)
        self.total = total if self.total is None else self.total + total
        self.count = self.count.to(total) + weight.sum(0)

    def value(self, dtype: torch.dtype) -> Float[torch.Tensor, ...]:
        """The mean, with one prompt and all positions; 0 where nothing was counted."""
        assert self.total is not None, "no prompts were added"
        total, count = self.total, self.count
        if self.over_positions:
            total = total.sum(self.axes[1], keepdim=True).expand_as(total)
            count = count.sum().expand_as(count)
        shape = [1] * total.ndim
        shape[self.axes[1]] = len(count)
        return (total / count.clamp(min=1).reshape(shape)).to(dtype)


def replaced(
    x: Float[torch.Tensor, "prompt ..."],
    mask: Bool[torch.Tensor, "prompt pos"],
    replacement: PatchReplacement,
    *,
    pos_axis: int = 1,
    seed: int = 0,
    rows_per_prompt: int = 1,
) -> Float[torch.Tensor, "prompt ..."]:
    """What is inserted at a hook, in the shape of the other run's activation ``x`` there.

    ``mask`` is False at padding. ``seed`` is that of ``resample``, the same for all hooks, so that they
    take from the same prompt. Rows next to each other may belong to one prompt.
    """
    if replacement == "other":
        return x
    if replacement == "zero":
        return torch.zeros_like(x)
    if replacement == "resample":
        return x[partners(mask.sum(1), seed, rows_per_prompt).to(x.device)]
    mean = MaskedMean(replacement == "overall_mean", (0, pos_axis))
    mean.add(x, mask)
    return mean.value(x.dtype).expand_as(x)


def partners(
    lengths: Int[torch.Tensor, " row"], seed: int, rows_per_prompt: int = 1
) -> Int[torch.Tensor, " row"]:
    """Another prompt of the same length for each prompt: a seeded permutation without fixed points.

    Prompts of one length are put on a circle in random order, and each gets its neighbour. Rows next to
    each other that belong to one prompt go to those of another.
    """
    generator = torch.Generator().manual_seed(seed)
    kinds, kind = (
        lengths.cpu().unflatten(0, (-1, rows_per_prompt)).unique(dim=0, return_inverse=True)
    )
    partner = torch.empty_like(kind)
    for i, sizes in enumerate(kinds.tolist()):
        group = (kind == i).nonzero().flatten()
        if len(group) == 1:
            raise TaskError(
                f"Prompt {int(group[0])} is the only one of {' and '.join(map(str, sizes))} tokens, "
                "there is no other to take activations from",
                fix='more prompts, or replacement="other"',
            )
        circle = group[torch.randperm(len(group), generator=generator)]
        partner[circle] = circle.roll(1)
    return (partner[:, None] * rows_per_prompt + torch.arange(rows_per_prompt)).flatten()


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
    direction: Direction,
    n_layers: int,
    replacement: Replacement,
    *,
    rows: int,
    size: int,
) -> Iterator[tuple[Part, Writes]]:
    """The parts of a task, with what replaces the writers of each.

    ``rows`` are the prompts of one pass for means, ``size`` those of a part at most.
    """
    check_choice("replacement", replacement, REPLACEMENTS)
    names, is_other = Writes.hooks(n_layers), replacement == "other"
    means = None
    if replacement in ("mean", "overall_mean"):
        others = ((part.runs(direction)[1], part.mask) for part in bound.parts(rows))
        means = _means(runner, others, n_layers, replacement == "overall_mean")
    parts = replayed(
        runner,
        bound,
        *bound.runs(direction),
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
