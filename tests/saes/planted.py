"""Activations that a sparse dictionary can explain, and tiny training runs on them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

D_IN, D_SAE, N_FEATURES, ACTIVE, BATCH = 16, 32, 24, 3, 256
SCALE = 7.0


def planted_batches(batch_size: int = BATCH, seed: int = 0) -> Iterator[torch.Tensor]:
    """Sums of three of 24 fixed directions, in raw units."""
    directions = torch.randn(N_FEATURES, D_IN, generator=torch.Generator().manual_seed(0))
    directions = torch.nn.functional.normalize(directions, dim=-1)
    rng = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.rand(batch_size, N_FEATURES, generator=rng).topk(ACTIVE).indices
        amounts = 1 + torch.rand(batch_size, ACTIVE, generator=rng)
        yield SCALE * torch.zeros(batch_size, N_FEATURES).scatter(1, chosen, amounts) @ directions


def step_input(x: torch.Tensor, **coefficients: float) -> Any:
    from sae_lens.saes.sae import TrainStepInput

    return TrainStepInput(
        sae_in=x,
        coefficients=coefficients,
        dead_neuron_mask=None,
        n_training_steps=0,
        is_logging_step=False,
    )


def fvu(x: torch.Tensor, reconstruction: torch.Tensor) -> float:
    return ((x - reconstruction).pow(2).sum() / (x - x.mean(0)).pow(2).sum()).item()


def l0(acts: torch.Tensor) -> float:
    return float((acts > 0).float().sum(-1).mean())


def randomised(sae: Any, seed: int = 0) -> Any:
    """The same object with random biases, thresholds and row norms."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) / 3)
            if name == "threshold":
                parameter.abs_()
    return sae


def fitted(trainer: Any) -> tuple[Any, list[float]]:
    """What ``fit`` returns, and the loss of each step."""
    losses: list[float] = []
    step = trainer.step

    def recorded(batch: torch.Tensor) -> Any:
        output = step(batch)
        losses.append(output.loss.item())
        return output

    trainer.step = recorded
    return trainer.fit(), losses
