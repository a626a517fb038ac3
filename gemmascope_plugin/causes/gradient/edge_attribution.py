"""Edge attribution: first-order effects of all edges from a few backward passes, right on Gemma.

``score(u -> v) = sum_pos <D_u, g_v>``: what the stream gets if writer ``u`` alone changes (through the
norm after attention, which other implementations leave out), times the gradient at reader ``v``'s input.

A method says which gradients (``METHODS``, ``eap.py``): those of the base run or of both, or their mean
along a line.

Identities: with ``writer_delta="jacobian"`` the scores of all edges out of a writer sum to its node score
``<z' - z, dm/dz>``; with ``eap-ig`` the scores out of the embedding sum to the whole difference of the
metric as ``n`` grows. The share that is missing from that is ``metadata["conservation"]``. With the
other forms, ``exact`` (the default) among them, edges out of a head need not sum to its node score.

Cost: per prompt a forward pass and 1, 2, ``steps`` or ``steps * (2 layers + 1)`` forward and backward
passes from the first position that differs on, the last of these from each writer's layer on; blocks of
``tokens * writers * d_model`` numbers within the budget.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from jaxtyping import Float

from gemmascope_plugin.arguments import parse_size
from gemmascope_plugin.causes.bound_task import BoundTask
from gemmascope_plugin.causes.effects import Effects
from gemmascope_plugin.causes.gradient.eap import EAP, CleanCorrupted, EapIg, EapIgActivations
from gemmascope_plugin.causes.gradient.edge_runs import (
    EdgeMethod,
    EdgeRuns,
    add_by_token,
    add_sums,
)
from gemmascope_plugin.causes.gradient.integrated import checked_share
from gemmascope_plugin.causes.memory import logits_held
from gemmascope_plugin.causes.method import pick, table_of
from gemmascope_plugin.causes.replace import DeltaForm, Replacement, Writes, replayed_writers
from gemmascope_plugin.causes.replayed import Part
from gemmascope_plugin.causes.task import Task, check_tasks
from gemmascope_plugin.errors import TaskError, check_choice
from gemmascope_plugin.graphs.edge_map import EdgeMap
from gemmascope_plugin.models.anatomy import Anatomy
from gemmascope_plugin.models.gate import gate
from gemmascope_plugin.models.protocol import HookedModel, check_model, weights_of
from gemmascope_plugin.types import Direction

EdgeMethodName = Literal["eap", "eap-ig", "eap-ig-activations", "clean-corrupted"]
METHODS = table_of(EAP, EapIg, EapIgActivations, CleanCorrupted)
"""All methods by name."""
MAX_ROWS = 64
"""Rows of one forward and backward pass by default."""


@gate(model=check_model, task=check_tasks)
def edge_attribution(
    model: HookedModel,
    task: Task | Sequence[Task],
    *,
    method: EdgeMethodName = "eap-ig",
    steps: int | None = None,
    direction: Direction = "noising",
    writer_delta: DeltaForm = "exact",
    replacement: Replacement = "other",
    per_position: bool = False,
    by_prompt: bool = False,
    memory_budget: int | str = "2 GB",
    max_rows: int = MAX_ROWS,
    progress: bool = False,
) -> Effects:
    """First-order effect of every edge.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``.
        task: Clean and corrupted prompts and a metric; several tasks are processed in turn.
        method: ``eap``, ``eap-ig``, ``eap-ig-activations`` or ``clean-corrupted``.
        steps: Points on the line, for integrated gradients alone; 10 by default.
        direction: ``noising`` patches the clean run with the other's values, ``denoising`` the reverse.
        writer_delta: How a head's difference goes through the norm after attention: ``exact``,
            ``jacobian`` or ``frozen``; ``naive`` leaves the norm out and is wrong on Gemma.
        replacement: What a writer is replaced by: the ``other`` run, ``zero``, ``overall_mean`` or
            ``mean`` of the other run.
        per_position: Keep positions apart.
        by_prompt: Keep the effects of each prompt as well.
        memory_budget: Bytes, or ``"2 GB"``, for the blocks and the passes.
        max_rows: Rows of one pass at most.
        progress: Show a progress bar.

    Returns:
        Effects ``[writer, reader]`` or ``[writer, reader, pos]``; positive = patching the edge raises the
        metric.

    Raises:
        TaskError: Prompts that cannot be compared, a metric without a gradient, options that do not go
            together or play no part, or too little memory.
        UnknownNameError: An unknown method, direction, form or replacement.

    Example:
        >>> suite = gs.tiny()
        >>> task = suite.task("agreement", n=8)
        >>> gs.edge_attribution(suite.model, task, method="eap-ig", steps=5).top(3).round(2)
          source  target port  effect  share
        0   MLP3  logits        -8.91  -0.44
        1  embed   L2KV1    k   -6.02  -0.29
        2  embed    MLP0        -5.47  -0.27
    """
    chosen = pick(METHODS, method, steps=steps)
    check_choice("direction", direction, get_args(Direction))
    check_choice("writer_delta", writer_delta, get_args(DeltaForm))
    if per_position and by_prompt:
        raise TaskError(
            "per_position and by_prompt together would keep every token's matrix", fix="one of them"
        )
    tasks = [task] if isinstance(task, Task) else list(task)
    if not tasks:
        raise TaskError("There is no task", fix="a Task, or several")
    chosen.check([task.question for task in tasks], direction, replacement)
    scorer = _Scorer(
        model,
        chosen,
        direction,
        writer_delta,
        replacement,
        per_position,
        by_prompt,
        memory_budget,
        max_rows,
        progress,
    )
    return scorer.effects([task.bind(model) for task in tasks])


@dataclass
class _Scorer:
    """One call of ``edge_attribution``."""

    model: HookedModel
    method: EdgeMethod
    direction: Direction
    writer_delta: DeltaForm
    replacement: Replacement
    per_position: bool
    by_prompt: bool
    memory_budget: int | str
    max_rows: int
    progress: bool
    anatomy: Anatomy = field(init=False)
    edges: EdgeMap = field(init=False)

    def __post_init__(self) -> None:
        self.anatomy = Anatomy(self.model)
        self.edges = EdgeMap.of(self.anatomy)

    def effects(self, tasks: Sequence[BoundTask]) -> Effects:
        """Scores of all prompts of all tasks, each prompt counting alike."""
        n = sum(task.n_prompts for task in tasks)
        ends = [(task.n_prompts, task.ends(self.model)) for task in tasks]
        metric = {key: sum(k * end[key] for k, end in ends) / n for key in ends[0][1]}
        scores = [matrix for task in tasks for matrix in self._task_scores(task)]
        by_prompt = torch.cat(scores, -1) if self.by_prompt else None
        values = _padded_sum(scores) / n if by_prompt is None else by_prompt.mean(-1)
        details = {
            "component": "edge",
            "method": self.method.name,
            "direction": self.direction,
            "writer_delta": self.writer_delta,
            "replacement": self.replacement,
            "task": ", ".join(dict.fromkeys(task.name for task in tasks)),
            "metric": tasks[0].metric.metric.name,
            "logits": tasks[0].logits,
            "sign": "positive = patching the edge raises the metric",
            "n_prompts": n,
            "weights": weights_of(self.model),
            **metric,
        }
        if "steps" in self.method.options():
            details["steps"] = self.method.n_steps
        if self.method.conserves:
            details["conservation"] = self._conservation(values, metric)
        labels = {"writer": self.edges.writers, "reader": self.edges.readers}
        if self.per_position:
            labels["pos"] = tuple(range(values.shape[2]))
        return Effects(values, tuple(labels), labels, details, by_prompt)

    def _conservation(self, values: torch.Tensor, metric: dict[str, float]) -> float:
        """What the scores out of the embedding miss of the whole difference, as a share of it."""
        whole = metric["metric_corrupt"] - metric["metric_clean"]
        whole = whole if self.direction == "noising" else -whole
        return checked_share(float(values[0].sum()) / whole - 1)

    def _task_scores(self, task: BoundTask) -> Iterator[torch.Tensor]:
        """Sums over the prompts of each part, or one matrix ``[writer, reader, prompt]``."""
        from tqdm.auto import tqdm

        rows, block = self._sizes(task)
        parts = replayed_writers(
            self.model,
            task,
            self.direction,
            self.anatomy.n_layers,
            self.replacement,
            rows=rows,
            size=max(1, rows // self.method.n_steps),
        )
        by_row: torch.Tensor | None = None
        title = f"edges by {self.method.name}"
        with tqdm(total=len(task), desc=title, disable=not self.progress) as bar:
            for part, other in parts:
                copies = max(1, rows // len(part.index))
                scores = self._part_scores(self._edge_runs(part, other, copies), block)
                if self.by_prompt:
                    if by_row is None:
                        by_row = scores.new_zeros(len(task), *scores.shape[1:])
                    by_row[part.index] = scores
                else:
                    yield scores / task.metric.rows_per_prompt
                bar.update(len(part.index))
        if by_row is not None:
            yield task.fold(by_row.movedim(0, -1))

    def _edge_runs(self, part: Part, other: Writes, copies: int) -> EdgeRuns:
        window = part.replay.window(part.start)
        base = Writes.of(part.base_acts, self.anatomy.n_layers).window(window)
        other, tokens = other.window(window), part.bound.runs(self.direction)[1]
        return EdgeRuns(self.anatomy, part, window, base, other, tokens, self.writer_delta, copies)

    def _part_scores(self, runs: EdgeRuns, block: int) -> torch.Tensor:
        """Sums over the rows of a part, or the matrix of each."""
        window, bound = runs.window, runs.part.bound
        n_rows, n_pos = len(bound), window.stop - window.start
        shape, tokens = self.edges.mask.shape, n_rows * n_pos
        blank = functools.partial(torch.zeros, device=bound.clean.device)
        if not self.per_position and not self.by_prompt:
            out = blank(shape)
            for path in self.method.paths(runs):
                add_sums(out, self.edges, path, tokens, block)
            return out
        out = blank(tokens, *shape)
        for path in self.method.paths(runs):
            add_by_token(out, self.edges, path, tokens, block)
        by_row = out.reshape(n_rows, n_pos, *shape)
        if self.by_prompt:
            return by_row.sum(1)
        values = blank(*shape, bound.clean.shape[1])  # nothing differs before the window
        values[:, :, window] = by_row.sum(0).permute(1, 2, 0)
        return values

    def _sizes(self, task: BoundTask) -> tuple[int, int]:
        """Rows of a pass and tokens of a block that fit the budget."""
        budget = parse_size(self.memory_budget)
        assert budget is not None
        token = 4 * (len(self.edges.writers) + self.anatomy.n_heads * 3) * self.anatomy.d_model * 2
        row = pass_bytes(self.anatomy, task)
        if budget < max(token, row):
            raise TaskError(
                f"memory_budget={self.memory_budget!r} is too little: one prompt of "
                f"{task.clean.shape[1]} tokens needs about {max(token, row) / 1e6:.1f} MB",
                fix=f"memory_budget='{max(token, row) / 1e6 * 1.5:.0f} MB', or shorter prompts",
            )
        return max(1, min(self.max_rows, budget // row)), max(1, budget // token)


def pass_bytes(anatomy: Anatomy, bound: BoundTask) -> int:
    """Bytes that a forward pass with its graph keeps per row, an estimate."""
    d, heads, projections = anatomy.d_model, anatomy.n_heads, anatomy.n_heads + 2 * anatomy.n_kv
    n_pos = bound.clean.shape[1]
    d_mlp = int(getattr(anatomy.model.cfg, "d_mlp", None) or 4 * d)
    per_token = 16 * d + 6 * d_mlp + 4 * projections * anatomy.d_head + 4 * heads * n_pos
    logits = logits_held(anatomy.model, bound)  # at one position, with softmax and gradient
    return 4 * (n_pos * per_token * anatomy.n_layers + logits)


def _padded_sum(sums: Sequence[Float[torch.Tensor, "writer reader *_"]]) -> torch.Tensor:
    """Sum of matrices that may differ in their number of positions."""
    if sums[0].ndim == 2:
        return torch.stack(list(sums)).sum(0)
    longest = max(matrix.shape[2] for matrix in sums)
    total = sums[0].new_zeros(*sums[0].shape[:2], longest)
    for matrix in sums:
        total[:, :, : matrix.shape[2]] += matrix
    return total
