"""What a run says of itself: rows of ``metrics.jsonl``, a progress bar, and wandb if asked for.

A row is one dictionary at one step: ``dictionary, step, tokens, loss, losses`` (by name), ``l0, fvu,
dead_share, lr, tokens_per_second``. FVU is that of the batch, around its own mean; the last row of a
dictionary, with ``"final": true``, is measured with the finished one on raw activations.

Cost: one pass over the batch's outputs per row.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sae_lens.saes.sae import TrainStepOutput

from gemmascope_plugin.errors import GemmaScopeError, MissingExtraError
from gemmascope_plugin.files.json_file import Record, read_json_lines
from gemmascope_plugin.files.whole import write_text_whole
from gemmascope_plugin.training.learner import Learner


def row(name: str, learner: Learner, output: TrainStepOutput) -> dict[str, Any]:
    """The figures of one step, by SAELens' own log."""
    trainer = learner.trainer
    log = trainer.build_train_step_log_dict(
        output=output, n_training_samples=trainer.n_training_samples
    )
    prefix = "losses/"
    losses = {k[len(prefix) :]: v for k, v in log.items() if k.startswith(prefix)}
    return {
        "dictionary": name,
        "step": trainer.n_training_steps,
        "tokens": trainer.n_training_samples,
        "loss": losses.pop("overall_loss"),
        "losses": losses,
        "l0": log["metrics/l0"],
        "fvu": 1 - log["metrics/explained_variance"],
        "dead_share": log["sparsity/dead_features"] / learner.spec.d_sae,
        "lr": log["details/current_learning_rate"],
    }


class Journal:
    """Writes rows, moves the bar, and tells wandb.

    Rows beyond step ``start``, of a run that was killed, are removed.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        start: int,
        steps: int,
        progress: bool,
        wandb: str | None,
        config: dict[str, Any],
    ) -> None:
        from tqdm.auto import tqdm

        self._path = path
        self._wandb: Any = None if wandb is None else _open_wandb(wandb, config)
        if path is not None and path.exists():
            write_text_whole(path, "".join(_rows_until(path, start)))
        self._bar = tqdm(
            total=steps, initial=start, desc="training", unit="step", disable=not progress
        )
        self._since, self._tokens = time.monotonic(), 0

    def tick(self, tokens: int) -> None:
        """One step is done."""
        self._tokens += tokens
        self._bar.update(1)

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Writes the rows of one step."""
        elapsed = max(time.monotonic() - self._since, 1e-9)
        speed = round(self._tokens / elapsed, 1)
        self._since, self._tokens = time.monotonic(), 0
        rows = [{**row, "tokens_per_second": speed} for row in rows]
        mean = {key: sum(r[key] for r in rows) / len(rows) for key in ("loss", "l0", "dead_share")}
        self._bar.set_postfix_str(
            f"loss {mean['loss']:.4g}, L0 {mean['l0']:.3g}, dead {mean['dead_share']:.1%}"
        )
        self._put(rows)

    def finish(self, rows: list[dict[str, Any]]) -> None:
        """Writes the rows of the finished dictionaries."""
        self._put([{**row, "final": True} for row in rows])

    def close(self) -> None:
        """Closes bar and wandb."""
        self._bar.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _put(self, rows: list[dict[str, Any]]) -> None:
        if self._path is not None:
            lines = [json.dumps(_plain(row), allow_nan=False) + "\n" for row in rows]
            try:
                with self._path.open("a", encoding="utf-8") as file:
                    file.writelines(lines)
            except OSError as fault:
                raise GemmaScopeError(
                    f"cannot write {str(self._path)!r}: {fault.strerror or fault}",
                    fix="free space or mend the permissions, then resume=True",
                ) from fault
        if self._wandb is None:
            return
        for row in rows:
            flat = {k: v for k, v in row.items() if k not in ("dictionary", "losses", "step")}
            flat |= row.get("losses", {})
            named = {f"{row['dictionary']}/{key}": value for key, value in flat.items()}
            self._wandb.log(named, step=row["step"])


def _rows_until(path: Path, start: int) -> Iterator[str]:
    """The lines up to a step."""
    fix = "delete that line, or the file: nothing but the curve depends on it"
    for line, content in read_json_lines(path, fix=fix):
        step = Record(content, path, fix).size("step")
        # Figures of a finished dictionary are measured again.
        if step < start or (step == start and not content.get("final")):
            yield line


def _plain(value: object) -> Any:
    """None for numbers that JSON does not have: the variance explained of a constant, say."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _open_wandb(project: str, config: dict[str, Any]) -> Any:
    try:
        import wandb
    except ImportError as fault:
        raise MissingExtraError(
            "wandb was asked for and is not installed", fix="pip install wandb, or wandb=None"
        ) from fault
    return wandb.init(project=project, config=config)
