"""A method of ``discover``: its name, its options, its cost and its paper; and what it refuses.

One small class per algorithm, in a file of its own where it is one: ``scored_methods.py``,
``scored_methods.py``, ``acdc.py``, ``feature_method.py``. To add a method, write such a class and put it
into ``METHODS`` of ``discover.py``; nothing else needs to know it.

1. :class:`Options` is what a call says beside model, task and method.
2. An option that was set and that the method does not take would change nothing: it is refused, with
   the methods that take it.

Cost: none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Literal, TypeVar

from gemmascope_plugin.causes import Task
from gemmascope_plugin.causes.method import Method, unused_option
from gemmascope_plugin.causes.replace import Replacement
from gemmascope_plugin.circuits.select import greedy, threshold, top_n
from gemmascope_plugin.errors import TaskError
from gemmascope_plugin.graphs.circuit import Circuit
from gemmascope_plugin.graphs.graph import Graph
from gemmascope_plugin.graphs.graph_arrays import Labels, Rank
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.splice.hooked_sae import Saes

Scored = Literal["nodes", "edges", "features"]
"""What a method scores; features, with errors and raw components beside them, are nodes too."""
Units = Literal["nodes", "edges"]
Selection = Literal["top", "greedy"]
COMPONENTS = ("head", "mlp")
"""Kinds of nodes by default."""
MEMORY = "2 GB"
"""Memory of methods that plan their passes by it."""
SELECTING = frozenset({"size", "tau", "rank"})
"""Options of all methods that score and then keep the best."""
_FIXES = {("acdc", "size"): "tau=0.01 sets what ACDC keeps"}


@dataclass(frozen=True)
class Options:
    """What a call of ``discover`` says beside model, task and method."""

    nodes: tuple[str, ...] = COMPONENTS
    saes: Saes = None
    units: Units | None = None
    size: int | None = None
    tau: float | None = None
    select: Selection = "top"
    rank: Rank = "absolute"
    steps: int | None = None
    replacement: Replacement = "other"
    per_position: bool = False
    errors: bool = True
    edges: bool = True
    level: int | None = None
    labels: Labels | None = None
    max_rows: int | None = None
    memory_budget: int | str | None = None
    progress: bool = False

    @property
    def memory(self) -> int | str:
        """The memory budget of methods that plan their passes by it."""
        return MEMORY if self.memory_budget is None else self.memory_budget

    @property
    def changed(self) -> tuple[str, ...]:
        """Options that are not at their defaults."""
        values = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        return tuple(
            name
            for name, (value, default) in values.items()
            if (value is not None if default is None else value != default)
        )


M = TypeVar("M", bound="CircuitMethod")


@dataclass(frozen=True)
class CircuitMethod(ABC):
    """One way to find a circuit."""

    name: str
    scores: Scored
    options: frozenset[str]
    """Options that change something, beside ``progress``."""
    paper: str
    cost: str

    @classmethod
    def by(cls: type[M], method: type[Method], scores: Scored, options: frozenset[str]) -> M:
        """Circuits of what a method of ``causes`` scores, with those of its options that calls have."""
        taken = {field.name for field in fields(Options)}.intersection(method.options())
        return cls(method.name, scores, options | taken, method.paper, method.cost)

    @abstractmethod
    def find(self, model: HookedModel, task: Task, options: Options) -> Circuit:
        """The circuit of a task."""

    def refuse_unused(self, options: Options, methods: Iterable[CircuitMethod]) -> None:
        """Refuses the first option that plays no part, and says in which ``methods`` it does."""
        dictionaries = () if "feature" in options.nodes or self.scores == "features" else ("saes",)
        for option in options.changed:
            if option == "progress" or option in self.options.difference(dictionaries):
                continue
            takers = [method for method in methods if option in method.options]
            raise unused_option(
                option,
                f"circuits of {self.scores} by {self.name!r}",
                exists=f"{option} in circuits of {_listed(takers)}",
                fix=_FIXES.get((self.name, option), self._fix(option, takers)),
            )

    def _fix(self, option: str, takers: Sequence[CircuitMethod]) -> str:
        if option == "saes" and self.scores == "nodes":
            return 'nodes=("head", "mlp", "feature"), or without saes='
        if self.scores != "features" and {method.scores for method in takers} == {"features"}:
            return f'nodes="features", or without {option}='
        return f"without {option}="


def select_units(graph: Graph, options: Options, default: int) -> Circuit:
    """The best units: as many as asked for, by default ``default``, or all above the bar."""
    refuse_size_and_tau(options)
    if options.tau is not None:
        return threshold(graph, options.tau, rank=options.rank)
    choose = greedy if options.select == "greedy" else top_n
    return choose(graph, default if options.size is None else options.size, rank=options.rank)


def refuse_size_and_tau(options: Options) -> None:
    """Refuses two answers to one question."""
    if options.size is not None and options.tau is not None:
        raise TaskError(
            f"Both size={options.size} and tau={options.tau} say what to keep", fix="one of them"
        )


def _listed(methods: Iterable[CircuitMethod]) -> str:
    """``nodes by 'ig', edges by 'eap-ig' or 'eap-ig-activations'``."""
    names: dict[str, list[str]] = {}
    for method in methods:
        names.setdefault(method.scores, []).append(repr(method.name))
    return ", ".join(f"{scored} by {' or '.join(each)}" for scored, each in names.items())
