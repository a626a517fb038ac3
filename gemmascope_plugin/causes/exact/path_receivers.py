"""Gives receivers a changed input in the base run; everything after them is recomputed.

With ``x`` the stream that a receiver reads in this very pass and ``d`` what is added to it for this
receiver alone:

=============== ==================================================================================
receiver        what is done
=============== ==================================================================================
``L1H3.q``      ``hook_q[:, :, h] += (ln1(x + d) - ln1(x)) W_Q[h]``
``L1KV0.k, .v`` the same at ``hook_k`` and ``hook_v``, for every query head of the group
``L1H3.v``      ``hook_z[:, :, h] += pattern[h] (ln1(x + d) - ln1(x)) W_V``, for one head's copy
``L1H3.k``      the pattern of that head is that of a pass in which its group's key has changed
``MLP2``        what the MLP alone reads is that of ``x + d`` (``Anatomy.mlp_input``)
streams, logits ``d`` is added
features        ``a_f(x + d) - a_f(x)`` is added to the activation, the error being kept
=============== ==================================================================================

All before RoPE and before Gemma 3's norms of queries and keys. No hook that a flag switches on is needed.
Each pair of senders and receivers has rows of its own, so many ride in one forward pass.

Cost: one forward pass, and for ``L1H3.k`` one more up to each such layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from jaxtyping import Float

from gemmascope_plugin.causes.components import Runner, acts_hook, is_stream, layer_of
from gemmascope_plugin.causes.exact.path_changes import is_feature, site_of
from gemmascope_plugin.causes.names import Stream
from gemmascope_plugin.errors import TaskError, UnknownNameError
from gemmascope_plugin.graphs.node import Node, Reader
from gemmascope_plugin.models.anatomy import Anatomy
from gemmascope_plugin.models.protocol import wide
from gemmascope_plugin.models.record import hooking

Receiver = Reader | Stream
Edit = Callable[[torch.Tensor], None]
_WITH_GAIN, _WITHOUT_GAIN = (".mlp.hook_in", ".ln2.hook_out"), (".ln2.hook_normalized",)


@dataclass(frozen=True, eq=False)
class Delivery:
    """One receiver's changed input."""

    rows: slice
    """Rows of the pass."""
    receiver: Receiver
    difference: Float[torch.Tensor, "prompt pos d_model"]
    """``d``."""


def stream_of(runner: Runner, anatomy: Anatomy, receiver: Receiver) -> str:
    """Hook of the stream that a receiver reads."""
    if isinstance(receiver, Stream):
        return receiver.hook
    node = receiver.node
    if node.kind == "logits":
        return f"blocks.{anatomy.n_layers - 1}.hook_resid_post"
    if node.kind == "mlp":
        return f"blocks.{node.layer}.hook_resid_mid"
    if node.kind != "feature":
        return f"blocks.{node.layer}.hook_resid_pre"
    hook_in = site_of(runner, node).hook_in
    if is_stream(hook_in):
        return hook_in
    if hook_in.endswith(_WITH_GAIN + _WITHOUT_GAIN):
        return f"blocks.{layer_of(hook_in)}.hook_resid_mid"
    raise UnknownNameError(
        f"{node.label} belongs to a dictionary that reads {hook_in}, which is not a stream, so no path "
        "ends there",
        fix="the head or MLP that it decomposes, or a feature of a transcoder or of a stream",
    )


def check_overlap(group: Sequence[Receiver]) -> None:
    """Refuses two receivers of which one is a part of the other: its input would change twice."""
    copies = [r for r in group if isinstance(r, Reader) and r.node.kind == "head" and r.port != "q"]
    whole = [r for r in group if isinstance(r, Reader) and r.node.kind == "kv"]
    for copy in copies:
        for shared in whole:
            if (shared.node.layer, shared.port) == (copy.node.layer, copy.port):
                raise TaskError(
                    f"{copy.label} may be a copy of {shared.label}, whose heads all see the change",
                    fix="either key-value heads or copies of single heads in a set",
                )
    mlps = {r.node.hook for r in group if isinstance(r, Reader) and r.node.kind == "mlp"}
    for reader in group:
        if isinstance(reader, Reader) and is_feature(reader.node):
            mlp = reader.node.label.rpartition("/")[0].partition("[")[0]
            if mlp in mlps:
                raise TaskError(
                    f"{reader.label} is a part of MLP{layer_of(mlp)}, which is a receiver too",
                    fix="one of the two in a set",
                )


