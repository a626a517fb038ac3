"""Many dictionaries as one mapping that opens them when asked.

1. A key is a spec, a pair ``(release, sae_id)``, a hook name or a layer, as long as it means one.
2. The first use opens the dictionary; opened ones are kept, in the order of their last use.
3. Before one is opened, the least recently used ones are let go until all open weights together fit
   into the budget.  The suite drops its reference: a dictionary that you hold stays alive and is
   opened a second time if asked for.  Memory-mapped weights cost memory only once used.

Costs a few milliseconds per dictionary, paid at its first use.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from gemmascope_plugin.arguments import as_device, as_dtype, human_size, parse_size
from gemmascope_plugin.catalog import SaeSpec, get
from gemmascope_plugin.errors import (
    AmbiguousSpecError,
    EmptySelectionError,
    GemmaScopeError,
    InputError,
    UnknownNameError,
    nearest,
    number_of,
    shorten,
)
from gemmascope_plugin.loading.load import load

Key = SaeSpec | tuple[str, str] | str | int


class SaeSuite(Mapping[SaeSpec, Any]):
    """A lazy mapping from spec, hook name or layer to a loaded dictionary.

    Args:
        specs: The dictionaries, in the order of iteration.
        memory_budget: Most bytes of weights open at a time; None for no limit.
        options: Arguments of ``load``.

    Raises:
        InputError: Something that does not hold specs.
        EmptySelectionError: No specs.
        GemmaScopeError: One dictionary alone is larger than the budget, or two specs are the same.
    """

    def __init__(
        self, specs: Iterable[SaeSpec], *, memory_budget: int | None = None, **options: Any
    ) -> None:
        self.specs = tuple(specs)
        self.memory_budget = memory_budget
        self._options = options
        self._open: dict[SaeSpec, Any] = {}
        if not self.specs:
            raise EmptySelectionError("a suite needs at least one spec", fix="find(...)")
        if len(set(self.specs)) != len(self.specs):
            raise GemmaScopeError("the same spec is twice in the suite")
        largest = max(self.specs, key=self.nbytes)
        if memory_budget is not None and self.nbytes(largest) > memory_budget:
            raise GemmaScopeError(
                f"{largest.release} {largest.sae_id} has {human_size(self.nbytes(largest))} of "
                f"weights, the budget is {human_size(memory_budget)}",
                fix="a larger memory_budget, a narrower dictionary, or dtype=torch.bfloat16",
            )

    def nbytes(self, spec: SaeSpec) -> int:
        """Size of a dictionary's weights in this suite's type."""
        return spec.nbytes // 4 * self._options.get("dtype", torch.float32).itemsize

    @property
    def open_specs(self) -> tuple[SaeSpec, ...]:
        """Dictionaries that are open now, least recently used first."""
        return tuple(self._open)

    @property
    def open_nbytes(self) -> int:
        """Size of all open weights."""
        return sum(map(self.nbytes, self._open))

    def __getitem__(self, key: Key) -> Any:
        spec = self.spec(key)
        if spec in self._open:
            sae = self._open.pop(spec)
        else:
            self._make_room(self.nbytes(spec))
            sae = load(spec, **self._options)
        self._open[spec] = sae
        return sae

    def spec(self, key: Key) -> SaeSpec:
        """The one spec that a key means; opens nothing.

        Args:
            key: A spec, ``(release, sae_id)``, a hook name or a layer.

        Returns:
            The spec.

        Raises:
            UnknownNameError: None of the suite.
            AmbiguousSpecError: Several of the suite.
        """
        specs = [spec for spec in self.specs if _means(key, spec)]
        if len(specs) == 1:
            return specs[0]
        shown = repr(key) if not isinstance(key, SaeSpec) else f"{key.release} {key.sae_id}"
        if specs:
            raise AmbiguousSpecError(
                f"{shown} means {len(specs)} dictionaries of the suite",
                exists=shorten((f"({s.release!r}, {s.sae_id!r})" for s in specs), 4),
                fix="a spec, or a pair (release, sae_id)",
            )
        hooks = sorted({hook for s in self.specs for hook in (*s.hooks_in, *s.hooks_out)})
        layers = sorted({layer for s in self.specs for layer in s.all_layers})
        raise UnknownNameError(
            f"{shown} is not in the suite",
            exists=f"layers {shorten(layers, 12)}; hooks {shorten(hooks, 4)}",
            nearest=nearest(key, hooks) if isinstance(key, str) else None,
        )

    def __contains__(self, key: object) -> bool:
        return any(_means(key, spec) for spec in self.specs)

    def __iter__(self) -> Iterator[SaeSpec]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def close(self) -> None:
        """Let all open dictionaries go."""
        self._open.clear()

    def _make_room(self, nbytes: int) -> None:
        if self.memory_budget is None:
            return
        while self._open and self.open_nbytes + nbytes > self.memory_budget:
            self._open.pop(next(iter(self._open)))

    def __repr__(self) -> str:
        total = human_size(sum(map(self.nbytes, self.specs)))
        limit = "no limit" if self.memory_budget is None else human_size(self.memory_budget)
        models = shorten(sorted({spec.model for spec in self.specs}), 3)
        opened = f"{len(self._open)} open, {human_size(self.open_nbytes)}"
        n = number_of(len(self), "dictionary")
        return f"SaeSuite({n} of {models}, {total}; {opened}; budget: {limit})"


def _means(key: object, spec: SaeSpec) -> bool:
    if isinstance(key, SaeSpec):
        return key == spec
    if isinstance(key, str):
        return key in spec.hooks_in or key in spec.hooks_out
    if isinstance(key, tuple):
        return key == (spec.release, spec.sae_id)
    return type(key) is int and key in spec.all_layers


def as_specs(specs: Any) -> list[SaeSpec]:
    """One spec or several, given as specs or as pairs of release and id."""
    is_several = isinstance(specs, Iterable) and not isinstance(specs, (str, Mapping))
    entries = [] if not is_several else list(specs)
    if isinstance(specs, SaeSpec):
        entries = [specs]
    elif not is_several or not all(map(_is_spec, entries)):
        shown = type(specs).__name__ if specs is not None else "None"
        raise InputError(
            f"{shown} does not hold specs",
            exists="a SaeSpec, several, or pairs (release, sae_id)",
            fix="specs = gemmascope_plugin.find(model='2b', site='res', layer=20)",
        )
    return [spec if isinstance(spec, SaeSpec) else get(*spec) for spec in entries]


def _is_spec(spec: object) -> bool:
    if isinstance(spec, (tuple, list)):
        return len(spec) == 2 and all(isinstance(name, str) for name in spec)
    return isinstance(spec, SaeSpec)


def load_suite(
    specs: Iterable[SaeSpec | tuple[str, str]],
    *,
    memory_budget: int | str | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "float32",
    local_dir: str | Path | None = None,
    revision: str | None = None,
    offline: bool | None = None,
) -> SaeSuite:
    """Many dictionaries, opened when used.

    Args:
        specs: Specs or pairs ``(release, sae_id)``, e.g. a ``SpecList``.
        memory_budget: Most bytes of open weights, e.g. ``8_000_000_000`` or ``"8 GB"``.
        device: As for ``load``.
        dtype: As for ``load``.
        local_dir: As for ``load``.
        revision: As for ``load``.
        offline: As for ``load``.

    Returns:
        The mapping; ``suite["blocks.20.hook_resid_post"]`` or ``suite[20]`` opens one.

    Raises:
        UnknownNameError: A pair, a device or a type that does not exist, or a budget that is not a size.
        InputError: Something that does not hold specs.
        EmptySelectionError: No specs.
        GemmaScopeError: One dictionary alone is larger than the budget.

    Example:
        >>> suite = gs.tiny()
        >>> saes = gs.load_suite(suite.specs[:2], memory_budget="1 GB")
        >>> saes
        SaeSuite(2 dictionaries of gemma-2-tiny, 1.1 MB; 0 open, 0 B; budget: 1.00 GB)
    """
    return SaeSuite(
        as_specs(specs),
        memory_budget=parse_size(memory_budget),
        device=as_device(device),
        dtype=as_dtype(dtype),
        local_dir=local_dir,
        revision=revision,
        offline=offline,
    )
