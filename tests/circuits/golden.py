"""Attribution graphs that circuit-tracer made, and the model and transcoders that they belong to.

``tests/benchmarks/circuit_tracer_golden.py`` wrote the file; its docstring has every definition. Here the
model is rebuilt as a ``HookedTransformer``, unfolded, and the transcoders as SAELens objects.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

FILE = Path(__file__).parent / "data/circuit_tracer_golden.safetensors"
CASES = ("normalized", "gained", "skip")
"""Read the norm's output without its gain, with it, and with it beside an affine skip."""


@dataclass(frozen=True)
class Pruned:
    """What ``prune_graph`` keeps at a pair of thresholds."""

    node_threshold: float
    edge_threshold: float
    node_mask: torch.Tensor
    """Nodes ``[n]``."""
    edge_mask: torch.Tensor
    """Edges ``[target, source]``."""


@dataclass(frozen=True)
class Golden:
    """One prompt, and circuit-tracer's graph of it.

    Nodes, in the order of every axis here: features by (layer, position, index), errors by (layer,
    position), tokens, logits by probability. Features and errors at position 0 count as zero.
    """

    model: Any
    """``HookedTransformer``, frozen; shared by the cases, never change it."""
    transcoders: list[Any]
    """One SAELens JumpReLU transcoder a layer; never change them."""
    tokens: torch.Tensor
    """``[pos]``, BOS first."""
    logits: torch.Tensor
    """Of the bare model, after the soft-cap ``[pos, d_vocab]``."""
    active_features: torch.Tensor
    """Layer, position and index of every feature node ``[n_features, 3]``."""
    activation_values: torch.Tensor
    """Their activations."""
    logit_tokens: torch.Tensor
    """Targets at the last position, the most probable first."""
    logit_probabilities: torch.Tensor
    """After the soft-cap."""
    adjacency: torch.Tensor
    """Direct effects ``[target, source]``; rows of errors and tokens are zero."""
    node_influence: torch.Tensor
    """Of every node on the logits; 0 for the logits themselves."""
    cumulative_scores: torch.Tensor
    """Share of all influence that this and the more influential nodes have: small is important."""
    pruned: tuple[Pruned, ...]
    """At several pairs of thresholds."""
    replacement_score: float
    completeness_score: float

    @property
    def n_features(self) -> int:
        """Number of feature nodes."""
        return len(self.active_features)

    @property
    def features(self) -> slice:
        """Feature nodes on an axis."""
        return slice(0, self.n_features)

    @property
    def errors(self) -> slice:
        """Error nodes on an axis."""
        start = self.n_features
        return slice(start, start + len(self.transcoders) * len(self.tokens))

    @property
    def embeddings(self) -> slice:
        """Token nodes on an axis."""
        return slice(self.errors.stop, self.errors.stop + len(self.tokens))

    @property
    def targets(self) -> slice:
        """Logit nodes on an axis."""
        return slice(self.embeddings.stop, self.embeddings.stop + len(self.logit_tokens))


@cache
def golden(case: str) -> Golden:
    """One of ``CASES``."""
    tensors, words = _read()
    arrays = _below(tensors, case)
    numbers = words["cases"][case]
    n = numbers["nodes"]
    nonzero = _bits(arrays["adjacency_bits"], n * n).reshape(n, n)
    adjacency = torch.zeros(n, n)
    adjacency[nonzero] = arrays["adjacency_values"]
    pruned = []
    for i, (node_threshold, edge_threshold) in enumerate(words["thresholds"]):
        edges = torch.zeros(n, n, dtype=torch.bool)
        edges[nonzero] = _bits(arrays[f"prune.{i}.edge_bits"], int(nonzero.sum()))
        pruned.append(Pruned(node_threshold, edge_threshold, arrays[f"prune.{i}.node_mask"], edges))
    return Golden(
        model=_model(),
        transcoders=[_transcoder(case, layer) for layer in range(words["config"]["n_layers"])],
        tokens=tensors["tokens"],
        logits=tensors["logits"],
        active_features=arrays["active_features"].long(),
        activation_values=arrays["activation_values"],
        logit_tokens=arrays["logit_tokens"],
        logit_probabilities=arrays["logit_probabilities"],
        adjacency=adjacency,
        node_influence=arrays["node_influence"],
        cumulative_scores=arrays["cumulative_scores"],
        pruned=tuple(pruned),
        replacement_score=numbers["replacement_score"],
        completeness_score=numbers["completeness_score"],
    )


@lru_cache
def _read() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors of the file, and its words."""
    with safe_open(FILE, framework="pt") as file:
        words = json.loads(file.metadata()["golden"])
        return {name: file.get_tensor(name) for name in file.keys()}, words  # noqa: SIM118


def _below(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose name begins with this and a dot, without it."""
    prefix += "."
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _bits(packed: torch.Tensor, count: int) -> torch.Tensor:
    """A mask from eight entries a byte."""
    return torch.from_numpy(np.unpackbits(packed.numpy(), count=count)).bool()


@lru_cache
def _model() -> Any:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    tensors, words = _read()
    model = HookedTransformer(HookedTransformerConfig(**words["config"]), move_to_device=False)
    missing, unexpected = model.load_state_dict(_below(tensors, "model"), strict=False)
    # Masks and rotary tables follow from the config.
    lacking = set(missing) & {name for name, _ in model.named_parameters()}
    assert not unexpected and not lacking, f"weights that do not fit: {unexpected}, {lacking}"
    return model.eval().requires_grad_(False)


def _transcoder(case: str, layer: int) -> Any:
    from sae_lens import SAE

    tensors, words = _read()
    state = _below(tensors, f"transcoders.{case}.{layer}")
    hooks = words["cases"][case]
    name = "jumprelu_skip_transcoder" if "W_skip" in state else "jumprelu_transcoder"
    d_in, d_sae = state["W_enc"].shape
    config = {
        "architecture": name,
        "d_in": d_in,
        "d_out": state["W_dec"].shape[1],
        "d_sae": d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "hook_name": f"blocks.{layer}.{hooks['hook_in']}",
            "hook_name_out": f"blocks.{layer}.{hooks['hook_out']}",
            "model_name": words["config"]["model_name"],
        },
    }
    sae_class: Any = SAE.get_sae_class_for_architecture(name)
    made = sae_class(SAE.get_sae_config_class_for_architecture(name).from_dict(config))
    made.load_state_dict(state)
    return made.eval().requires_grad_(False)
