"""What every writer of a run adds to the residual stream, and how that differs from another run.

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

``a`` and ``s`` are those of the base run, the run that is patched.

Cost: two forward passes; ``tokens * writers * d_model`` numbers for the tokens that are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int

from gemmascope_plugin.causes.nodes import read
from gemmascope_plugin.graphs.edge_map import EdgeMap
from gemmascope_plugin.models.anatomy import Anatomy
from gemmascope_plugin.models.precision import wide

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
    def read(cls, runner: Any, tokens: Int[torch.Tensor, "row pos"], n_layers: int) -> Writes:
        """From one forward pass."""
        return cls.of(read(runner, tokens, cls.hooks(n_layers)), n_layers)

    def map(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> Writes:
        """Another run, made from this one."""
        return Writes(fn(self.embed), fn(self.z), fn(self.mlp))

    def window(self, positions: slice) -> Writes:
        """Some positions."""
        return Writes(self.embed[:, positions], self.z[:, :, positions], self.mlp[:, :, positions])

    def tokens(self, index: slice) -> Writes:
        """Some tokens, rows and positions flattened, with one row."""
        z, mlp = self.z.flatten(1, 2)[:, index], self.mlp.flatten(1, 2)[:, index]
        return Writes(self.embed.flatten(0, 1)[None, index], z[:, None], mlp[:, None])


def write_deltas(
    anatomy: Anatomy, base: Writes, other: Writes, form: DeltaForm = "exact"
) -> Float[torch.Tensor, "row pos writer d_model"]:
    """How the stream changes if one writer alone changes from the base run to the other.

    Args:
        anatomy: The model's.
        base: The run that is patched.
        other: Where the new values come from.
        form: How a head's difference goes through the norm after attention.
    """
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
