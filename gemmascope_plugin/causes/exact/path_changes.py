"""What a set of senders does: tensors that take their value from the other run, and fixed differences.

1. Embedding, heads, MLPs and streams take the value that they have in the other run.
2. A feature sends ``s * (a' - a) W_dec[f]`` at each output of its dictionary, with the token's scale
   ``s`` (1 for most dictionaries, see ``saes/coder.py``) and the activation ``a`` of the base run.

Cost: a forward pass of each run to read the features, where there are any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from jaxtyping import Float, Int

from gemmascope_plugin.causes.components import Runner, acts_hook, is_z, sites_in, stream_time
from gemmascope_plugin.causes.names import Stream
from gemmascope_plugin.errors import TaskError, UnknownNameError, check_choice, check_feature
from gemmascope_plugin.graphs.node import Node
from gemmascope_plugin.models.points import restore_heads
from gemmascope_plugin.models.protocol import model_of
from gemmascope_plugin.models.record import hooking
from gemmascope_plugin.splice.hooked_site import HookedSite
from gemmascope_plugin.splice.spliced_model import SplicedModel

Sender = Node | Stream


@dataclass(frozen=True, eq=False)
class Change:
    """What one set of senders does to a run."""

    replaced: Mapping[str, tuple[int, ...] | None]
    """Hook to the heads that take their value from the other run; None for the whole tensor."""
    added: Mapping[str, Float[torch.Tensor, "prompt pos ..."]]
    """Hook to a fixed difference."""


def changes_of(
    runner: Runner,
    groups: Sequence[tuple[Sender, ...]],
    base: Int[torch.Tensor, "prompt pos"],
    other: Int[torch.Tensor, "prompt pos"],
) -> list[Change]:
    """The change that each set of senders makes."""
    check_senders(runner, groups)
    features = list(dict.fromkeys(s for group in groups for s in group if is_feature(s)))
    sent = _sent(runner, features, base, other) if features else {}
    changes = []
    for group in groups:
        replaced: dict[str, tuple[int, ...] | None] = {}
        added: dict[str, torch.Tensor] = {}
        for sender in group:
            if isinstance(sender, Node) and sender.kind == "feature":
                for hook, value in _written_by(runner, sender, sent[sender]).items():
                    added[hook] = added[hook] + value if hook in added else value
            elif isinstance(sender, Node) and sender.kind == "head":
                replaced[sender.hook] = (*(replaced.get(sender.hook) or ()), sender.index)
            else:
                replaced[sender.hook] = None
        changes.append(Change(replaced, added))
    return changes


def hooks_of(runner: Runner, groups: Sequence[tuple[Sender, ...]]) -> tuple[set[str], set[str]]:
    """Hooks that sets of senders replace, and those that their features add to."""
    senders = [sender for group in groups for sender in group]
    replaced = {sender.hook for sender in senders if not is_feature(sender)}
    outputs = [_outputs(runner, s) for s in senders if isinstance(s, Node) and is_feature(s)]
    return replaced, set().union(*outputs)


def check_senders(runner: Runner, groups: Sequence[tuple[Sender, ...]]) -> None:
    """Refuses sets that cannot send."""
    for sender in (sender for group in groups for sender in group):
        check_sender(runner, sender)
    for group in groups:
        _check_apart(runner, group)


def is_feature(node: object) -> TypeGuard[Node]:
    """Whether a sender or a reader's node is a feature."""
    return isinstance(node, Node) and node.kind == "feature"


def site_of(runner: Runner, node: Node) -> HookedSite:
    """The site of a feature."""
    name = node.label.rpartition("/")[0]
    sites = sites_in(runner)
    if not sites:
        raise UnknownNameError(
            f"{node.label} is a feature and no dictionary was given",
            fix="saes=[gemmascope_plugin.load(spec)]",
        )
    check_choice("dictionary site", name, sites)
    check_feature(node.index, sites[name].d_sae, name)
    return sites[name]


def check_sender(runner: Runner, sender: Sender) -> None:
    """Refuses what sends nothing to the stream."""
    if is_feature(sender):
        stream_time(site_of(runner, sender).hook_out)
    elif isinstance(sender, Node) and sender.kind in ("logits", "kv"):
        raise UnknownNameError(
            f"{sender.label} writes nothing to the stream",
            exists="embed, heads L0H0, MLPs MLP0, streams blocks.0.hook_resid_pre, features",
        )


