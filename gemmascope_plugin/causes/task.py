"""A causal question: clean prompts, corrupted prompts of the same length, and a metric.

1. Prompts may differ in length from each other, though not from their corrupted partner: activations are
   exchanged position by position. Shorter ones are padded **behind their end**, where a causal model does
   not look, so every number is that of the prompt alone and no attention mask is needed.
2. Token ids that are padded in front come with ``mask=`` and are moved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any
from weakref import ReferenceType, ref

import torch
from jaxtyping import Bool

from gemmascope_plugin.arguments import as_index
from gemmascope_plugin.causes.bound_task import BoundTask, TaskFigures, figures_of, right_prompts
from gemmascope_plugin.causes.builtin import Fill, Split, Template, build, build_from_template
from gemmascope_plugin.causes.builtin.builtin_tasks import check_task_name
from gemmascope_plugin.causes.builtin.template import (
    check_ask,
    check_corrupt,
    check_fill,
    check_needed_text,
    check_text,
    check_wrong,
    needs_wrong,
    plain,
    takes_wrong,
)
from gemmascope_plugin.causes.metric import Metric
from gemmascope_plugin.causes.metrics import Custom, KLDivergence, logit_diff
from gemmascope_plugin.causes.sequence import SequenceLogprob, sequence_logprob
from gemmascope_plugin.errors import InputError, TaskError
from gemmascope_plugin.models.chat import is_chat
from gemmascope_plugin.models.gate import gate
from gemmascope_plugin.models.prompts import padded, refuse_bytes_and_sets, right_padded
from gemmascope_plugin.models.protocol import HookedModel, check_model, describe, with_call

Prompts = str | Sequence[str] | torch.Tensor

N_SHOWN = 64
"""Prompts at most that the model runs when a task is printed."""


@dataclass(frozen=True)
class Origin:
    """How a task was made for a model."""

    model: ReferenceType[Any]
    """The model, as long as something else holds it."""
    split: str | None
    n_dropped: int
    """Prompts that were tried and do not fit its tokenizer."""


@dataclass(frozen=True)
class Task:
    """Clean prompts, corrupted prompts, and what to ask of the logits.

    Example:
        >>> import gemmascope_plugin as gs
        >>> model = gs.tiny().model
        >>> gs.Task.builtin("ioi", model, n=8).name
        'ioi'
    """

    clean: Prompts
    """Texts, token ids ``[prompt, pos]``, or what else is a prompt (``models/prompts.py``)."""
    corrupt: Prompts
    """As many prompts, each as long in tokens as its clean partner."""
    metric: Any
    """A metric, higher is better; a function of the logits stands for ``custom(function)``."""
    name: str = "task"
    mask: Bool[torch.Tensor, "prompt pos"] | None = None
    """False where token ids are padding, for both kinds of prompts."""
    origin: Origin | None = field(default=None, compare=False)
    """How it was made for a model; None for prompts that were given."""

    def __post_init__(self) -> None:
        if not isinstance(self.metric, Metric):
            if not callable(self.metric):
                raise TaskError(
                    f"The metric of task {self.name!r} is {self.metric!r}",
                    fix="logit_diff(answer, wrong), or a function of logits [prompt, d_vocab]",
                )
            object.__setattr__(self, "metric", Custom(fn=self.metric))
        for name in ("clean", "corrupt"):
            if not isinstance(getattr(self, name), Iterable):
                raise InputError(
                    f"{name}={describe(getattr(self, name))} is not prompts",
                    fix="Task(clean, corrupt, logit_diff(answer, wrong)) of texts or token ids",
                )
            object.__setattr__(self, name, _one_by_one(getattr(self, name)))

    @property
    def question(self) -> Metric:
        """The metric as an object."""
        assert isinstance(self.metric, Metric)
        return self.metric

    @classmethod
    @gate(name=check_task_name, model=check_model)
    def builtin(
        cls, name: str, model: HookedModel, *, n: int = 64, split: Split = "train", seed: int = 0
    ) -> Task:
        """A task by name, in prompts that fit the model's tokenizer; see ``builtin_tasks.py``.

        Args:
            name: ``ioi``, ``greater_than``, ``agreement``, ``agreement_es``, ``capitals``,
                ``city_state``, ``successors``, ``induction``, ``antonyms``, ``pronouns``, ``two_hop``.
            model: The model that will be asked. On the bundled suite the names that it knows give its
                own tasks.
            n: Prompts.
            split: ``train`` and ``held_out`` share no words and no templates.
            seed: The same arguments give the same prompts.

        Raises:
            InputError: An argument of another kind.
            UnknownNameError: An unknown task or split, or one that the model has no prompts of.
            TaskError: Fewer prompts than that fit the tokenizer.
            EmptySelectionError: ``n`` below 1.
            ModelError: The model has no tokenizer.
        """
        built = build(name, model, n=n, split=split, seed=seed)
        origin = Origin(ref(model), split, built.n_dropped)
        return cls(built.clean, built.corrupt, built.metric, name, origin=origin)

    @classmethod
    @gate(
        model=check_model,
        template=check_needed_text("template", '"When {A} and {B} left, {B} gave a ring to"'),
        answer=check_needed_text("answer", '" {A}"'),
        wrong=check_text("wrong", '" {B}"'),
        corrupt=check_corrupt,
        fill=check_fill,
        metric=check_ask,
    )
    def from_template(
        cls,
        model: HookedModel,
        template: str,
        *,
        answer: str,
        wrong: str | None = None,
        corrupt: str | Mapping[str, str],
        fill: Fill,
        metric: Callable[..., Any] = logit_diff,
        n: int | None = None,
        seed: int = 0,
        name: str = "template",
    ) -> Task:
        """A task from a sentence with slots and lists of what may stand in them.

        Args:
            model: The model that will be asked; what does not fit its tokenizer is dropped and counted.
            template: ``{name}`` is a slot.
            answer: What follows, with its blank: ``" {A}"``.
            wrong: What to compare with; by default the answer to the corrupted prompt. ``{other A}`` is
                what stands for ``A`` there.
            corrupt: Slot to another slot, whose text it gets, or to ``"other"``, another entry of its
                list; or a template of the corrupted prompt.
            fill: Slot to texts; several slots to rows of texts that belong together.
            metric: ``logit_diff``, ``probability``, ``margin`` or ``cross_entropy``, of which the last
                two take no ``wrong``; answers of several tokens need ``sequence_logprob``. Or a function
                of ``answer`` and ``wrong``: ``partial(logit_diff, before_cap=True)``.
            n: Prompts; None for as many as there are, up to 64.
            seed: Of the draw.
            name: Of the task.

        Raises:
            InputError: An argument of another kind.
            UnknownNameError: A slot without a list, or a list without a slot.
            TaskError: Nothing to compare with, a metric that is not one of answers, or too few prompts
                that fit the tokenizer.

        Example:
            >>> import gemmascope_plugin as gs
            >>> model = gs.tiny().model
            >>> names = ["anna", "george", "mary", "john"]
            >>> task = gs.Task.from_template(
            ...     model,
            ...     "when {A} and {B} went to the {place} , {B} gave a drink to",
            ...     answer=" {A}",
            ...     wrong=" {B}",
            ...     corrupt="when {A} and {B} went to the {place} , {A} gave a drink to",
            ...     fill={"A": names, "B": names, "place": ["store", "park"]},
            ... )
            >>> len(task)
            24
        """
        check_wrong(metric, wrong)
        tokens = "all" if plain(metric) is sequence_logprob else "one"
        compares = takes_wrong(metric)
        checked = Template.of(template, answer, wrong, corrupt, fill, tokens, compares=compares)
        if needs_wrong(metric) and checked.wrong is None:
            raise TaskError(
                f"There is nothing to compare {answer!r} with",
                fix="wrong=..., or metric=probability",
            )
        built = build_from_template(checked, model, metric, n, seed)
        origin = Origin(ref(model), None, built.n_dropped)
        return cls(built.clean, built.corrupt, built.metric, name, origin=origin)

    def filtered(self, model: HookedModel) -> Task:
        """The same task on the prompts that a model gets right (``bound_task.py``).

        Raises:
            TaskError: It gets none right, or the metric knows no right and wrong.
        """
        return self.take(right_prompts(model, self.bind(model)))

    def figures(self, model: HookedModel) -> TaskFigures:
        """Mean metric and accuracy of a model on the clean prompts."""
        return figures_of(model, self.bind(model))

    @cached_property
    def _figures(self) -> tuple[TaskFigures, str] | None:
        model = None if self.origin is None else self.origin.model()
        if model is None:
            return None
        few = self.first(N_SHOWN)
        on = str(model.cfg.model_name)
        if len(few) < len(self):
            on += f" on its first {len(few)}"
        return figures_of(model, few.bind(model)), on

    def __repr__(self) -> str:
        first = self.clean if isinstance(self.clean, str) else self.clean[0]
        words = [repr(self.name), f"{len(self)} prompts"]
        if self.origin is not None and self.origin.split is not None:
            words[-1] = f"{len(self)} {self.origin.split} prompts"
        words.append(self.question.name)
        if self._figures is not None:
            words[-1] += " {} on {}".format(*self._figures)
        if self.origin is not None and self.origin.n_dropped:
            words.append(f"{self.origin.n_dropped} dropped")
        return f"Task({', '.join([*words, f'first {first!r}'])})"

    def __len__(self) -> int:
        return 1 if isinstance(self.clean, str) else len(self.clean)

    def first(self, n: int) -> Task:
        """The same task on its first ``n`` prompts."""
        return self.take(range(min(n, len(self))))

    def take(self, index: Sequence[int]) -> Task:
        """The same task on some of its prompts, in this order."""
        chosen = list(index)
        clean, corrupt = (_taken(prompts, chosen) for prompts in (self.clean, self.corrupt))
        mask = None if self.mask is None else self.mask[chosen]
        metric = self.question.take(chosen)
        return replace(self, clean=clean, corrupt=corrupt, metric=metric, mask=mask)

    def bind(self, model: HookedModel) -> BoundTask:
        """Token ids and a metric for this model, checked.

        Raises:
            TaskError: Prompts that differ in number or length, or that do not differ at all.
            EmptySelectionError: An empty prompt.
        """
        clean, lengths = self._tokens(model, self.clean)
        corrupt, others = self._tokens(model, self.corrupt)
        if len(clean) != len(corrupt):
            raise TaskError(
                f"There are {len(clean)} clean and {len(corrupt)} corrupted prompts",
                fix="one corrupted prompt for each clean one",
            )
        if not torch.equal(lengths, others):
            row = int((lengths != others).nonzero()[0])
            raise TaskError(
                f"Prompt {row} has {int(lengths[row])} tokens clean and {int(others[row])} corrupted",
                fix="corrupted prompts of the same length in tokens as their clean partner",
            )
        if torch.equal(clean, corrupt):
            raise TaskError("Clean and corrupted prompts are the same tokens")
        if isinstance(self.question, SequenceLogprob):
            rows = self.question.rows(model, (clean, corrupt), lengths)
            return BoundTask(rows.clean, rows.corrupt, rows.lengths, rows.metric, self.name)
        at = self.question.positions(lengths)
        before = [row[: int(end) + 1] for row, end in zip(clean, at, strict=True)]
        bound = replace(self.question.bind(model, len(clean), before), at=at)
        task = BoundTask(clean, corrupt, lengths, bound, self.name)
        return task.with_reference(model) if isinstance(self.question, KLDivergence) else task

    def _tokens(self, model: HookedModel, prompts: Prompts) -> Any:
        if self.mask is None:
            return padded(model, prompts)
        if not isinstance(prompts, torch.Tensor) or prompts.shape != self.mask.shape:
            shape = tuple(prompts.shape) if isinstance(prompts, torch.Tensor) else "texts"
            raise TaskError(
                f"mask has shape {tuple(self.mask.shape)}, the prompts are {shape}",
                fix="token ids [prompt, pos] and a mask of the same shape",
            )
        return right_padded(model, prompts, self.mask)


def _one_by_one(prompts: Any) -> Any:
    """Prompts in a form that has one entry for each: a tokenizer's output and single ones have not."""
    refuse_bytes_and_sets(prompts)
    if isinstance(prompts, Mapping) and "input_ids" in prompts:
        ids, mask = prompts["input_ids"], prompts.get("attention_mask")
        if as_index(ids[0]) is not None:
            ids, mask = [ids], None if mask is None else [mask]
        if mask is None:
            return [_plain(row) for row in ids]
        pairs = zip(ids, mask, strict=True)
        return [[i for i, m in zip(_plain(r), _plain(k), strict=True) if m] for r, k in pairs]
    if isinstance(prompts, str) or getattr(prompts, "ndim", 1) != 1:
        return prompts
    is_single = is_chat(prompts) or (len(prompts) > 0 and as_index(prompts[0]) is not None)
    return [prompts] if is_single else prompts


def _plain(row: Any) -> list[int]:
    return [int(number) for number in row]


def _taken(prompts: Prompts, index: list[int]) -> Prompts:
    if isinstance(prompts, str):
        return prompts if index == [0] else [prompts for _ in index]
    return prompts[index] if isinstance(prompts, torch.Tensor) else [prompts[i] for i in index]


def check_task(task: object, call: str = "") -> None:
    """Refuses what is not a task."""
    if isinstance(task, Task):
        return
    if isinstance(task, str):
        fix = f"task = gemmascope_plugin.Task.builtin({task!r}, model)"
    else:
        fix = "gemmascope_plugin.Task(clean, corrupt, logit_diff(answer, wrong))"
    raise InputError(f"{describe(task)} is not a task", fix=with_call(fix, call))


def check_tasks(tasks: object, call: str = "") -> None:
    """The same for one task or a sequence of them, of which there may be none."""
    for task in tasks if isinstance(tasks, (list, tuple)) else [tasks]:
        check_task(task, call)
