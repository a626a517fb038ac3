"""Options that commands share, each declared once, and what they ask: a task, and a model.

A parameter of a command that is annotated with a group of options, a dataclass of them, is typed option
by option (``typed_one_by_one``). Of a ``Question``

1. ``--task`` is a built-in task, which makes prompts for any model (``causes/builtin``); or
   ``--clean``, ``--corrupt``, ``--answer`` and ``--wrong`` give prompts, each option once per prompt.
2. ``--metric`` is what is asked of the logits; a built-in task brings its own.
3. All that can be checked without the model is checked before it is loaded.

Cost: loading the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args, get_type_hints

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
SplitName = Annotated[
    str | None, typer.Option("--split", help="Prompts of that task: held_out (default) or train.")
]
Seed = Annotated[int, typer.Option(help="Seed of the draw of that task's prompts.")]
BackendName = Annotated[str, typer.Option(help="Model class: hooked or bridge.")]
Device = Annotated[
    str,
    typer.Option(help="Where the model goes: auto (a GPU if there is one), cpu, cuda, cuda:1..."),
]
LocalDir = Annotated[
    str | None, typer.Option(help="Folder that mirrors the dictionaries' repository.")
]
Out = Annotated[Path | None, typer.Option(help="HTML page to write.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def typed_one_by_one(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the options of its groups as options of its own."""
    groups: dict[str, Any] = {}
    options: list[Parameter] = []
    for option in signature(command, eval_str=True).parameters.values():
        if not is_dataclass(option.annotation):
            options.append(option.replace(kind=Parameter.KEYWORD_ONLY))
            continue
        groups[option.name] = group = option.annotation
        hints = get_type_hints(group, include_extras=True)
        options += [
            Parameter(
                field.name,
                Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=hints[field.name],
            )
            for field in fields(group)
        ]

    def run(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        command(**values)

    run.__doc__ = command.__doc__
    vars(run)["__signature__"] = Signature(options)
    return run


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """A model, as it was typed."""

    model: Annotated[
        str,
        typer.Option(
            help="Model: gemma-2-tiny, gemma-3-270m (extra gemma), any name on the hub, a folder or a "
            "GGUF file.",
        ),
    ] = BUNDLED
    backend: BackendName = "hooked"
    device: Device = "auto"

    def check(self) -> None:
        """Refuses a backend that does not exist."""
        check_choice("backend", self.backend, get_args(Backend))

    def load(self) -> HookedModel:
        """The model; an error where there is none of this name."""
        return load_named(self.model, self.backend, self.device)


@dataclass(frozen=True, kw_only=True)
class Question(ModelOptions):
    """A task and a model, as they were typed."""

    task: TaskName = None
    prompts: Annotated[int | None, typer.Option("--n", help="Number of prompts of that task.")] = (
        None
    )
    seed: Seed = 0
    clean: Annotated[
        list[str] | None, typer.Option(help="Clean prompt of your own; once per prompt.")
    ] = None
    corrupt: Annotated[
        list[str] | None,
        typer.Option(help="Its corruption, as long in tokens as the clean prompt."),
    ] = None
    answer: Annotated[
        list[str] | None,
        typer.Option(help="Right next word of a clean prompt, with its blank: ' Paris'."),
    ] = None
    wrong: Annotated[list[str] | None, typer.Option(help="Word to compare the answer with.")] = None
    metric: Annotated[
        str | None,
        typer.Option(
            help="logit_diff, probability, margin, cross_entropy, kl_divergence, sequence_logprob."
        ),
    ] = None
    before_cap: Annotated[
        bool, typer.Option("--before-cap", help="Read logits before the final soft-cap.")
    ] = False

    @property
    def builtin(self) -> bool:
        """Whether it is a built-in task, which has prompts of two splits."""
        return self.task is not None

    def check(self) -> None:
        """Refuses what cannot be asked."""
        if self.metric is not None:
            check_choice("metric", self.metric, _READS)
        super().check()
        texts = [
            f"--{name}" for name in ("clean", "corrupt", "answer", "wrong") if self._typed(name)
        ]
        if self.task is None and not texts:
            raise EmptySelectionError(
                "No prompts are named",
                exists=f"the tasks {', '.join(task_names(self.model))}",
                fix=f"--task ioi, or {_PROMPTS}",
            )
        if self.task is None:
            self._check_prompts()
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

    def _check_prompts(self) -> None:
        if self.prompts is not None or self.seed:
            raise TaskError("--n is for built-in tasks, which draw their prompts", fix="--task")
        metric = self.metric or "logit_diff"
        reads = _READS[metric]
        unread = [name for name in ("answer", "wrong") if self._typed(name) and name not in reads]
        if unread:
            raise TaskError(
                f"--metric {metric} does not read --{unread[0]}", fix=f"leave --{unread[0]} out"
            )
        optional = _MAY_LACK.get(metric)
        names = [n for n in ("clean", "corrupt", *reads) if n != optional or self._typed(n)]
        counts = [len(self._typed(name)) for name in names]
        if len(set(counts)) > 1:
            numbers = ", ".join(f"{n} --{name}" for n, name in zip(counts, names, strict=True))
            raise TaskError(
                f"There are {numbers}", fix=f"one of each for every prompt: --{' --'.join(names)}"
            )

    def _typed(self, name: str) -> list[str]:
        """What was typed for an option."""
        return list(getattr(self, name) or ())

    def n_prompts(self, default: int) -> int:
        """How many prompts of one split there are; ``default`` where ``--n`` does not say."""
        return (self.prompts or default) if self.builtin else len(self._typed("clean"))

    def ask(self, model: HookedModel, split: Split, default: int) -> Task:
        """The task: prompts that were typed, or of a built-in one ``--n`` (``default``) of a split."""
        from gemmascope_plugin.causes import Task

        if self.task is None:
            metric = self._metric(self.metric or "logit_diff", self.answer, self.wrong)
            return Task(self._typed("clean"), self._typed("corrupt"), metric, "own prompts")
        task = builtin_task(self.task, model, self.n_prompts(default), split, self.seed)
        question = cast("Any", task.question)
        if self.metric is None:
            return replace(task, metric=replace(question, before_cap=self.before_cap))
        return replace(task, metric=self._metric(self.metric, question.answer, question.wrong))

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
    """A task of ``task_names``; those of the suite may be called as it calls them."""
    from gemmascope_plugin.causes import Task
    from gemmascope_plugin.causes.builtin import TASKS
    from gemmascope_plugin.demo.tasks import make_task

    if name not in TASKS:
        return make_task(name, n=n, split=split, seed=seed)
    return Task.builtin(name, model, n=n, split=split, seed=seed)


def split_of(text: str | None, builtin: bool) -> Any:
    """The split that was typed, ``held_out`` by default; blanks may be of any kind."""
    from gemmascope_plugin.causes.builtin import SPLITS

    if text is not None and not builtin:
        raise TaskError("--split is for built-in tasks", fix="leave --split out")
    name = (text or "held_out").replace("-", "_")
    check_choice("split", name, SPLITS)
    return name


def load_named(name: str, backend: str, device: str) -> HookedModel:
    """The bundled model, one on the hub, or one in a folder."""
    import gemmascope_plugin as gs

    chosen = cast("Any", backend)
    if name != BUNDLED:
        return gs.load_model(name, backend=chosen, device=device)
    # A model as small as this one is quicker on the CPU.
    return gs.tiny(backend=chosen, device="cpu" if device == "auto" else device).model


def check_out(path: Path | None, option: str = "--out") -> None:
    """Refuses a place that cannot be written to, before any work is done."""
    if path is not None and not path.expanduser().parent.is_dir():
        raise MissingFileError(
            f"There is no folder {str(path.parent)!r} for {option} {str(path)!r}",
            fix=f"make the folder, or {option} {path.name}",
        )


def refuse_dictionaries(option: str, call: str) -> None:
    """Says that features are for Python."""
    raise TaskError(
        f"{option} needs dictionaries, which this command does not load", fix=f"in Python, {call}"
    )


def table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Iterable[str] = ()
) -> list[str]:
    """Lines of an aligned plain-text table; the columns in ``right`` are aligned to the right."""
    lines = [list(columns), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    to_right = [column in set(right) for column in columns]
    return [
        "  ".join(
            cell.rjust(width) if aligned else cell.ljust(width)
            for cell, width, aligned in zip(line, widths, to_right, strict=True)
        ).rstrip()
        for line in lines
    ]
