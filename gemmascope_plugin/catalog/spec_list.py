"""A list of specs that explains itself: readable text, an HTML table, a data frame, ``one()``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, overload

from gemmascope_plugin.catalog.cards import table
from gemmascope_plugin.catalog.site_names import human_size
from gemmascope_plugin.catalog.spec import SaeSpec
from gemmascope_plugin.errors import AmbiguousSpecError, shorten

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = (
    *("release", "id", "kind", "site", "layer", "width", "l0", "canonical", "size"),
    "provenance",
)
TEXT_ROWS = 10
HTML_ROWS = 50
_TELLING = ("model", "kind", "site", "layer", "width", "variant", "affine", "l0", "release")


class SpecList(Sequence[SaeSpec]):
    """An immutable list of specs.

    Args:
        specs: What it holds, in order.
    """

    def __init__(self, specs: Iterable[SaeSpec] = ()) -> None:
        self._specs = tuple(specs)

    def __len__(self) -> int:
        return len(self._specs)

    @overload
    def __getitem__(self, index: int) -> SaeSpec: ...

    @overload
    def __getitem__(self, index: slice) -> SpecList: ...

    def __getitem__(self, index: int | slice) -> SaeSpec | SpecList:
        if isinstance(index, slice):
            return SpecList(self._specs[index])
        return self._specs[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SpecList) and self._specs == other._specs

    def __hash__(self) -> int:
        return hash(self._specs)

    def one(self) -> SaeSpec:
        """The only spec in the list.

        Raises:
            AmbiguousSpecError: There are none or several; says which argument tells them apart.
        """
        if len(self) == 1:
            return self[0]
        if not self:
            raise AmbiguousSpecError("one() of an empty list", fix="find(...) with other arguments")
        raise AmbiguousSpecError(
            f"{len(self)} dictionaries match, one is needed",
            exists=shorten([f"{s.release} {s.sae_id}" for s in self], 4),
            fix=" or ".join(self._telling_arguments()),
        )

    def _telling_arguments(self) -> list[str]:
        """Arguments of ``find`` that take several values here, each with those values."""
        hints = []
        for name in _TELLING:
            values = sorted({getattr(s, name) for s in self}, key=lambda v: (v is None, v))
            if name == "width":
                values = list(
                    dict.fromkeys(w for _, w in sorted({(s.d_sae, s.width) for s in self}))
                )
            elif name == "variant":
                values = ["plain" if v is None else v for v in values]
            elif name == "l0":
                values = [v for v in values if v is not None]
            if len(values) > 1:
                marked = (
                    "'canonical' or " if name == "l0" and any(s.canonical for s in self) else ""
                )
                shown = [f"{v:g}" if isinstance(v, float) else repr(v) for v in values]
                hints.append(f"{name}={marked}one of {shorten(shown, 6)}")
        return hints or [f"sae_id={self[0].sae_id!r}"]

    def to_frame(self) -> pd.DataFrame:
        """One row per spec, one column per field."""
        import pandas as pd

        return pd.DataFrame([spec.to_dict() for spec in self])

    def _rows(self, limit: int) -> list[tuple[str, ...]]:
        return [
            (
                s.release,
                s.sae_id,
                s.kind,
                s.site,
                s.layer_text,
                s.width,
                s.l0_text,
                "*" if s.canonical else "",
                human_size(s.nbytes),
                s.provenance,
            )
            for s in self._specs[:limit]
        ]

    def _note(self, limit: int) -> str:
        more = f", {len(self) - limit} more not shown" if len(self) > limit else ""
        return f"{len(self)} dictionaries{more}"

    def __repr__(self) -> str:
        lines = [COLUMNS, *self._rows(TEXT_ROWS)]
        widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
        text = "\n".join(
            "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )
        return f"{text}\n{self._note(TEXT_ROWS)}"

    def _repr_html_(self) -> str:
        return table(COLUMNS, self._rows(HTML_ROWS), self._note(HTML_ROWS))
