"""Methods as classes in a table: one name, the options it takes, its paper and its cost.

1. A table has the classes by name; each is a frozen dataclass whose fields are its options.
2. :func:`pick` makes the method that is asked for. An option that is a field of another method of the
   table and not of this one would change nothing, and is refused here, with the methods that take it.

A new method is a class of its own in the table of what it scores: ``attribution_patching``,
``edge_attribution``, the slopes of feature circuits (``gradient/site_runs.py``). ``discover`` takes name,
options, paper and cost of its methods from here (``circuits/circuit_methods.py``).

Cost: none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

from gemmascope_plugin.errors import TaskError, check_choice


@dataclass(frozen=True)
class Method:
    """A way to score nodes or edges; its fields are its options."""

    name: ClassVar[str]
    title: ClassVar[str]
    """In words, for titles."""
    paper: ClassVar[str]
    cost: ClassVar[str]

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """Names of the options that it takes beside those of all methods."""
        return tuple(option.name for option in fields(cls))


M = TypeVar("M", bound=Method)


def table_of(*methods: type[M]) -> Mapping[str, type[M]]:
    """Classes by the name of the method."""
    return {method.name: method for method in methods}


def pick(table: Mapping[str, type[M]], name: str, **options: Any) -> M:
    """The method of a name, with the options that were given; None stands for what was not."""
    check_choice("method", name, table)
    chosen = {option: value for option, value in options.items() if value is not None}
    for option in chosen:
        if option not in table[name].options():
            takers = [other for other, method in table.items() if option in method.options()]
            raise unused_option(
                option,
                f"method={name!r}",
                exists=f"{option} for method={' and '.join(map(repr, takers))}",
                fix=f'method="{takers[0]}", or without {option}=',
            )
    return table[name](**chosen)


def unused_option(option: str, where: str, *, fix: str, exists: str | None = None) -> TaskError:
    """The error of an option that would change nothing."""
    return TaskError(f"{option} plays no part in {where}", exists=exists, fix=fix)
