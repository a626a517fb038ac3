"""Runs the model with only some of its edges: every other reader input is the replaced writer's.

1. The clean prompts run through the model. Writers write what they compute **in this run**; a reader sees
   the live stream with, for every writer whose edge to it is removed, the replacement instead:

   ``x_v = x + sum_{MLP, embed u removed} (u' - u) + sum_layers [ln1_post(a + sum_h m_hv (r'_h - r_h)) -
   ln1_post(a)]``, ``m_hv = 1`` where the edge from head ``h`` is removed.

   The norm after attention makes the removed heads of a layer act together, not one by one: by its scale,
   and nothing else (4).
2. Queries, keys and values get ``(ln1(x_v) - ln1(x)) W`` added per head, keys and values per
   **key-value** head; an MLP its input; the logits the last residual stream.
3. Many circuits ride one pass on the batch axis. All edges kept is the clean run, none kept is the run of
   the replacements. A pass starts at the first reader that misses an edge, and at the first position
   where both runs differ (``causes/replayed.py``): writers below write what they wrote.
4. :class:`WriterChanges` has what readers miss, in a table of vectors per circuit and token: ``u' - u``
   of the embedding and of each MLP; of the heads of a layer their sum ``a`` and the differences
   ``dr_h = r'_h - r_h``, all times the gain of the norm behind them. A reader without the heads of the
   set ``m`` misses a combination of these, with the scales ``s`` of both: ``(1/s_m - 1/s_0) a + sum_h
   (m_h / s_m) dr_h``. The square of a scale is ``v^T G v / d_model + eps`` with ``v = (1, m)`` and ``G``
   the inner products of ``(a, dr_1, ...)``, which are formed once per layer and not once per reader.
   Heads that nearly cancel ``a`` cost digits there, so ``G`` is in float64. What all readers of a norm
   miss is then one product per token: coefficients times the table.

Cost: one row per circuit and prompt of what runs; ``2 * edges * d_model`` operations and
``(writers + layers) * d_model`` numbers per token and circuit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float

from gemmascope_plugin.causes.bound_task import BoundTask
from gemmascope_plugin.causes.exact.edge_patching import edge_footprint
from gemmascope_plugin.causes.memory import Limit
from gemmascope_plugin.causes.replace import Replacement, Writes, replayed_writers
from gemmascope_plugin.causes.replayed import Part
from gemmascope_plugin.graphs.edge_map import EdgeMap
from gemmascope_plugin.models.anatomy import Anatomy
from gemmascope_plugin.models.protocol import HookedModel, wide
from gemmascope_plugin.models.record import keep, write
from gemmascope_plugin.models.replay_points import Entry, Stage

MAX_ROWS = 512
"""Prompt copies in one pass by default."""
_PORTS = ("q", "k", "v")


@dataclass(frozen=True)
class EdgeAblation:
    """A task on a model of which some edges are removed; means are those of the corrupted run."""

    model: HookedModel
    bound: BoundTask
    replacement: Replacement = "other"
    limit: Limit = field(default_factory=lambda: Limit(MAX_ROWS, "2 GB"))
    anatomy: Anatomy = field(init=False)
    edges: EdgeMap = field(init=False)
    _parts: list[tuple[Part, Writes]] = field(init=False)

    def __post_init__(self) -> None:
        anatomy = Anatomy(self.model)
        object.__setattr__(self, "anatomy", anatomy)
        object.__setattr__(self, "edges", EdgeMap.of(anatomy))
        size = min(len(self.bound), self._rows)
        parts = replayed_writers(
            self.model,
            self.bound,
            "noising",
            anatomy.n_layers,
            self.replacement,
            rows=size,
            size=size,
        )
        object.__setattr__(self, "_parts", list(parts))

    @property
    def _rows(self) -> int:
        return self.limit.rows(edge_footprint(self.anatomy, self.bound))

    @torch.no_grad()
    def metric(
        self, is_kept: Bool[torch.Tensor, "circuit writer reader"], progress: bool = False
    ) -> Float[torch.Tensor, "circuit prompt"]:
        """The metric of every prompt under every circuit; outside of ``edges.mask`` nothing matters."""
        from tqdm.auto import tqdm

        with tqdm(
            total=len(is_kept) * len(self._parts), desc="circuits", disable=not progress
        ) as bar:
            values = torch.zeros(len(is_kept), len(self.bound))
            for part, other in self._parts:
                copies, done = max(1, self._rows // len(part.index)), 0
                for chunk in is_kept.split(copies):
                    rows = torch.arange(done, done + len(chunk))[:, None]
                    values[rows, part.index.cpu()] = self._measure(part, other, chunk).to(values)
                    done += len(chunk)
                    bar.update(len(chunk))
        return values

    def _measure(
        self, part: Part, other: Writes, is_kept: Bool[torch.Tensor, "circuit writer reader"]
    ) -> Float[torch.Tensor, "circuit part"]:
        removed = ~is_kept & self.edges.mask
        columns = removed.flatten(0, 1).any(0).nonzero().flatten()
        if not len(columns):
            return part.base.expand(len(is_kept), -1)
        first = self.edges.readers[int(columns[0])].node
        last = first.kind == "logits"
        layer = self.anatomy.n_layers - 1 if last else first.layer
        stage: Stage = "post" if last else "mid" if first.kind == "mlp" else "pre"
        window = part.replay.window(part.start)
        run = _Run(self.anatomy, self.edges, removed.to(part.index.device), other.window(window))
        run.start(Writes.of(part.base_acts, self.anatomy.n_layers).window(window), layer, stage)
        entry = Entry(layer, stage, len(is_kept), run.hooks())
        values = part.metric(part.replay.run(entry, window))
        return values.cpu()


class _Run:
    """One pass: what writers wrote so far, and what each reader must see instead of the stream."""

    def __init__(
        self,
        anatomy: Anatomy,
        edges: EdgeMap,
        removed: Bool[torch.Tensor, "circuit writer reader"],
        other: Writes,
    ) -> None:
        self.anatomy, self.edges, self.other = anatomy, edges, other
        self.any_removed = removed.any(0)
        self.n_circuits = len(removed)
        self.changes = WriterChanges(anatomy, edges, removed, other.embed)
        self.normed: tuple[int, torch.Tensor] | None = None
        """A layer, and what its heads see in its norm beyond the live stream."""
        self.stream: dict[str, torch.Tensor] = {}

    def start(self, base: Writes, layer: int, stage: Stage) -> None:
        """Takes what the writers below the first layer that runs write from the base run."""
        whole = layer == 0 and stage == "pre"
        if not whole:
            self._write(0, base.embed[None], self.other.embed)
        for below in range(layer + (stage != "pre")):
            self._attend(below, base.z[below][None])
            if below < layer or stage == "post":
                self._write(self.edges.mlp(below), base.mlp[below][None], self.other.mlp[below])

    def hooks(self) -> list[tuple[str, Callable[..., Any]]]:
        """Functions by hook name, in the order of the forward pass."""
        n, hooks = self.anatomy.n_layers, [("hook_embed", self._wrote(0, self.other.embed))]
        for layer in range(n):
            name = f"blocks.{layer}."
            row = self.edges.mlp(layer)
            hooks += [
                (f"{name}hook_resid_pre", keep(self.stream, "pre", self._by_circuit)),
                *((f"{name}attn.hook_{port}", self._read_heads(layer, port)) for port in _PORTS),
                (f"{name}attn.hook_z", self._attended(layer)),
                (f"{name}hook_resid_mid", keep(self.stream, "mid", self._by_circuit)),
                (self.anatomy.mlp_input(layer).hook, self._read_mlp(layer)),
                (f"{name}hook_mlp_out", self._wrote(row, self.other.mlp[layer])),
            ]
        return [*hooks, (f"blocks.{n - 1}.hook_resid_post", write(self._read_logits))]

    def _write(
        self,
        row: int,
        live: Float[torch.Tensor, "some prompt pos d_model"],
        other: Float[torch.Tensor, "prompt pos d_model"],
    ) -> None:
        if bool(self.any_removed[row].any()):
            self.changes.add(row, other - live)

    def _attend(self, layer: int, live: Float[torch.Tensor, "some prompt pos head d_head"]) -> None:
        if bool(self.any_removed[self.edges.heads(layer)].any()):
            moved = self.anatomy.head_results(layer, self.other.z[layer] - live)
            self.changes.add_heads(layer, self.anatomy.head_sum(layer, live), moved)

    def _wrote(
        self, row: int, other: Float[torch.Tensor, "prompt pos d_model"]
    ) -> Callable[..., None]:
        def hook_fn(x: torch.Tensor, hook: Any) -> None:
            self._write(row, self._by_circuit(x), other)

        return hook_fn

    def _attended(self, layer: int) -> Callable[..., None]:
        def hook_fn(z: torch.Tensor, hook: Any) -> None:
            self._attend(layer, self._by_circuit(z))

        return hook_fn

    def _read_heads(self, layer: int, port: str) -> Callable[..., Any]:
        weight = {"q": self.anatomy.W_Q, "k": self.anatomy.W_K, "v": self.anatomy.W_V}[port]
        readers = self.edges.inputs(layer, port)
        first = self.edges.inputs(layer, "q").start

        def read(values: torch.Tensor) -> torch.Tensor:
            if not bool(self.any_removed[:, readers].any()):
                return values
            change = self._normed(layer)[..., readers.start - first : readers.stop - first, :]
            add = torch.einsum("cbshm,hmd->cbshd", change, weight(layer))
            return (values + add.flatten(0, 1)).to(values.dtype)

        return write(read)

    def _normed(self, layer: int) -> Float[torch.Tensor, "circuit prompt pos reader d_model"]:
        """What queries, keys and values of a layer see in its norm beyond the live stream."""
        if self.normed is None or self.normed[0] != layer:
            ln1 = self.anatomy.norm(layer, "ln1")
            assert ln1 is not None, "models without it are refused"
            first, mlp = self.edges.inputs(layer, "q").start, self.edges.inputs(layer, "mlp").start
            x = self.stream["pre"][..., None, :]
            change = self.changes.change(slice(first, mlp))
            self.normed = layer, ln1(change.add_(x)).sub_(ln1(x))
        return self.normed[1]

    def _read_mlp(self, layer: int) -> Callable[..., Any]:
        mlp_input, readers = self.anatomy.mlp_input(layer), self.edges.inputs(layer, "mlp")

        def read(values: torch.Tensor) -> torch.Tensor:
            if not bool(self.any_removed[:, readers].any()):
                return values
            change = self.changes.change(readers)[..., 0, :]
            inputs = mlp_input.value(self.stream["mid"] + change)
            return inputs.flatten(0, 1).to(values.dtype)

        return write(read)

    def _read_logits(self, x: torch.Tensor) -> torch.Tensor:
        readers = self.edges.inputs(0, "logits")
        if not bool(self.any_removed[:, readers].any()):
            return x
        return (x + self.changes.change(readers)[..., 0, :].flatten(0, 1)).to(x.dtype)

    def _by_circuit(self, x: torch.Tensor) -> Float[torch.Tensor, "circuit prompt ..."]:
        return wide(x.detach()).unflatten(0, (self.n_circuits, -1))


class WriterChanges:
    """What has been written in one pass of several circuits, and what ``removed`` edges miss of it."""

    def __init__(
        self,
        anatomy: Anatomy,
        edges: EdgeMap,
        removed: Bool[torch.Tensor, "circuit writer reader"],
        like: Float[torch.Tensor, "prompt pos d_model"],
    ) -> None:
        self._anatomy, self._edges = anatomy, edges
        self._removed = removed.transpose(1, 2).to(like.dtype)
        n = len(edges.writers) + edges.n_layers
        self._table = like.new_zeros(len(removed), *like.shape[:2], n, like.shape[2])
        self._stop = 0
        """Vectors of the table that have been written; of others nothing is missing yet."""
        self._inner: dict[int, torch.Tensor] = {}
        """Layer to ``G`` of its heads ``[circuit, token, 1 + head, 1 + head]``."""

    def add(self, row: int, moved: Float[torch.Tensor, "some prompt pos d_model"]) -> None:
        """The embedding or an MLP has written: ``u' - u`` of each circuit, or one for all."""
        writer = self._edges.writers[row]
        place = row + (0 if writer.kind == "embed" else writer.layer + 1)
        self._table[:, :, :, place] = moved
        self._stop = max(self._stop, place + 1)

    def add_heads(
        self,
        layer: int,
        a: Float[torch.Tensor, "some prompt pos d_model"],
        moved: Float[torch.Tensor, "some prompt pos head d_model"],
    ) -> None:
        """The heads of a layer have written ``a`` together, before the norm behind; ``dr`` of each."""
        vectors, places = torch.cat([a[..., None, :], moved], -2), self._places(layer)
        post = self._anatomy.norm(layer, "ln1_post")
        if post is not None:
            exact = vectors.flatten(1, 2).double()
            self._inner[layer] = exact @ exact.transpose(-1, -2)
            if post.gain is not None:
                vectors = vectors * post.gain.to(vectors)
        self._table[:, :, :, places] = vectors
        self._stop = max(self._stop, places.stop)

    def change(self, readers: slice) -> Float[torch.Tensor, "circuit prompt pos reader d_model"]:
        """What readers of one norm see beyond the live stream."""
        removed, shape = self._removed[:, readers], self._table.shape[:3]
        n_tokens, n_readers = shape[1] * shape[2], removed.shape[1]
        share = removed.new_zeros(len(removed), n_tokens, n_readers, self._stop)
        share[..., :1] = removed[:, None, :, :1]
        for layer in range(self._edges.n_layers):
            places, mlp = self._places(layer), self._edges.mlp(layer)
            if places.start >= self._stop:
                break
            share[..., places] = self._of_heads(layer, removed)
            if places.stop < self._stop:
                share[..., places.stop] = removed[:, None, :, mlp]
        table = self._table[..., : self._stop, :].flatten(0, 2)
        return torch.bmm(share.flatten(0, 1), table).unflatten(0, shape)

    def _of_heads(
        self, layer: int, removed: Float[torch.Tensor, "circuit reader writer"]
    ) -> Float[torch.Tensor, "circuit token reader vector"]:
        """Coefficients of ``a`` and of each head."""
        without = removed[..., self._edges.heads(layer)]
        if layer not in self._inner:  # no norm, or nothing to miss
            return torch.nn.functional.pad(without, (1, 0))[:, None]
        post = self._anatomy.norm(layer, "ln1_post")
        assert post is not None, "inner products are those of a norm"
        v = torch.nn.functional.pad(without, (1, 0), value=1.0).double()
        pairs = (v[..., :, None] * v[..., None, :]).flatten(-2)
        inner = self._inner[layer].flatten(-2)
        d = self._table.shape[-1]
        inverse = (inner @ pairs.transpose(-1, -2) / d + post.eps).rsqrt()
        alone = (inner[..., :1] / d + post.eps).rsqrt()
        heads = inverse[..., None] * v[:, None, :, 1:]
        return torch.cat([(inverse - alone)[..., None], heads], -1).to(removed)

    def _places(self, layer: int) -> slice:
        """Where the heads of a layer are in the table, their sum before them."""
        heads = self._edges.heads(layer)
        return slice(heads.start + layer, heads.stop + layer + 1)
