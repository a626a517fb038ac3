"""Token columns of an attribution graph on a real Gemma 3: circuit-tracer's nnsight backend, and ours.

circuit-tracer 0.5.0 traces Gemma 3 on its nnsight backend only. There the source of a token node is a row
of the embedding matrix, while the model multiplies these rows by ``sqrt(d_model)``: what a token does to
a feature comes out too small by that factor. The truth is what the encoder reads when the token's part of
the stream is followed through frozen attention and norms, which is linear: rows sum to pre-activations.

Three steps, since circuit-tracer wants an older transformers and an environment of its own:

    python -m tests.benchmarks.real_gemma_token_columns prepare FOLDER
    python -m venv PEER && PEER/bin/pip install circuit-tracer==0.5.0 'nnsight<0.7'
    PEER/bin/python tests/benchmarks/real_gemma_token_columns.py peer FOLDER
    python -m tests.benchmarks.real_gemma_token_columns compare FOLDER

Transcoders are random, fitted to the norms of the model, one for each layer.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

PROMPT = "The capital of France is"
D_SAE = 64
HOOKS = ("ln2.hook_normalized", "hook_mlp_out")
WEIGHTS = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
CASE, GRAPH = "case.safetensors", "peer.npz"


def prepare(folder: Path) -> None:
    """Transcoders, tokens, and where the model lies."""
    from gemmascope_plugin import load_model
    from gemmascope_plugin.models.gguf_folder import converted_package
    from tests.support.real_saes import fitted_transcoders

    folder.mkdir(parents=True, exist_ok=True)
    model: Any = load_model("gemma-3-270m", source="package")
    tensors = {"tokens": model.to_tokens(PROMPT)[0]}
    for layer, sae in enumerate(fitted_transcoders(model, D_SAE)):
        tensors |= {f"{layer}.{name}": getattr(sae, name).detach().clone() for name in WEIGHTS}
    facts = {"model": str(converted_package()), "n_layers": str(model.cfg.n_layers)}
    save_file(tensors, folder / CASE, metadata=facts)


def read_case(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and facts of a prepared case."""
    from safetensors import safe_open

    with safe_open(folder / CASE, "pt") as file:
        facts = dict(file.metadata())
    return load_file(folder / CASE), facts


def peer(folder: Path) -> None:
    """circuit-tracer's graph."""
    from circuit_tracer import attribute
    from circuit_tracer.replacement_model.replacement_model_nnsight import NNSightReplacementModel
    from circuit_tracer.transcoder.activation_functions import JumpReLU
    from circuit_tracer.transcoder.single_layer_transcoder import (
        SingleLayerTranscoder,
        TranscoderSet,
    )

    tensors, facts = read_case(folder)
    made = {}
    for layer in range(int(facts["n_layers"])):
        weights = {name: tensors[f"{layer}.{name}"] for name in WEIGHTS}
        d_model, d_sae = weights["W_enc"].shape
        act = JumpReLU(weights.pop("threshold"))
        transcoder = SingleLayerTranscoder(d_model, d_sae, act, layer, dtype=torch.float32)
        weights["W_enc"] = weights["W_enc"].T
        for name, value in weights.items():
            getattr(transcoder, name).data = value.contiguous()
        made[layer] = transcoder
    transcoders = TranscoderSet(made, *HOOKS, scan="random")
    model = NNSightReplacementModel.from_pretrained_and_transcoders(
        facts["model"], transcoders, device="cpu"
    )
    graph = attribute(tensors["tokens"], model, batch_size=64, max_feature_nodes=None)
    np.savez(
        folder / GRAPH,
        adjacency=graph.adjacency_matrix.numpy(),
        features=graph.active_features.numpy(),
    )
    print(f"circuit-tracer: {len(graph.active_features)} features")


def compare(folder: Path) -> None:
    """Their entries against ours, by kind of source."""
    from gemmascope_plugin import load_model, trace
    from tests.factories import random_sae

    tensors, facts = read_case(folder)
    tokens, saes = tensors["tokens"], []
    for layer in range(int(facts["n_layers"])):
        weights = {name: tensors[f"{layer}.{name}"] for name in WEIGHTS}
        hook_in, hook_out = (f"blocks.{layer}.{hook}" for hook in HOOKS)
        d_in, d_sae = weights["W_enc"].shape
        sae = random_sae(d_in, d_sae, hook_in, hook_out, d_out=d_in)
        for name, value in weights.items():
            getattr(sae, name).data = value
        saes.append(sae)
    graph = trace(load_model("gemma-3-270m", source="package"), tokens, saes)
    peer_graph = np.load(folder / GRAPH)
    places = {
        (row.kind, row.layer, row.pos, row.index): place
        for place, row in enumerate(graph.nodes.itertuples(index=False))
    }
    ids, n_layers = tokens.tolist(), int(facts["n_layers"])
    features = [("feature", *map(int, row)) for row in peer_graph["features"]]
    words = [("token", -1, pos, token) for pos, token in enumerate(ids)]
    first = len(features) + n_layers * len(ids)
    columns = {
        "features": (features, range(len(features))),
        "tokens": (words, range(first, first + len(words))),
    }
    dense = graph.adjacency.toarray()
    rows = [places[key] for key in features]
    residual = graph.metadata["residual"]
    print(f"{len(features)} features, rows sum to pre-activations within {residual:.1e}")
    for kind, (keys, at) in columns.items():
        block = dense[np.ix_(rows, [places[key] for key in keys])]
        peers = peer_graph["adjacency"][: len(features)][:, list(at)]
        factor = float((block * peers).sum() / np.square(block).sum())
        rest = float(np.abs(peers - factor * block).max() / np.abs(peers).max())
        print(f"columns of {kind}: circuit-tracer's are {factor:.6f} of ours, rest {rest:.1e}")
    print(f"1 / sqrt(d_model) = {tensors['0.W_enc'].shape[0] ** -0.5:.6f}")
    print(json.dumps({"replacement": graph.scores.replacement}))


if __name__ == "__main__":
    {"prepare": prepare, "peer": peer, "compare": compare}[sys.argv[1]](Path(sys.argv[2]))