def delivering(
    runner: Runner, anatomy: Anatomy, deliveries: Sequence[Delivery], tokens: torch.Tensor
) -> list[tuple[str, Callable[..., Any]]]:
    """Hooks for one forward pass over ``tokens`` in which all deliveries arrive."""
    patterns: dict[tuple[int, int, int], torch.Tensor] = {}
    copied = [(d, d.receiver.node) for d in deliveries if is_copy(d.receiver, "k")]
    for layer in sorted({node.layer for _, node in copied}):
        run = _Pass(runner, anatomy, patterns)
        run.deliver(deliveries, shared_keys=layer)
        run.watch(f"blocks.{layer}.attn.hook_pattern")
        with torch.no_grad(), hooking(runner, fwd_hooks=run.hooks()):
            runner(tokens, stop_at_layer=layer + 1)
        pattern = run.live[f"blocks.{layer}.attn.hook_pattern"]
        for d, node in copied:
            if node.layer == layer:
                patterns[layer, d.rows.start, node.index] = pattern[d.rows, node.index].clone()
    run = _Pass(runner, anatomy, patterns)
    run.deliver(deliveries)
    return run.hooks()


def is_copy(receiver: Receiver, port: str) -> TypeGuard[Reader]:
    """Whether a receiver is one head's copy of a key or value."""
    return isinstance(receiver, Reader) and receiver.node.kind == "head" and receiver.port == port


