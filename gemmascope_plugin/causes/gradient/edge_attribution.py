"""Edge attribution: first-order effects of all edges from a few backward passes, right on Gemma.

``score(u -> v) = sum_pos <D_u, g_v>``: what the stream gets if writer ``u`` alone changes (through the
norm after attention, which other implementations leave out), times the gradient at reader ``v``'s input.

==================== ==========================================================================
``eap``              gradients of the base run (Syed et al., arXiv 2310.10348)
``clean-corrupted``  mean of the gradients of both runs
``eap-ig``           mean of the gradients along a straight line from the base embeddings to the other
                     run's, **midpoint** rule ``alpha_k = (k + 1/2) / n`` (Hanna et al., arXiv
                     2403.17806, which takes the left ends; ten times the steps for the same error)
``eap-ig-activations``  per writer site (the heads of a layer, an MLP, the embedding) the line of *its*
                     activation, the rest recomputed; edges of that site alone are scored. Needed for
                     zero and mean replacement, where the embedding has no line to follow.
==================== ==========================================================================

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
from typing import Any

import torch
from jaxtyping import Float

from gemmascope_plugin.causes.check_task import check_tasks
from gemmascope_plugin.causes.edge_effects import EdgeEffects
from gemmascope_plugin.causes.gradient.edge_options import MAX_ROWS, EdgeMethod, EdgeOptions
from gemmascope_plugin.causes.gradient.edge_scores import (
    Path,
    add_by_token,
    add_sums,
    deltas_between,
)
from gemmascope_plugin.causes.gradient.reader_gradients import (
    ReaderGradients,
    late_gradients,
    read_gradients,
)
from gemmascope_plugin.causes.memory import logits_held
from gemmascope_plugin.causes.metrics import KLDivergence
from gemmascope_plugin.causes.nodes import read
from gemmascope_plugin.causes.replace import Replacement
from gemmascope_plugin.causes.replayed import Part
from gemmascope_plugin.causes.task import BoundTask, Task
from gemmascope_plugin.causes.writes import DeltaForm, Writes, replayed_writers
from gemmascope_plugin.errors import TaskError
from gemmascope_plugin.graphs.conservation import checked_share
from gemmascope_plugin.graphs.edge_map import EdgeMap
from gemmascope_plugin.models.anatomy import Anatomy
from gemmascope_plugin.models.check_model import check_model
from gemmascope_plugin.models.gate import gate
from gemmascope_plugin.models.origin import weights_of
from gemmascope_plugin.models.protocol import HookedModel, dtype_of
from gemmascope_plugin.models.replay import Replay
from gemmascope_plugin.sizes import parse_size
from gemmascope_plugin.types import Direction

_EMBED = "hook_embed"


@gate(model=check_model, task=check_tasks)
def edge_attribution(
    model: HookedModel,
    task: Task | Sequence[Task],
    *,
    method: EdgeMethod = "eap-ig",
    steps: int | None = None,
    mode: Direction = "noising",
    writer_delta: DeltaForm = "exact",
    replacement: Replacement = "other",
    per_position: bool = False,
    by_prompt: bool = False,
    memory_budget: int | str = "2 GB",
    max_rows: int = MAX_ROWS,
    progress: bool = False,
) -> EdgeEffects:
    """First-order effect of every edge.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``.
        task: Clean and corrupted prompts and a metric; several tasks are worked off one after another.
        method: ``eap``, ``eap-ig``, ``eap-ig-activations`` or ``clean-corrupted``.
        steps: Points on the line, for integrated gradients alone; 10 by default.
        mode: ``noising``: the clean run is patched with the other's values; ``denoising``: the reverse.
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
        UnknownNameError: An unknown method, mode, form or replacement.
    """
    options = EdgeOptions(
        method=method,
        steps=steps,
        mode=mode,
        writer_delta=writer_delta,
        replacement=replacement,
        per_position=per_position,
        by_prompt=by_prompt,
        memory_budget=memory_budget,
        max_rows=max_rows,
    )
    tasks = [task] if isinstance(task, Task) else list(task)
    if not tasks:
        raise TaskError("There is no task", fix="a Task, or several")
    bound = [one.bind(model) for one in tasks]
    return _Scorer(model, options, progress).effects(bound)


@dataclass
class _Scorer:
    """One call of ``edge_attribution``."""

    model: HookedModel
    options: EdgeOptions
    progress: bool
    anatomy: Anatomy = field(init=False)
    edges: EdgeMap = field(init=False)

    def __post_init__(self) -> None:
        self.anatomy = Anatomy(self.model)
        self.edges = EdgeMap.of(self.anatomy)

    def effects(self, tasks: Sequence[BoundTask]) -> EdgeEffects:
        """Scores of all prompts of all tasks, each prompt counting alike."""
        self._refuse_flat(tasks)
        n = sum(task.n_prompts for task in tasks)
        ends = [(task.n_prompts, task.ends(self.model)) for task in tasks]
        metric = {key: sum(k * end[key] for k, end in ends) / n for key in ends[0][1]}
        found = [scores for task in tasks for scores in self._task_scores(task)]
        if self.options.by_prompt:
            prompts = torch.cat(found)
            values = prompts.mean(0)
        else:
            prompts, values = None, _padded_sum(found) / n
        details = {
            "method": self.options.method,
            "mode": self.options.mode,
            "writer_delta": self.options.writer_delta,
            "replacement": self.options.replacement,
            "task": ", ".join(dict.fromkeys(task.name for task in tasks)),
            "metric": tasks[0].metric.metric.name,
            "logits": tasks[0].logits,
            "sign": "positive = patching the edge raises the metric",
            "n_prompts": n,
            "weights": weights_of(self.model),
            **metric,
        }
        if self.options.integrates:
            details["steps"] = self.options.n_steps
        if self.options.method == "eap-ig":
            details["conservation"] = self._conservation(values, metric)
        return EdgeEffects(values, self.edges, details, prompts)

    def _refuse_flat(self, tasks: Sequence[BoundTask]) -> None:
        flat = self.options.mode == "noising" and self.options.method == "eap"
        if flat and any(isinstance(task.metric.metric, KLDivergence) for task in tasks):
            raise TaskError(
                "The KL divergence from the clean run has no gradient at the clean run: every score "
                "would be 0",
                fix="logit_diff, mode='denoising', or method='eap-ig'",
            )

    def _conservation(self, values: torch.Tensor, metric: dict[str, float]) -> float:
        """What the scores out of the embedding miss of the whole difference, as a share of it."""
        whole = metric["metric_corrupt"] - metric["metric_clean"]
        whole = whole if self.options.mode == "noising" else -whole
        return checked_share(float(values[0].sum()) / whole - 1)

    def _task_scores(self, task: BoundTask) -> Iterator[torch.Tensor]:
        """Sums over the prompts of each part, or one matrix per prompt."""
        from tqdm.auto import tqdm

        rows, block = self._sizes(task)
        at_once = max(1, rows // self.options.n_steps)
        size, n_layers = task.metric.rows_per_prompt, self.anatomy.n_layers
        replacement = self.options.replacement
        parts = replayed_writers(
            self.model, task, self._runs, n_layers, replacement, rows=rows, size=at_once
        )
        by_row: torch.Tensor | None = None
        title = f"edges by {self.options.method}"
        with tqdm(total=len(task), desc=title, disable=not self.progress) as bar:
            for part, other in parts:
                copies = max(1, rows // len(part.index))
                scores = self._part_scores(part, other, copies, block)
                if self.options.by_prompt:
                    if by_row is None:
                        by_row = scores.new_zeros(len(task), *scores.shape[1:])
                    by_row[part.index] = scores
                else:
                    yield scores / size
                bar.update(len(part.index))
        if by_row is not None:
            yield task.fold(by_row.movedim(0, -1)).movedim(-1, 0)

    def _part_scores(
        self, part: Part, other: Writes, steps_at_once: int, block: int
    ) -> torch.Tensor:
        """Sums over the rows of a part, or the matrix of each."""
        window = part.replay.window(part.start)
        n_rows, n_pos = len(part.index), window.stop - window.start
        shape, tokens = self.edges.mask.shape, n_rows * n_pos
        blank = functools.partial(torch.zeros, device=part.bound.clean.device)
        base = Writes.of(part.here, self.anatomy.n_layers).window(window)
        paths = self._paths(part, window, base, other.window(window), steps_at_once)
        if not self.options.per_position and not self.options.by_prompt:
            out = blank(shape)
            for path in paths:
                add_sums(out, self.edges, path, tokens, block)
            return out
        out = blank(tokens, *shape)
        for path in paths:
            add_by_token(out, self.edges, path, tokens, block)
        by_row = out.reshape(n_rows, n_pos, *shape)
        if self.options.by_prompt:
            return by_row.sum(1)
        values = blank(*shape, part.bound.clean.shape[1])  # nothing differs before the window
        values[:, :, window] = by_row.sum(0).permute(1, 2, 0)
        return values

    def _paths(
        self, part: Part, window: slice, base: Writes, other: Writes, steps_at_once: int
    ) -> Iterator[Path]:
        form, method = self.options.writer_delta, self.options.method
        deltas = deltas_between(self.anatomy, base, other, form)
        if method in ("eap", "clean-corrupted"):
            runs = [self._run(part, window, _EMBED, base.embed)]
            if method == "clean-corrupted":
                embedded = self._embedded(part, self._runs(part.bound)[1], window)
                runs.append(self._run(part, window, _EMBED, embedded))
            yield Path(deltas, runs)
        elif method == "eap-ig":
            runs = self._along(part, window, _EMBED, base.embed, other.embed, steps_at_once)
            if form == "jacobian":  # each step's own Jacobian keeps the node identity step by step
                for run in runs:
                    own = deltas_between(
                        self.anatomy, run.writes, _moved(run.writes, base, other), form
                    )
                    yield Path(own, [run], 1 / self.options.n_steps)
            else:
                yield Path(deltas, list(runs))
        else:
            for hook, only, start, end in self._sites(base, other):
                runs = self._along(part, window, hook, start, end, steps_at_once)
                yield Path(deltas, list(runs), only=only)

    def _sites(
        self, base: Writes, other: Writes
    ) -> Iterator[tuple[str, slice, torch.Tensor, torch.Tensor]]:
        yield "hook_embed", slice(0, 1), base.embed, other.embed
        for layer in range(self.anatomy.n_layers):
            name, mlp = f"blocks.{layer}.", self.edges.mlp(layer)
            heads = self.edges.heads(layer)
            yield f"{name}attn.hook_z", heads, base.z[layer], other.z[layer]
            yield f"{name}hook_mlp_out", slice(mlp, mlp + 1), base.mlp[layer], other.mlp[layer]

    def _along(
        self,
        part: Part,
        window: slice,
        hook: str,
        start: torch.Tensor,
        end: torch.Tensor,
        at_once: int,
    ) -> Iterator[ReaderGradients]:
        """Runs at the midpoints of a line; several points ride on the batch axis."""
        n, rows = self.options.n_steps, len(part.index)
        middles = (torch.arange(n, device=start.device) + 0.5) / n
        for alphas in middles.to(start.dtype).split(at_once):
            shape = (-1, *[1] * start.ndim)
            points = (start + alphas.reshape(shape) * (end - start)).flatten(0, 1)
            yield from self._run(part, window, hook, points).split(rows)

    def _run(
        self, part: Part, window: slice, hook: str, points: Float[torch.Tensor, "row pos ..."]
    ) -> ReaderGradients:
        """Gradients with these values at a hook, of copies of the prompts."""
        points = points.to(dtype_of(self.model))
        if isinstance(part.replay, Replay):
            return late_gradients(self.anatomy, part, window, hook, points)

        def put(x: torch.Tensor, hook: Any) -> torch.Tensor:
            # the values, with the graph of what was there
            return points.reshape(x.shape).to(x) + (x - x.detach())

        tokens = part.replay.tokens.repeat(len(points) // len(part.index), 1)
        measure = functools.partial(part.bound.measure, self.model, tokens)
        return read_gradients(self.anatomy, self.model, measure, [(hook, put)])

    def _embedded(self, part: Part, tokens: torch.Tensor, window: slice) -> torch.Tensor:
        """The embedding of other tokens at the positions that run."""
        if isinstance(part.replay, Replay):
            return part.replay.arithmetic.embedded(tokens[:, window])
        return read(self.model, tokens, [_EMBED])[_EMBED][:, window]

    def _runs(self, part: BoundTask) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens of the base run and of the other."""
        noising = self.options.mode == "noising"
        return (part.clean, part.corrupt) if noising else (part.corrupt, part.clean)

    def _sizes(self, task: BoundTask) -> tuple[int, int]:
        """Rows of a pass and tokens of a block that fit the budget.

        Raises:
            TaskError: Not even one does.
        """
        budget = parse_size(self.options.memory_budget)
        assert budget is not None
        token = 4 * (len(self.edges.writers) + self.anatomy.n_heads * 3) * self.anatomy.d_model * 2
        row = pass_bytes(self.anatomy, task)
        if budget < max(token, row):
            raise TaskError(
                f"memory_budget={self.options.memory_budget!r} is too little: one prompt of "
                f"{task.clean.shape[1]} tokens needs about {max(token, row) / 1e6:.1f} MB",
                fix=f"memory_budget='{max(token, row) / 1e6 * 1.5:.0f} MB', or shorter prompts",
            )
        return max(1, min(self.options.max_rows, budget // row)), max(1, budget // token)


def pass_bytes(anatomy: Anatomy, bound: BoundTask) -> int:
    """Bytes that a forward pass with its graph keeps per row, an estimate.

    Args:
        anatomy: The model's.
        bound: The task.
    """
    d, heads, wide = anatomy.d_model, anatomy.n_heads, anatomy.n_heads + 2 * anatomy.n_kv
    n_pos = bound.clean.shape[1]
    d_mlp = int(getattr(anatomy.model.cfg, "d_mlp", None) or 4 * d)
    per_token = 16 * d + 6 * d_mlp + 4 * wide * anatomy.d_head + 4 * heads * n_pos
    logits = logits_held(anatomy.model, bound)  # at one position, with softmax and gradient
    return 4 * (n_pos * per_token * anatomy.n_layers + logits)


def _moved(here: Writes, base: Writes, other: Writes) -> Writes:
    """The run ``here``, moved by the difference between the two others."""
    return Writes(
        here.embed + (other.embed - base.embed),
        here.z + (other.z - base.z),
        here.mlp + (other.mlp - base.mlp),
    )


def _padded_sum(found: Sequence[Float[torch.Tensor, "writer reader *_"]]) -> torch.Tensor:
    """Sum of matrices that may differ in their number of positions."""
    if found[0].ndim == 2:
        return torch.stack(list(found)).sum(0)
    longest = max(one.shape[2] for one in found)
    total = found[0].new_zeros(*found[0].shape[:2], longest)
    for one in found:
        total[:, :, : one.shape[2]] += one
    return total
