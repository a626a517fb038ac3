"""The tokens of one pass that a dictionary or an edit works on.

Positions are absolute in the text, also during generation with a key-value cache, where a pass sees
one token. Negative positions and the ends of slices count from the end of the prompt:

* ``4``, ``-1`` (the prompt's last token), ``[2, -3]``;
* ``slice(3, None)`` reaches into what is generated, ``slice(1, -1)`` does not;
* a boolean mask ``[pos]`` or ``[batch, pos]`` over the prompt; what is generated is outside it.

Which tokens of a pass a site works on follows from hooks before the model, its embedding and its first
block (``models/passes.py``), whatever way the model was called: directly, with a cache, with hooks, or
token by token during generation. Left alone are special tokens, padding by the caller's attention mask,
and everything outside the dictionary's own positions. Sites with the same choice share one mask per pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Int

from gemmascope_plugin.arguments import as_indices
from gemmascope_plugin.errors import EmptySelectionError, HookNotFiredError
from gemmascope_plugin.models.passes import Pass, PassWatch
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.models.tokens import kept_positions, special_ids

Positions = int | slice | Sequence[int] | torch.Tensor | None
Rows = int | slice | Sequence[int] | None


@dataclass(frozen=True, eq=False)
class Window:
    """The tokens of one pass."""

    keep: Bool[torch.Tensor, "batch pos"]
    """False at tokens that are left alone."""
    start: int = 0
    """Absolute position of the first one."""
    prompt: int | None = None
    """Length of the prompt, from whose end negative positions count; None for the pass itself."""
    horizon: int | None = None
    """One more than the last position that will be seen; None for the end of this pass."""
    ends: Int[torch.Tensor, " batch"] | None = None
    """Where each row's prompt ends, if some are padded behind their ends."""
    rows: tuple[int, ...] | None = None
    """Which rows of a larger batch these are; None for all of them."""
    n_rows: int | None = None
    """Rows of that batch."""
    grown: bool = False
    """Whether this text may be a prompt and what was generated after it, nobody knows from where on."""

    def narrowed(self, keep: Bool[torch.Tensor, "batch pos"]) -> Window:
        """The same tokens with another ``keep``."""
        return replace(self, keep=keep)

    @property
    def stop(self) -> int:
        """Absolute position after the last token."""
        return self.start + self.keep.shape[1]

    @property
    def end(self) -> int:
        """Length of the prompt."""
        return self.stop if self.prompt is None else self.prompt

    @property
    def batch(self) -> int:
        """Rows of the whole batch."""
        return len(self.keep) if self.n_rows is None else self.n_rows

    def select(self, positions: Positions, rows: Rows = None) -> Bool[torch.Tensor, "batch pos"]:
        """True at the tokens of this pass at the given positions and batch rows, kept or not."""
        if isinstance(positions, np.ndarray):
            positions = torch.from_numpy(positions)
        if self.grown and _from_the_end(positions):
            raise EmptySelectionError(
                f"positions={positions} count from the end of the prompt, and this text is the one "
                "before plus a token, so where its prompt ended is not known",
                fix="spliced.generate(), a key-value cache, or positions from the start of the text",
            )
        if positions is None:
            chosen = torch.ones(1, self.keep.shape[1], dtype=torch.bool)
        elif isinstance(positions, torch.Tensor):
            chosen = _mask(self, positions)
        else:
            chosen = _numbered(self, positions)
        by_row = _rows(rows, self.batch)[:, None]
        if self.rows is not None:
            by_row = by_row[list(self.rows)]
        return (chosen.to(by_row.device) & by_row).expand(self.keep.shape).to(self.keep.device)


def _from_the_end(positions: Positions) -> bool:
    if positions is None or isinstance(positions, torch.Tensor):
        return False
    if isinstance(positions, slice):
        return any(bound is not None and bound < 0 for bound in (positions.start, positions.stop))
    return any(position < 0 for position in _numbers(positions))


def _numbers(positions: Positions) -> list[int]:
    numbers = as_indices(positions)
    if numbers is None:
        raise EmptySelectionError(
            f"positions={positions!r} are not positions",
            fix="a number, several of them, a slice, or a boolean mask",
        )
    return numbers


def _numbered(window: Window, positions: Positions) -> Bool[torch.Tensor, "batch pos"]:
    """What integers or a slice select; negative ones count from the end of each row's own prompt."""
    if window.ends is None or not _from_the_end(positions):
        return torch.tensor(_listed(window, positions), dtype=torch.bool)[None]
    rows = [_listed(replace(window, prompt=end), positions) for end in window.ends.tolist()]
    return torch.tensor(rows, dtype=torch.bool)


def _listed(window: Window, positions: Positions) -> list[bool]:
    """Which tokens of the pass integers or a slice select."""
    here = range(window.start, window.stop)
    last = max(window.stop, window.horizon or 0)
    if isinstance(positions, slice):
        selected = _sliced(positions, window.end, last)
    else:
        numbers = _numbers(positions)
        wrong = [p for p in numbers if not -window.end <= p < last]
        if wrong:
            raise EmptySelectionError(
                f"Positions {wrong} lie outside the prompt", exists=f"positions 0 to {last - 1}"
            )
        selected = [p + window.end if p < 0 else p for p in numbers]
    if not selected:
        raise EmptySelectionError(
            f"positions={positions} selects no token", exists=f"positions 0 to {last - 1}"
        )
    chosen = set(selected)
    return [position in chosen for position in here]