@dataclass(eq=False)
class _Pass:
    """The edits of one forward pass, by hook, and the tensors that they need from it."""

    runner: Runner
    anatomy: Anatomy
    patterns: Mapping[tuple[int, int, int], torch.Tensor]
    """Layer, first row and head to the pattern of a head whose copy of the key has changed."""
    live: dict[str, torch.Tensor] = field(default_factory=dict)
    edits: dict[str, list[Edit]] = field(default_factory=dict)

    def watch(self, hook: str) -> None:
        """Keeps the tensor at a hook, as it is after all edits there."""
        self.edits.setdefault(hook, [])

    def deliver(self, deliveries: Sequence[Delivery], shared_keys: int = -1) -> None:
        """Registers the edits.

        At the layer ``shared_keys`` copies of a key arrive at the whole group instead.
        """
        done: set[tuple[int, Reader]] = set()
        for d in deliveries:
            receiver = d.receiver
            if isinstance(receiver, Stream) or receiver.node.kind == "logits":
                self._edit(stream_of(self.runner, self.anatomy, receiver), self._plus(d))
            elif receiver.node.kind == "mlp":
                self._mlp(d)
            elif is_feature(receiver.node):
                self._feature(d)
            elif not is_copy(receiver, "k"):
                self._copied_value(d) if is_copy(receiver, "v") else self._input(d, receiver)
            elif receiver.node.layer == shared_keys:
                whole = Node.kv(receiver.node.layer, receiver.node.index // self.anatomy.group)
                if (d.rows.start, Reader(whole, "k")) not in done:
                    done.add((d.rows.start, Reader(whole, "k")))
                    self._input(d, Reader(whole, "k"))
            else:
                self._copied_key(d)

    def hooks(self) -> list[tuple[str, Callable[..., Any]]]:
        """One hook function per hook: edits a copy, then keeps it for later edits."""
        return [(name, self._hook(name, edits)) for name, edits in self.edits.items()]

    def _hook(self, name: str, edits: list[Edit]) -> Callable[..., Any]:
        def hook_fn(x: torch.Tensor, hook: object) -> torch.Tensor | None:
            if not edits:
                self.live[name] = x
                return None
            self.live[name] = copy = x.clone()
            for edit in edits:
                edit(copy)
            return copy

        return hook_fn

    def _edit(self, hook: str, edit: Edit) -> None:
        self.edits.setdefault(hook, []).append(edit)

    def _plus(self, d: Delivery) -> Edit:
        def edit(x: torch.Tensor) -> None:
            x[d.rows] += d.difference.to(x)

        return edit

    def _input(self, d: Delivery, reader: Reader) -> None:
        """Queries of a head, or keys or values of a key-value head."""
        layer, index, port = reader.node.layer, reader.node.index, reader.port
        change = self._projected(d, layer, port, index)

        def edit(x: torch.Tensor) -> None:
            x[d.rows, :, index] += change().to(x)

        self._edit(f"blocks.{layer}.attn.hook_{port}", edit)

    def _projected(
        self, d: Delivery, layer: int, port: str, index: int
    ) -> Callable[[], torch.Tensor]:
        """``(ln1(x + d) - ln1(x)) W``, once the pass has reached the layer."""
        stream = f"blocks.{layer}.hook_resid_pre"
        self.watch(stream)
        ln1 = self.anatomy.norm(layer, "ln1")
        assert ln1 is not None, "anatomy checks that blocks have norms"
        read = {"q": self.anatomy.W_Q, "k": self.anatomy.W_K, "v": self.anatomy.W_V}[port]
        weight = read(layer)[index]

        def change() -> torch.Tensor:
            x = wide(self.live[stream][d.rows])
            return (ln1(x + d.difference) - ln1(x)) @ weight

        return change

    def _copied_value(self, d: Delivery) -> None:
        assert isinstance(d.receiver, Reader)
        layer, head = d.receiver.node.layer, d.receiver.node.index
        change = self._projected(d, layer, "v", head // self.anatomy.group)
        pattern = f"blocks.{layer}.attn.hook_pattern"
        self.watch(pattern)

        def edit(z: torch.Tensor) -> None:
            added = change()  # at the keys that run in this pass, the last ones
            weights = wide(self.live[pattern][d.rows, head])[..., -added.shape[1] :]
            z[d.rows, :, head] += (weights @ added).to(z)

        self._edit(f"blocks.{layer}.attn.hook_z", edit)

    def _copied_key(self, d: Delivery) -> None:
        assert isinstance(d.receiver, Reader)
        layer, head = d.receiver.node.layer, d.receiver.node.index
        if (layer, d.rows.start, head) not in self.patterns:
            return  # a pass that ends before this layer

        def edit(pattern: torch.Tensor) -> None:
            pattern[d.rows, head] = self.patterns[layer, d.rows.start, head]

        self._edit(f"blocks.{layer}.attn.hook_pattern", edit)

    def _mlp(self, d: Delivery) -> None:
        assert isinstance(d.receiver, Reader)
        layer = d.receiver.node.layer
        stream, place = f"blocks.{layer}.hook_resid_mid", self.anatomy.mlp_input(layer)
        self.watch(stream)

        def edit(x: torch.Tensor) -> None:
            x[d.rows] = place.value(wide(self.live[stream][d.rows]) + d.difference).to(x)

        self._edit(place.hook, edit)

    def _feature(self, d: Delivery) -> None:
        assert isinstance(d.receiver, Reader)
        node = d.receiver.node
        site = site_of(self.runner, node)
        input_hook, stream = (
            f"{site.name}.hook_sae_input",
            stream_of(self.runner, self.anatomy, d.receiver),
        )
        self.watch(input_hook)
        self.watch(stream)
        weights, index = site.weights, torch.tensor([node.index], device=d.difference.device)

        def edit(acts: torch.Tensor) -> None:
            before = self.live[input_hook][d.rows]
            x = wide(self.live[stream][d.rows]) + d.difference
            after = self._read_by(site.hook_in, x).to(before)
            new, old = (weights.encode_features(x, index)[..., 0] for x in (after, before))
            acts[d.rows, :, node.index] += (new - old).to(acts)

        self._edit(acts_hook(site.name), edit)

    def _read_by(self, hook_in: str, x: torch.Tensor) -> torch.Tensor:
        """What a dictionary reads where the stream is ``x``."""
        if is_stream(hook_in):
            return x
        ln2 = self.anatomy.norm(layer_of(hook_in), "ln2")
        assert ln2 is not None, "anatomy checks that blocks have norms"
        return ln2(x) if hook_in.endswith(_WITH_GAIN) else (x / ln2.scale(x)).to(x.dtype)
