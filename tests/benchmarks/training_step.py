"""What does a training step cost, against SAELens' own classes on the same batches?

    python -m tests.benchmarks.training_step [--d-in 512] [--d-sae 8192] [--batch-size 1024] [--smoke]

Whole steps of SAELens' trainer (forward, backward, clipping, Adam), float32, two threads, in one process
and in turns; medians. Below 1 we are faster. Matryoshka JumpReLU and the frequency penalty have no peer
there: they are set against SAELens' JumpReLU without levels.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from sae_lens import (
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

from gemmascope_plugin.saes import (
    GemmaScopeConfig,
    GemmaScopeTrainingSAE,
    MatryoshkaBatchTopK,
    MatryoshkaBatchTopKConfig,
    MatryoshkaJumpReLU,
    MatryoshkaJumpReLUConfig,
)

THREADS, REPEATS, L0 = 2, 15, 40.0


def trainer(sae: Any, batches: Iterator[torch.Tensor], batch_size: int) -> Any:
    config = SAETrainerConfig(
        total_training_samples=1000 * batch_size,
        train_batch_size_samples=batch_size,
        lr=1e-4,
        lr_end=1e-4,
    )
    return SAETrainer(config, sae, batches)


def medians(trainers: dict[str, Any], batches: Iterator[torch.Tensor]) -> dict[str, float]:
    """Median seconds of a step of each; they take turns, after two rounds that do not count."""
    times: dict[str, list[float]] = {name: [] for name in trainers}
    for i in range(REPEATS + 2):
        x = next(batches)
        for name, learner in trainers.items():
            start = time.perf_counter()
            learner.step(x)
            if i > 1:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(series) for name, series in times.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--d-in", type=int, default=512)
    parser.add_argument("--d-sae", type=int, default=8192)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--smoke", action="store_true", help="64 tokens, 32 x 1,024")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.batch_size, options.d_in, options.d_sae = 64, 32, 1024
    threads = 1 if options.smoke else THREADS
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    shapes = {"d_in": options.d_in, "d_sae": options.d_sae}
    levels = [options.d_sae // 32, 3 * options.d_sae // 32, 7 * options.d_sae // 32]
    levels += [15 * options.d_sae // 32, options.d_sae]
    pool = [torch.randn(options.batch_size, options.d_in) / options.d_in**0.5 for _ in range(4)]
    batches = itertools.cycle(pool)
    aux = 1 / 32
    scope_2 = {
        **{"target_l0": L0, "max_frequency": 0.01, "frequency_coefficient": 1.0},
        **{"l0_coefficient": 1.0, "jumprelu_sparsity_loss_mode": "quadratic"},
    }
    trainers = {
        "SAELens matryoshka_batchtopk": MatryoshkaBatchTopKTrainingSAE(
            MatryoshkaBatchTopKTrainingSAEConfig(
                **shapes, k=L0, matryoshka_widths=list(levels), aux_loss_coefficient=aux
            )
        ),
        "MatryoshkaBatchTopK": MatryoshkaBatchTopK(
            MatryoshkaBatchTopKConfig(**shapes, k=L0, levels=levels)
        ),
        "SAELens jumprelu": JumpReLUTrainingSAE(
            JumpReLUTrainingSAEConfig(**shapes, jumprelu_bandwidth=0.001, decoder_init_norm=1.0)
        ),
        "Gemma Scope 1": GemmaScopeTrainingSAE(GemmaScopeConfig(**shapes, l0_coefficient=0.1)),
        "Gemma Scope 2, no levels": GemmaScopeTrainingSAE(GemmaScopeConfig(**shapes, **scope_2)),
        "Gemma Scope 2, 5 levels": MatryoshkaJumpReLU(
            MatryoshkaJumpReLUConfig(**shapes, levels=levels, **scope_2)
        ),
    }
    times = medians(
        {n: trainer(sae, batches, options.batch_size) for n, sae in trainers.items()}, batches
    )
    print(f"{options.batch_size} tokens, {options.d_in} x {options.d_sae}, {threads} threads")
    peer = ""
    for name, seconds in times.items():
        peer = name if name.startswith("SAELens") else peer
        ratio = "" if peer == name else f", {seconds / times[peer]:.2f} of {peer}"
        print(f"{name}: {seconds * 1e3:.0f} ms{ratio}")


if __name__ == "__main__":
    main()
