"""How faithful a circuit is, beside its baselines, and under other treatments of reconstruction errors.

Reconstruction errors carry what dictionaries miss. Keeping all of them flatters a circuit of features,
ablating them asks of its features what they cannot do alone; so ``by_errors`` has both beside the circuit
as it is, whose error nodes count as nodes (Marks et al., arXiv 2403.19647, section 4). Each has its own
zero: the same treatment of errors, and nothing else kept.

Scores are kept in one file (``files/bundle.py``) with the circuit, as the bytes of its own file, and the
metric of every prompt. Reading trusts neither names, types, lengths nor ranges.

Cost: that of the circuit's file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float

import gemmascope_plugin.figures as figures
from gemmascope_plugin.errors import TaskError
from gemmascope_plugin.files.bundle import (
    as_json,
    from_json_value,
    plain_values,
    read_bundle,
    write_bundle,
)
from gemmascope_plugin.graphs.circuit import Circuit
from gemmascope_plugin.models.gate import gate

if TYPE_CHECKING:
    from pandas import DataFrame

MINIMAL = 0.01
"""A unit counts where leaving it out changes faithfulness by at least this."""
FORMAT, VERSION, KIND = "gemmascope_plugin scores", 1, "file of scores"
_NUMBERS = ("faithfulness", "metric_full", "metric_empty", "completeness", "kl")
_LISTS = ("sizes", "faithfulness_by_size", "random_by_size", "minimality")


@dataclass(frozen=True)
class Scores:
    """Faithfulness of a circuit and its ranking's prefixes, and of random circuits."""

    circuit: Circuit
    faithfulness: float
    """Of the circuit itself, which need not be the first units of the ranking; 1 = the full model, 0 =
    everything ablated."""
    sizes: tuple[int, ...]
    """Numbers of kept units that were measured."""
    faithfulness_by_size: tuple[float, ...]
    """Of the first units of the ranking."""
    random_by_size: tuple[tuple[float, ...], ...]
    """Faithfulness of random circuits, per size."""
    metric_full: float
    """Metric of the full model."""
    metric_empty: float
    """Metric with every node ablated."""
    completeness: float = float("nan")
    """Faithfulness of everything *but* the circuit: near 0 if nothing is missing from it."""
    kl: float = float("nan")
    """Divergence of the circuit's next-token distribution from the model's, in nats."""
    by_prompt: Float[torch.Tensor, "three prompt"] | None = None
    """Metric per prompt of the circuit, of the full model, and with nothing kept."""
    minimality: tuple[float, ...] | None = None
    """Share of the whole effect that each kept unit alone makes, in the order of the graph."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    by_errors: Mapping[str, Scores] = field(default_factory=dict)
    """The same circuit with errors ``kept``, ``as-circuit`` and ``ablated``; empty if not compared."""

    @property
    def random(self) -> tuple[float, ...]:
        """Of the random circuits of the circuit's size."""
        return self.random_by_size[self.sizes.index(self.circuit.size)]

    def interval(self, *, level: float = 0.95, n: int = 1000, seed: int = 0) -> tuple[float, float]:
        """Percentile interval of the faithfulness over resampled prompts.

        Args:
            level: Share of the resamples inside.
            n: Resamples.
            seed: Of the resampling.

        Raises:
            TaskError: The metric of single prompts was not kept.
        """
        if self.by_prompt is None:
            raise TaskError("These scores have no values of single prompts", fix="evaluate(...)")
        generator = torch.Generator().manual_seed(seed)
        size = self.by_prompt.shape[1]
        draws = torch.randint(size, (n, size), generator=generator)
        circuit, full, empty = self.by_prompt.double()[:, draws].mean(-1)
        shares = (circuit - empty) / (full - empty)
        low, high = shares.quantile(
            torch.tensor([0.5 - level / 2, 0.5 + level / 2]).double()
        ).tolist()
        return low, high

    def smallest(self, at_least: float) -> int | None:
        """The smallest measured size from which on faithfulness stays at ``at_least`` or above."""
        smallest = None
        for n, faithfulness in sorted(
            zip(self.sizes, self.faithfulness_by_size, strict=True), reverse=True
        ):
            if faithfulness < at_least:
                break
            smallest = n
        return smallest

    def to_frame(self) -> DataFrame:
        """A DataFrame, one row per size."""
        import pandas as pd

        rows = [
            {
                "size": n,
                "faithfulness": f,
                "random_mean": sum(r) / len(r) if r else float("nan"),
                "random_min": min(r, default=float("nan")),
                "random_max": max(r, default=float("nan")),
            }
            for n, f, r in zip(
                self.sizes, self.faithfulness_by_size, self.random_by_size, strict=True
            )
        ]
        return pd.DataFrame(rows)

    def errors_to_frame(self) -> DataFrame:
        """A DataFrame, one row per treatment of errors: faithfulness, completeness, minimality, ends.

        ``minimal`` is the share of units whose loss changes faithfulness by ``MINIMAL`` or more; NaN
        where that was not measured.
        """
        import pandas as pd

        treatments = self.by_errors or {self.metadata.get("errors", "kept"): self}
        rows = {
            errors: {
                "faithfulness": scores.faithfulness,
                "completeness": scores.completeness,
                "minimal": scores._minimal,
                "KL": scores.kl,
                "metric full": scores.metric_full,
                "metric empty": scores.metric_empty,
            }
            for errors, scores in treatments.items()
        }
        return pd.DataFrame(rows).T.rename_axis("errors")

    @property
    def _minimal(self) -> float:
        if not self.minimality:
            return float("nan")
        return sum(change >= MINIMAL for change in self.minimality) / len(self.minimality)

    def plot(self) -> Any:
        """A plotly figure: faithfulness by size, with the range of the random circuits."""
        frame = self.to_frame()
        low, high = frame["random_min"].tolist(), frame["random_max"].tolist()
        n_random = len(self.random_by_size[0])
        return figures.curves(
            list(self.sizes),
            {"circuit": frame["faithfulness"].tolist()},
            band=(f"{n_random} random circuits", low, high) if n_random else None,
            title=f"Faithfulness on {self.metadata.get('n_prompts')} held-out prompts",
            x_title=f"{self.circuit.graph.unit}s kept",
            y_title="faithfulness",
            hline=1.0,
        )

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values: what was measured, and of the circuit its kept units.

        Numbers that are not finite are None; the metric of single prompts is left out, see :meth:`save`.
        """
        circuit = self.circuit
        values = {
            name: plain_values(getattr(self, name)) for name in (*_NUMBERS, *_LISTS, "metadata")
        }
        rows = circuit.to_frame(circuit.n_units).query("kept")
        return {
            "circuit": {
                "unit": circuit.graph.unit,
                "size": circuit.size,
                "n_units": circuit.n_units,
                "kept": plain_values(rows.drop(columns="kept").to_dict("records")),
            },
            **values,
            "by_errors": {
                errors: {name: plain_values(getattr(scores, name)) for name in values}
                for errors, scores in self.by_errors.items()
            },
        }

    @gate()
    def save(self, path: str | Path) -> Path:
        """Writes scores and circuit into one file.

        Returns:
            The path.

        Raises:
            GemmaScopeError: The file cannot be written, or the metadata do not fit into JSON.
        """
        arrays = {"circuit": _circuit_bytes(self.circuit)}
        content: dict[str, Any] = {"format": FORMAT, "version": VERSION, "scores": _record(self)}
        if self.by_prompt is not None:
            arrays["by_prompt"] = self.by_prompt.cpu().numpy()
        content["by_errors"] = {errors: _record(each) for errors, each in self.by_errors.items()}
        for errors, scores in self.by_errors.items():
            if scores.by_prompt is not None:
                arrays[f"by_prompt {errors}"] = scores.by_prompt.cpu().numpy()
        return write_bundle(path, content, arrays, kind=KIND)

    @classmethod
    @gate()
    def load(cls, path: str | Path) -> Scores:
        """Reads what :meth:`save` has written.

        Raises:
            MissingFileError: There is no such file.
            BadFileError: It is damaged, contradicts itself, or is of another version.
        """
        content, arrays = read_bundle(path, kind=KIND, format=FORMAT, version=VERSION)
        try:
            circuit = _circuit_of(arrays)
            records = content.get("by_errors", dict)
            main, *others = (
                _scores(circuit, from_json_value(record), arrays.get(name))
                for name, record in [
                    ("by_prompt", content.get("scores", dict)),
                    *((f"by_prompt {errors}", record) for errors, record in records.items()),
                ]
            )
        except (TypeError, ValueError, KeyError, AttributeError) as fault:
            content.bad(str(fault))
        return replace(main, by_errors=dict(zip(records, others, strict=True)))

    def __repr__(self) -> str:
        best = max(self.random, default=float("nan"))
        compared = "".join(
            f", {scores.faithfulness:.3f} with errors {errors}"
            for errors, scores in self.by_errors.items()
            if errors != self.metadata.get("errors")
        )
        return (
            f"Scores({self.metadata.get('task')}, {self.circuit.size} of {self.circuit.n_units} "
            f"{self.circuit.graph.unit}s, faithfulness {_fixed(self.faithfulness)}{compared}, best of "
            f"{len(self.random)} random {_fixed(best)}, metric full {self.metric_full:.3f}, "
            f"empty {self.metric_empty:.3f})"
        )

    def _repr_html_(self) -> str:
        frame = self.errors_to_frame().reset_index() if self.by_errors else self.to_frame()
        return f"<p>{escape(repr(self))}</p>{figures.frame_html(frame)}"


def _fixed(value: float) -> str:
    """Three digits; rounded first, so that there is no minus before zero."""
    return f"{round(value, 3) + 0.0:.3f}"


def _circuit_bytes(circuit: Circuit) -> np.ndarray:
    """The file of a circuit."""
    with TemporaryDirectory() as folder:
        return np.frombuffer(circuit.save(Path(folder) / "circuit").read_bytes(), dtype=np.uint8)


def _circuit_of(arrays: Mapping[str, np.ndarray]) -> Circuit:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "circuit"
        path.write_bytes(arrays["circuit"].astype(np.uint8, casting="no").tobytes())
        return Circuit.load(path)


def _record(scores: Scores) -> dict[str, Any]:
    """What is neither the circuit nor of single prompts, for a file."""
    return as_json(
        {name: getattr(scores, name) for name in (*_NUMBERS, *_LISTS, "metadata")}, "the scores"
    )


def _scores(circuit: Circuit, values: dict[str, Any], by_prompt: np.ndarray | None) -> Scores:
    """Scores of a file's entries; a ValueError or a TypeError where they contradict each other."""
    sizes, curve, random = (values[name] for name in _LISTS[:3])
    minimality, metadata = values["minimality"], values["metadata"]
    if not all(type(size) is int and 0 <= size <= circuit.n_units for size in sizes):
        raise ValueError(f"sizes are not whole numbers from 0 to {circuit.n_units}")
    if circuit.size not in sizes:
        raise ValueError(f"sizes do not have that of the circuit, {circuit.size}")
    if not len(sizes) == len(curve) == len(random):
        raise ValueError(f"{len(sizes)} sizes, {len(curve)} values and {len(random)} random ones")
    if len({len(each) for each in random}) > 1:
        raise ValueError("the numbers of random circuits differ between sizes")
    if minimality is not None and len(minimality) != circuit.size:
        raise ValueError(f"minimality is of {len(minimality)} units, and {circuit.size} are kept")
    if by_prompt is not None and (by_prompt.ndim != 2 or len(by_prompt) != 3):
        raise ValueError(f"array 'by_prompt' is {by_prompt.shape}, not 3 rows")
    if not isinstance(metadata, dict):
        raise ValueError("the metadata are not an object")
    return Scores(
        circuit=circuit,
        sizes=sizes,
        faithfulness_by_size=_floats(curve),
        random_by_size=tuple(map(_floats, random)),
        by_prompt=None if by_prompt is None else torch.from_numpy(by_prompt.copy()),
        minimality=None if minimality is None else _floats(minimality),
        metadata=metadata,
        **dict(zip(_NUMBERS, _floats([values[name] for name in _NUMBERS]), strict=True)),
    )


def _floats(values: Any) -> tuple[float, ...]:
    """A ValueError unless all are numbers."""
    for value in values:
        if type(value) not in (int, float):
            raise ValueError(f"{value!r} is not a number")
    return tuple(map(float, values))
