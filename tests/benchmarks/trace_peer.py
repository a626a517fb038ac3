"""How long does circuit-tracer take for an attribution graph? The peer's half of the benchmark.

circuit-tracer wants an older transformers than this package, so it has an environment of its own:

    python -m venv PEER && PEER/bin/pip install circuit-tracer==0.5.0
    PEER/bin/python tests/benchmarks/trace_peer.py FOLDER [--batch-size 256] [--threads 2] [--repeat 3]
        [--adjacency FILE.npy]

``FOLDER`` is a case of ``trace_models.py``. One line of JSON is printed: ``seconds``, the median over
the repeats after one warm-up; ``cpu_seconds``, the same of the time that its threads ran; ``peak_mb``, by
how much the warm-up raised the largest memory of the process (one process a measurement, then);
``active_features``, ``nodes``, ``batch_size``, ``threads``, ``version``.

All active features get a row (``max_feature_nodes=None``). The adjacency has targets as rows and sources
as columns, both in the order

    features by (layer, position, index) | errors by (layer, position) | tokens | logits by probability.

Time it on an idle machine, and at more than one batch size, as the fastest one is not the largest. Two
threads that have to share their cores with other processes take up to ten times as long as one thread,
waiting for each other; where that cannot be helped, take ``--threads 1``.

Nothing is asked of the hub: the ``HookedTransformer`` is made from its config, tokens come as ids, and
the tokenizer is a stub.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from circuit_tracer import Graph, attribute
from circuit_tracer.replacement_model.replacement_model_transformerlens import (
    TransformerLensReplacementModel,
)
from circuit_tracer.transcoder.activation_functions import JumpReLU
from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder, TranscoderSet
from trace_models import BOS, FIRST_WORD, Case
from transformer_lens import HookedTransformerConfig


class StubTokenizer:
    """What ``attribute`` asks a tokenizer for when the prompt is a tensor of ids that starts with BOS."""

    bos_token_id = BOS
    padding_side = "right"
    all_special_ids = tuple(range(FIRST_WORD))

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def decode(self, ids: Any) -> str:
        """Names instead of words."""
        return " ".join(f"w{int(i)}" for i in torch.as_tensor(ids).reshape(-1))


def replacement_model(case: Case) -> TransformerLensReplacementModel:
    """circuit-tracer's model of a case, on its TransformerLens backend."""
    config = HookedTransformerConfig(**case.config)
    model = TransformerLensReplacementModel.from_config(config, transcoder_set(case))
    # It has moved every MLP and the unembedding one level down.
    names = {name: name.replace(".mlp.", ".mlp.old_mlp.") for name in case.state}
    names |= {
        name: name.replace("unembed.", "unembed.old_unembed.")
        for name in names
        if "unembed" in name
    }
    state = {names[name]: value for name, value in case.state.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    parameters = dict(model.named_parameters())
    lacking = [
        name for name in missing if name in parameters and not name.startswith("transcoders.")
    ]
    assert not unexpected and not lacking, f"weights that do not fit: {unexpected}, {lacking}"
    model.tokenizer = StubTokenizer(config.d_vocab)
    return model


def transcoder_set(case: Case) -> TranscoderSet:
    """The transcoders; circuit-tracer keeps ``W_enc`` transposed."""
    sets = {}
    for layer in range(case.config["n_layers"]):
        prefix = f"{layer}."
        tensors = {
            name.removeprefix(prefix): value
            for name, value in case.transcoders.items()
            if name.startswith(prefix)
        }
        d_model, d_sae = tensors["W_enc"].shape
        made = SingleLayerTranscoder(
            d_model,
            d_sae,
            JumpReLU(tensors.pop("threshold")),
            layer,
            skip_connection="W_skip" in tensors,
            dtype=torch.float32,
        )
        tensors["W_enc"] = tensors["W_enc"].T
        for name, value in tensors.items():
            getattr(made, name).data = value.contiguous()
        sets[layer] = made
    return TranscoderSet(sets, case.hook_in, case.hook_out, scan="random")


def trace(model: TransformerLensReplacementModel, tokens: list[int], batch_size: int) -> Graph:
    """The whole graph of a prompt."""
    return attribute(torch.tensor(tokens), model, batch_size=batch_size, max_feature_nodes=None)


def peak_mb() -> float:
    """The most memory that this process ever had."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size / (1e6 if sys.platform == "darwin" else 1e3)


def main() -> None:
    """Times one case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3, help="0: the warm-up is the measurement")
    parser.add_argument("--adjacency", type=Path, help="where to save it, as .npy")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    case = Case.load(arguments.folder)
    model = replacement_model(case)
    before, times, cpu_times = peak_mb(), [], []
    for turn in range(arguments.repeat + 1):
        start, spent = time.perf_counter(), time.process_time()
        graph = trace(model, case.tokens, arguments.batch_size)
        times.append(time.perf_counter() - start)
        cpu_times.append(time.process_time() - spent)
        if not turn:
            growth = peak_mb() - before
    result = {
        "seconds": statistics.median(times[1:] or times),
        "cpu_seconds": statistics.median(cpu_times[1:] or cpu_times),
        "all_seconds": times,
        "peak_mb": growth,
        "active_features": len(graph.active_features),
        "nodes": len(graph.adjacency_matrix),
        "batch_size": arguments.batch_size,
        "threads": arguments.threads,
        "version": version("circuit-tracer"),
    }
    print(json.dumps(result))
    if arguments.adjacency:
        np.save(arguments.adjacency, graph.adjacency_matrix.numpy())


if __name__ == "__main__":
    main()
