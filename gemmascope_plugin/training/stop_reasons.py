"""Why a run stopped, where, from what it can go on, and what to change.

Costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from gemmascope_plugin.errors import GemmaScopeError
from gemmascope_plugin.training.objective import NotFiniteError


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
def explained(step: Callable[[], int], checkpoint: Callable[[], Path | None]) -> Iterator[None]:
    """Turns faults of memory and numbers into an error that says what to do.

    Args:
        step: Tells the running step.
        checkpoint: Tells the last good checkpoint.

    Raises:
        TrainingStoppedError: Out of memory, or a loss or gradient that is not finite.
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