def _sliced(positions: slice, end: int, last: int) -> range:
    """The positions of a slice whose negative ends count from the end of the prompt."""
    start, stop = (
        bound if bound is None else max(bound + end if bound < 0 else bound, 0)
        for bound in (positions.start, positions.stop)
    )
    return range(last)[slice(start, stop, positions.step)]


def _mask(window: Window, mask: torch.Tensor) -> torch.Tensor:
    """The part of a mask over the prompt that this pass sees; False after the prompt."""
    n_batch = window.batch
    if mask.dtype != torch.bool:
        raise EmptySelectionError(
            f"A tensor of {mask.dtype} is not a mask of positions",
            fix="positions=tensor.tolist() for indices, positions=tensor.bool() for a mask",
        )
    if mask.ndim == 1:
        mask = mask[None]
    if window.rows is not None:
        mask = mask[:, : window.end]  # the rest is padding of these rows
    if mask.shape[1] != window.end or mask.shape[0] not in (1, n_batch):
        raise EmptySelectionError(
            f"The mask of positions has shape {list(mask.shape)}",
            exists=f"a batch of {n_batch} with {window.end} tokens each",
        )
    if not mask.any():
        raise EmptySelectionError("The mask of positions selects no token")
    if window.rows is not None and len(mask) > 1:
        mask = mask[list(window.rows)]
    padded = torch.nn.functional.pad(mask, (0, max(0, window.stop - window.end)))
    return padded[:, window.start : window.stop]


def _rows(rows: Rows, n_batch: int) -> torch.Tensor:
    chosen = torch.zeros(n_batch, dtype=torch.bool)
    if rows is None:
        return ~chosen
    listed = rows if isinstance(rows, slice) else as_indices(rows)
    if listed is None:
        raise EmptySelectionError(f"rows={rows!r} are not rows", exists=f"rows 0 to {n_batch - 1}")
    if not isinstance(listed, slice) and any(not -n_batch <= row < n_batch for row in listed):
        raise EmptySelectionError(
            f"Batch rows {listed} do not exist", exists=f"rows 0 to {n_batch - 1}"
        )
    chosen[listed if isinstance(listed, slice) else list(listed)] = True
    if not chosen.any():
        raise EmptySelectionError(f"rows={rows} selects nothing", exists=f"{n_batch} rows")
    return chosen


@runtime_checkable
class TokenChoice(Protocol):
    """What a site of a dictionary says of the tokens that it works on."""

    hook_out: str
    exclude: tuple[str | int, ...]
    positions: Positions


class TokenMask:
    """The tokens of the running forward pass, by site."""

    def __init__(self, model: HookedModel, watch: PassWatch) -> None:
        self._model = model
        self._watch = watch
        self._serial = -1
        self._windows: dict[object, Window] = {}

    @property
    def serial(self) -> int:
        """Changes with every pass."""
        return self._watch.serial

    def window(self, site: TokenChoice, activation: torch.Tensor) -> Window:
        """The tokens that the site works on in this pass."""
        run = self._watch.current(site, activation.shape[:2])
        if self._serial != self._watch.serial:
            self._serial = self._watch.serial
            self._windows.clear()
        if run.tokens is None and site.exclude:
            raise HookNotFiredError(
                f"The tokens at {site.hook_out} are not known: the embedding did not run",
                fix="run from the tokens instead of start_at_layer, or splice with exclude=()",
            )
        key = (site.exclude, id(site.positions), activation.shape[:2], run.tokens is None)
        if key not in self._windows:
            self._windows[key] = self._window(site, run, activation)
        window = self._windows[key]
        return window.narrowed(window.keep.to(activation.device))

    def _window(self, site: TokenChoice, run: Pass, activation: torch.Tensor) -> Window:
        keep = torch.ones(activation.shape[:2], dtype=torch.bool, device=activation.device)
        if run.tokens is not None and site.exclude:
            ids = special_ids(self._model, site.exclude)
            keep = kept_positions(run.tokens, ids).to(keep.device)
        if run.attention is not None:
            keep = keep & run.attention.to(keep.device)
        # A pass of one token belongs to a generation, as a rule, and that token may be special.
        if keep.shape[1] > 1:
            refuse_empty(keep, site.exclude)
        batch = (run.rows, run.n_rows)
        ends = _ends(run, keep.shape[1])
        window = Window(keep, run.start, run.prompt, run.horizon, ends, *batch, run.grown)
        if site.positions is None:
            return window
        inside = window.narrowed(keep & window.select(site.positions))
        if run.start == 0 and inside.stop == run.horizon and not inside.keep.any():
            raise EmptySelectionError(
                f"positions={site.positions} of the dictionary at {site.hook_out} are excluded tokens",
                exists=f"exclude={site.exclude}",
                fix="other positions, or exclude=()",
            )
        return inside


def _ends(run: Pass, n_pos: int) -> Int[torch.Tensor, " batch"] | None:
    """Where the prompts end that are padded behind their ends; None where all end together."""
    if run.attention is None or run.start > 0 or run.rows is not None:
        return None
    ends = n_pos - run.attention.int().flip(1).argmax(1)
    return None if bool((ends == n_pos).all()) else ends


def refuse_empty(keep: Bool[torch.Tensor, "batch pos"], exclude: tuple[str | int, ...]) -> None:
    """Refuses prompts of which nothing is left."""
    if not keep.any(-1).all():
        raise EmptySelectionError(
            "A prompt has only excluded tokens",
            exists=f"exclude={exclude}",
            fix="prompts with at least one word, or exclude=()",
        )