def first_time(runner: Runner, sender: Sender) -> int:
    """When a sender first changes the stream, in half layers."""
    if is_feature(sender):
        return stream_time(site_of(runner, sender).hook_out)
    return stream_time(sender.hook)


def _check_apart(runner: Runner, group: tuple[Sender, ...]) -> None:
    """Refuses a component beside features of what it writes: it would send them twice."""
    for node in group:
        if not is_feature(node):
            continue
        hooks = _outputs(runner, node)
        hooks |= {h.replace("hook_attn_out", "attn.hook_z") for h in hooks}
        whole = next((s for s in group if not is_feature(s) and s.hook in hooks), None)
        if whole is not None:
            raise TaskError(
                f"{node.label} is a part of {whole.label}, so the set sends it twice",
                fix="one of the two in a set",
            )


def _outputs(runner: Runner, node: Node) -> set[str]:
    """Output hooks of a feature."""
    return {site.hook_out for site, _ in _decoders(runner, site_of(runner, node))}


def _decoders(runner: Runner, site: HookedSite) -> list[tuple[HookedSite, int]]:
    """Where the features of a site write: sites, and the position of theirs in the dictionary."""
    assert isinstance(runner, SplicedModel), "a feature has a dictionary"
    for dictionary in runner.saes:
        for position, output in enumerate(dictionary.sites):
            if output is site:
                return [(later, position) for later in dictionary.sites[position:]]
    raise AssertionError(f"{site.name} belongs to no dictionary")


def _written_by(
    runner: Runner, node: Node, amount: Float[torch.Tensor, "prompt pos"]
) -> dict[str, torch.Tensor]:
    """Hook to what a feature writes there when it changes by ``amount``."""
    out: dict[str, torch.Tensor] = {}
    for site, position in _decoders(runner, site_of(runner, node)):
        row = site.decoder_from(position)[node.index].detach().to(amount.device, amount.dtype)
        value = amount[..., None] * row
        if is_z(site.hook_out):
            cfg = model_of(runner).cfg
            like = value.new_empty(*amount.shape, int(cfg.n_heads), int(cfg.d_head))
            value = restore_heads(value, like)
        out[site.hook_out] = value
    return out


def _sent(
    runner: Runner, features: Sequence[Any], base: torch.Tensor, other: torch.Tensor
) -> dict[Any, Float[torch.Tensor, "prompt pos"]]:
    """``s * (a' - a)`` of each feature."""
    base_acts, scales = _columns(runner, features, base)
    other_acts, _ = _columns(runner, features, other)
    return {node: (other_acts[node] - base_acts[node]) * scales[node] for node in features}


@torch.no_grad()
def _columns(
    runner: Runner, features: Sequence[Node], tokens: torch.Tensor
) -> tuple[dict[Node, torch.Tensor], dict[Node, torch.Tensor]]:
    """Activations of some features, and the scales of their tokens; nothing else is kept."""
    acts: dict[Node, torch.Tensor] = {}
    scales: dict[Node, torch.Tensor] = {}
    by_site: dict[str, list[Node]] = {}
    for node in features:
        by_site.setdefault(site_of(runner, node).name, []).append(node)

    def keep(nodes: list[Node]) -> Any:
        def hook_fn(x: torch.Tensor, hook: object) -> None:
            for node in nodes:
                acts[node] = x[..., node.index].clone()

        return hook_fn

    def measure(nodes: list[Node]) -> Any:
        def hook_fn(x: torch.Tensor, hook: object) -> None:
            scale = site_of(runner, nodes[0]).weights.scale(x)
            ones = torch.ones_like(x[..., 0])
            scales.update(dict.fromkeys(nodes, ones if scale is None else scale[..., 0]))

        return hook_fn

    hooks = [(acts_hook(name), keep(nodes)) for name, nodes in by_site.items()]
    hooks += [(f"{name}.hook_sae_input", measure(nodes)) for name, nodes in by_site.items()]
    with hooking(runner, fwd_hooks=hooks):
        runner(tokens)
    return acts, scales
