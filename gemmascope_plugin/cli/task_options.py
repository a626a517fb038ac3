"""What ``gemmascope patch`` and ``gemmascope discover`` ask: options that name a task and a model.

1. ``--task`` is a built-in task, which makes prompts for any model (``causes/builtin``); or
   ``--clean``, ``--corrupt``, ``--answer`` and ``--wrong`` give prompts, each option once per prompt.
2. ``--metric`` is what is asked of the logits; a built-in task brings its own.
3. All that can be checked without the model is checked before it is loaded.

Cost: loading the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

from gemmascope_plugin.errors import (
    EmptySelectionError,
    MissingFileError,
    TaskError,
    check_choice,
)
from gemmascope_plugin.types import Backend

if TYPE_CHECKING:
    from gemmascope_plugin.causes import Task
    from gemmascope_plugin.causes.builtin import Split
    from gemmascope_plugin.models.protocol import HookedModel

BUNDLED = "gemma-2-tiny"
_READS = {
    "logit_diff": ("answer", "wrong"),
    "probability": ("answer", "wrong"),
    "margin": ("answer",),
    "cross_entropy": ("answer",),
    "kl_divergence": (),
    "sequence_logprob": ("answer", "wrong"),
}
"""What each metric reads of a prompt."""
_MAY_LACK = {"probability": "wrong", "sequence_logprob": "wrong"}
_PROMPTS = "--clean TEXT --corrupt TEXT --answer WORD --wrong WORD"

TaskName = Annotated[
    str | None, typer.Option("--task", help="Built-in task, e.g. ioi or agreement.")
]
Prompts = Annotated[int | None, typer.Option("--n", help="Prompts of that task.")]
SplitName = Annotated[
    str | None, typer.Option("--split", help="Its prompts: held_out (default) or train.")
]
Seed = Annotated[int, typer.Option("--seed", help="Of the draw of its prompts.")]
Clean = Annotated[list[str] | None, typer.Option(help="Own clean prompt; once per prompt.")]
Corrupt = Annotated[
    list[str] | None, typer.Option(help="Its corruption, as long in tokens as the clean prompt.")
]
Answer = Annotated[
    list[str] | None,
    typer.Option(help="Right next word of a clean prompt, with its blank: ' Paris'."),
]
Wrong = Annotated[list[str] | None, typer.Option(help="Word to compare the answer with.")]
MetricName = Annotated[
    str | None,
    typer.Option(
        "--metric",
        help="logit_diff, probability, margin, cross_entropy, kl_divergence, sequence_logprob.",
    ),
]
BeforeCap = Annotated[
    bool, typer.Option("--before-cap", help="Read logits before the final soft-cap.")
]
ModelName = Annotated[
    str,
    typer.Option(
        "--model",
        help="Model: gemma-2-tiny, gemma-3-270m (extra [gemma]), any name on the hub, a folder or a "
        "GGUF file.",
    ),
]
BackendName = Annotated[str, typer.Option("--backend", help="Model class: hooked or bridge.")]
Device = Annotated[
    str,
    typer.Option(help="Where the model goes: auto (a GPU if there is one), cpu, cuda, cuda:1..."),
]
Out = Annotated[Path | None, typer.Option(help="HTML page to write.")]


@dataclass(frozen=True, kw_only=True)
class Question:
    """A task and a model, as they were typed."""

    task: str | None
    prompts: int | None
    seed: int
    clean: Sequence[str] | None
    corrupt: Sequence[str] | None
    answer: Sequence[str] | None
    wrong: Sequence[str] | None
    metric: str | None
    before_cap: bool
    model: str
    backend: str
    device: str

    @property
    def builtin(self) -> bool:
        """Whether it is a built-in task, which has prompts of two splits."""
        return self.task is not None

    def check(self) -> None:
        """Refuses what cannot be asked.

        Raises:
            EmptySelectionError: No prompts.
            TaskError: Prompts and answers that differ in number, or options that do not go together.
            UnknownNameError: No such task, metric or backend.
        """
        if self.metric is not None:
            check_choice("metric", self.metric, _READS)
        check_choice("backend", self.backend, get_args(Backend))
        texts = [f"--{name}" for name in ("clean", "corrupt", "answer", "wrong") if self._own(name)]
        if self.task is None and not texts:
            raise EmptySelectionError(
                "No prompts are named",
                exists=f"the tasks {', '.join(task_names(self.model))}",
                fix=f"--task ioi, or {_PROMPTS}",
            )
        if self.task is None:
            self._check_own()
            return
        if texts:
            raise TaskError(
                f"--task {self.task} brings its own prompts, and there is {', '.join(texts)} as well",
                fix="one of the two",
            )
        check_choice("task", self.task, task_names(self.model))
        if self.metric == "sequence_logprob":
            raise TaskError(
                f"The answers of --task {self.task} are single tokens, and sequence_logprob is for "
                "longer ones",
                fix="--metric cross_entropy, or prompts of your own",
            )
        if self.prompts is not None and self.prompts < 1:
            raise EmptySelectionError(f"--n {self.prompts} leaves no prompt", fix="--n 32")

    def _check_own(self) -> None:
        if self.prompts is not None or self.seed:
            raise TaskError("--n is for built-in tasks, which draw their prompts", fix="--task")
        metric = self.metric or "logit_diff"
        reads = _READS[metric]
        unread = [name for name in ("answer", "wrong") if self._own(name) and name not in reads]
        if unread:
            raise TaskError(
                f"--metric {metric} does not read --{unread[0]}", fix=f"leave --{unread[0]} out"
            )
        optional = _MAY_LACK.get(metric)
        names = [n for n in ("clean", "corrupt", *reads) if n != optional or self._own(n)]
        counts = [len(self._own(name)) for name in names]
        if len(set(counts)) > 1:
            numbers = ", ".join(f"{n} --{name}" for n, name in zip(counts, names, strict=True))
            raise TaskError(
                f"There are {numbers}", fix=f"one of each for every prompt: --{' --'.join(names)}"
            )

    def _own(self, name: str) -> list[str]:
        """What was given of one option."""
        return list(getattr(self, name) or ())

    def n_prompts(self, default: int) -> int:
        """How many prompts of one split there are; ``default`` where ``--n`` does not say."""
        return (self.prompts or default) if self.builtin else len(self._own("clean"))

    def load(self) -> HookedModel:
        """The model.

        Raises:
            MissingFileError: There is none of this name.
        """
        return load_named(self.model, self.backend, self.device)

    def ask(self, model: HookedModel, split: Split, default: int) -> Task:
        """The task.

        Args:
            model: The model that is asked.
            split: Which prompts of a built-in task; own prompts are all that there are.
            default: Prompts of a built-in task, where ``--n`` does not say.
        """
        from gemmascope_plugin.causes import Task

        if self.task is None:
            metric = self._metric(self.metric or "logit_diff", self.answer, self.wrong)
            return Task(self._own("clean"), self._own("corrupt"), metric, "own prompts")
        task = builtin_task(self.task, model, self.n_prompts(default), split, self.seed)
        asked = cast("Any", task.asked)
        if self.metric is None:
            return replace(task, metric=replace(asked, before_cap=self.before_cap))
        return replace(task, metric=self._metric(self.metric, asked.answer, asked.wrong))

    def _metric(self, name: str, answer: Any, wrong: Any) -> Any:
        import gemmascope_plugin.causes as causes

        words = {"answer": answer, "wrong": wrong or None}
        reads = {each: words[each] for each in _READS[name]}
        return getattr(causes, name)(**reads, before_cap=self.before_cap)


def task_names(model: str) -> tuple[str, ...]:
    """The built-in tasks that a model has, by its name."""
    from gemmascope_plugin.causes.builtin import TASKS
    from gemmascope_plugin.demo.tasks import NAMES, TASK_NAMES

    return tuple(dict.fromkeys((*TASK_NAMES, *NAMES))) if model == BUNDLED else TASKS


def builtin_task(name: str, model: HookedModel, n: int, split: Any, seed: int) -> Task:
    """A built-in task.

    Args:
        name: One of :func:`task_names`; those of the suite may be called as it calls them.
        model: The model.
        n: Prompts.
        split: ``train`` or ``held_out``.
        seed: Of the draw.
    """
    from gemmascope_plugin.causes import Task
    from gemmascope_plugin.causes.builtin import TASKS
    from gemmascope_plugin.demo.tasks import make_task

    if name not in TASKS:
        return make_task(name, n=n, split=split, seed=seed)
    return Task.builtin(name, model, n=n, split=split, seed=seed)


def split_of(text: str | None, builtin: bool) -> Any:
    """The split that was typed, ``held_out`` by default; blanks may be of any kind.

    Raises:
        TaskError: A split of prompts that are not a built-in task.
        UnknownNameError: No such split.
    """
    from gemmascope_plugin.causes.builtin import SPLITS

    if text is not None and not builtin:
        raise TaskError("--split is for built-in tasks", fix="leave --split out")
    name = (text or "held_out").replace("-", "_")
    check_choice("split", name, SPLITS)
    return name


def load_named(name: str, backend: str, device: str) -> HookedModel:
    """A model by its name.

    Args:
        name: The bundled one, a name on the hub or a folder.
        backend: Model class.
        device: Where it goes.

    Raises:
        MissingFileError: There is none of this name.
    """
    import gemmascope_plugin as gs

    chosen = cast("Any", backend)
    if name != BUNDLED:
        return gs.load_model(name, backend=chosen, device=device)
    return gs.tiny(backend=chosen, device=_bundled_device(device)).model


def _bundled_device(device: str) -> str:
    """A model as small as the bundled one is quicker on the CPU."""
    return "cpu" if device == "auto" else device


def check_out(path: Path | None, option: str = "--out") -> None:
    """Refuses a place that cannot be written to, before any work is done.

    Args:
        path: The file or folder to be written; None for none.
        option: The option.

    Raises:
        MissingFileError: It lies in a folder that does not exist.
    """
    if path is not None and not path.expanduser().parent.is_dir():
        raise MissingFileError(
            f"There is no folder {str(path.parent)!r} for {option} {str(path)!r}",
            fix=f"make the folder, or {option} {path.name}",
        )


def refuse_dictionaries(option: str, call: str) -> None:
    """Says that features are for Python.

    Raises:
        TaskError: Always.
    """
    raise TaskError(
        f"{option} needs dictionaries, which this command does not load", fix=f"in Python, {call}"
    )
