"""The tokens of one pass that a dictionary or an edit works on.

Positions are absolute in the text, also during generation with a key-value cache, where a pass sees
one token. Negative positions and the ends of slices count from the end of the prompt:

* ``4``, ``-1`` (the prompt's last token), ``[2, -3]``;
* ``slice(3, None)`` reaches into what is generated, ``slice(1, -1)`` does not;
* a boolean mask ``[pos]`` or ``[batch, pos]`` over the prompt; what is generated is outside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Int

from gemmascope_plugin.errors import EmptySelectionError
from gemmascope_plugin.indices import as_indices

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
