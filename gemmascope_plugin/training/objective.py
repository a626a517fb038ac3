"""What SAELens' trainer trains in place of a dictionary: the same with a loss beside it, and watched.

``SAETrainer`` calls ``training_forward_pass`` and clips the gradient's norm at 1, always. Here

1. the loss of ghost gradients is added where it is asked for;
2. a loss that is not finite stops the run before anything is changed;
3. to clip at another norm ``c``, the loss is divided by ``c`` and the clipped gradients are multiplied by
   ``c`` before the optimiser's step: the same as clipping at ``c``;
4. gradients that are not finite stop the run before the optimiser's step.

Ghost gradients (Jermyn and Templeton, "Ghost grads", Anthropic's Circuits Updates of January 2024; kept
for comparison): dead features learn from the residual ``r = x - x_hat`` through ``exp``. With ``z_D``
their pre-activations and ``W_D`` their decoder rows, ``g = exp(z_D) @ W_D`` has gradients where ReLU has
none; it is scaled per token to half the norm of ``r``, and ``|g - r|^2`` to the size of ``|r|^2``, both
factors being constants. ``r`` is a constant, too: no other feature feels this loss. Gemma Scope does not
use it; the auxiliary losses of the architectures do better.

Why a run stopped, where, from what it can go on, and what to change is said in ``TrainingStoppedError``.

Cost: one norm of the gradients per step, and for ghosts a product of ``[batch, dead]`` and ``[dead,
d_out]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput

from gemmascope_plugin.errors import GemmaScopeError
from gemmascope_plugin.types import SAE


class NotFiniteError(ArithmeticError):
    """A loss or gradient is not finite; the weights are those of the step before."""


class Objective:
    """Stands for a dictionary wherever SAELens' trainer uses it; ``ghost`` is a coefficient."""

    def __init__(self, sae: SAE, *, max_grad_norm: float, ghost: float) -> None:
        self.sae, self.max_grad_norm, self.ghost = sae, max_grad_norm, ghost

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sae, name)

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """The dictionary's own pass, with what is added."""
        output = self.sae.training_forward_pass(step_input=step_input)
        dead = step_input.dead_neuron_mask
        if self.ghost and dead is not None:
            residual = output.sae_in - output.sae_out
            loss = self.ghost * ghost_loss(residual, output.hidden_pre, self.sae.W_dec, dead)
            output.losses["ghost_loss"] = loss
            output.loss = output.loss + loss
        if not torch.isfinite(output.loss):
            parts = {name: value.item() for name, value in output.losses.items()}
            raise NotFiniteError(f"the loss is {output.loss.item()} ({parts})")
        output.loss = output.loss / self.max_grad_norm
        return output

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Checks and rescales the gradients before every step of an optimiser."""
        optimizer.register_step_pre_hook(lambda *_: self.prepare_gradients())

    @torch.no_grad()
    def prepare_gradients(self) -> None:
        """Checks the gradients of all parameters, and undoes the division of the loss."""
        gradients = [p.grad for p in self.sae.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if not torch.isfinite(norm):
            raise NotFiniteError(f"the norm of the gradients is {float(norm)}")
        if self.max_grad_norm != 1:
            torch._foreach_mul_(gradients, self.max_grad_norm)


_EPS = 1e-6


def ghost_loss(
    residual: Float[torch.Tensor, "batch d_out"],
    pre: Float[torch.Tensor, "batch d_sae"],
    W_dec: Float[torch.Tensor, "d_sae d_out"],
    dead: Bool[torch.Tensor, " d_sae"],
) -> Float[torch.Tensor, ""]:
    """The loss of ghost gradients, zero where nothing is dead."""
    if not dead.any():
        return residual.new_zeros(())
    residual = residual.detach()
    ghost = torch.exp(pre[:, dead]) @ W_dec[dead]
    factor = residual.norm(dim=-1) / (_EPS + 2 * ghost.norm(dim=-1))
    error = (ghost * factor.detach()[:, None] - residual).pow(2).sum(-1)
    share = residual.pow(2).sum(-1) / (error + _EPS)
    return (error * share.detach()).mean()


class TrainingStoppedError(GemmaScopeError):
    """Training cannot go on: memory, or numbers that are not finite.

    Args:
        problem: What happened.
        step: The step that failed, from 0.
        checkpoint: The last good checkpoint; None if there is none.
        fix: What to change.
    """

    def __init__(self, problem: str, *, step: int, checkpoint: Path | None, fix: str) -> None:
        self.step, self.checkpoint = step, checkpoint
        where = "none" if checkpoint is None else str(checkpoint)
        super().__init__(
            f"Training stopped at step {step}: {problem}",
            exists=f"last good checkpoint: {where}",
            fix=fix,
        )


@contextmanager
def raise_as_training_stopped(
    step: Callable[[], int], checkpoint: Callable[[], Path | None]
) -> Iterator[None]:
    """Turns faults of memory and numbers into an error that says what to do.

    The functions tell the running step and the last good checkpoint.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as fault:
        reason = next(iter(str(fault).splitlines()), "") or type(fault).__name__
        raise TrainingStoppedError(
            f"out of memory ({reason})",
            step=step(),
            checkpoint=checkpoint(),
            fix="a smaller batch, d_sae, bucket or rows, or a larger device; resume=True goes on from "
            "the checkpoint if only other programs were in the way",
        ) from fault
    except NotFiniteError as fault:
        raise TrainingStoppedError(
            str(fault),
            step=step(),
            checkpoint=checkpoint(),
            fix="a lower lr, a longer lr_warm_up, a smaller max_grad_norm or sparsity_coefficient, in a "
            "new run_dir; resume=True with the same spec would stop at the same step",
        ) from fault
