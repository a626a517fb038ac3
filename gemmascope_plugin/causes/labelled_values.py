"""Numbers with named axes: what effects are made of, and how parts of them are taken.

A number belongs to one coordinate on each axis. Not every entry of the tensor is an intervention: no edge
leads back to what has been written before.

Cost: none worth mentioning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float

from gemmascope_plugin.errors import TaskError, UnknownNameError, check_choice, nearest, shorten
from gemmascope_plugin.graphs.edge_map import EdgeMap, mask_between

V = TypeVar("V", bound="LabelledValues")


@dataclass(frozen=True, eq=False)
class LabelledValues:
    """Numbers, the coordinates that they belong to, and what they are."""

    values: Float[torch.Tensor, ...]
    """``metric(patched) - metric(base)``; the base run is corrupted when denoising, clean when noising.
    Positive = patching raises the metric. Of the logit lens: probabilities."""
    axes: tuple[str, ...]
    """Name of each axis of ``values``: ``layer``, ``pos``, ``head``, ``neuron``, ``feature``..."""
    labels: Mapping[str, tuple[Any, ...]]
    """Coordinate of each entry along each axis."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Component, direction, method, metric values at both ends, number of prompts, token policy."""
    values_by_prompt: Float[torch.Tensor, "... prompt"] | None = None
    """The same for each prompt, ``[..., prompt]``; None where a method gives means only."""
    columns: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Further numbers of each entry, in the shape of ``values``: ids and ranks of the logit lens."""

    def __post_init__(self) -> None:
        sizes = tuple(len(self.labels[axis]) for axis in self.axes)
        assert sizes == tuple(self.values.shape), f"{sizes} labels for {tuple(self.values.shape)}"
        each = self.values_by_prompt
        assert each is None or sizes == tuple(each.shape[:-1]), f"{sizes} for {tuple(each.shape)}"
        for name, column in self.columns.items():
            assert sizes == tuple(column.shape), f"{sizes} for {name}, {tuple(column.shape)}"

    @property
    def gap(self) -> float:
        """``metric(clean) - metric(corrupt)``.

        Raises:
            TaskError: There is no metric, but probabilities.
        """
        if "metric_clean" not in self.metadata:
            raise TaskError(f"{self!r} is not of a metric", fix="effects of a task")
        return self.metadata["metric_clean"] - self.metadata["metric_corrupt"]

    @property
    def share(self) -> torch.Tensor:
        """``values / gap``: 1 = the patch alone carries the whole effect (denoising)."""
        return self.values / self.gap

    @property
    def of_edges(self) -> bool:
        """Whether the interventions are edges."""
        return {"writer", "reader"} <= set(self.axes)

    @cached_property
    def edges(self) -> EdgeMap:
        """The edges of the model, whose order the axes ``writer`` and ``reader`` have.

        Raises:
            TaskError: Effects of something else, or of some edges.
        """
        if not self.of_edges:
            raise TaskError(f"{self!r} is not of edges", fix="edge_patching, or edge_attribution")
        writers, readers = self.labels["writer"], self.labels["reader"]
        layers = [node.layer for node in writers if node.kind == "mlp"]
        heads = sum(node.kind == "head" and node.layer == 0 for node in writers)
        groups = sum(reader.port == "k" and reader.node.layer == 0 for reader in readers)
        edges = EdgeMap(len(layers), heads, groups)
        if edges.writers != writers or edges.readers != readers:
            raise TaskError(f"{self!r} has some edges of a model only", fix="the whole result")
        return edges

    @cached_property
    def is_cell(self) -> Bool[torch.Tensor, ...]:
        """True at entries that are interventions of their own: where an edge exists; not at a token of
        the logit lens that is in the list of the most likely ones already.
        """
        is_cell = torch.ones(self.values.shape, dtype=torch.bool)
        if self.of_edges:
            mask = mask_between(self.labels["writer"], self.labels["reader"])
            i, j = self.axes.index("writer"), self.axes.index("reader")
            shape = [1] * is_cell.ndim
            shape[i], shape[j] = mask.shape
            is_cell &= (mask if i < j else mask.T).reshape(shape)
        if "token" in self.axes and "rank" in self.columns:
            is_listed = self.columns["rank"].cpu() <= self.metadata["top_k"]
            is_cell &= ~(is_listed & self.columns["asked"].cpu().bool())
        return is_cell

    @property
    def total(self) -> torch.Tensor:
        """Summed over positions, where they are told apart."""
        return self.values.sum(self.axes.index("pos")) if "pos" in self.axes else self.values

    @property
    def flat(self) -> Float[torch.Tensor, " intervention"]:
        """All effects in a row; of edges those that exist, summed over positions, in the order of
        ``edges.mask.nonzero()``.
        """
        if not self.of_edges:
            return self.values[self.is_cell.to(self.values.device)]
        is_cell = self.is_cell.any(self.axes.index("pos")) if "pos" in self.axes else self.is_cell
        return self.total[is_cell.to(self.values.device)]

    def writer_effects(self) -> Float[torch.Tensor, " writer"]:
        """Of edges: each writer's effects, summed over its readers.

        The writer's own first-order effect only with ``writer_delta="jacobian"``.
        """
        axes = [axis for axis in self.axes if axis != "pos"]
        return self.total.sum(axes.index("reader"))

    def at(self: V, **coordinates: Any) -> V:
        """The effects at some coordinates: ``at(layer=3)``, ``at(layer=[3, 4], head=0)``.

        Writers, readers and tokens also go by their text.

        Args:
            **coordinates: One coordinate, which drops the axis, or several, which keep it.

        Raises:
            UnknownNameError: An axis or a coordinate that there is not.
        """
        effects = self
        for axis, chosen in coordinates.items():
            check_choice("axis", axis, self.axes)
            # a feature is one coordinate, though a tuple
            is_list = chosen not in self.labels[axis] and isinstance(chosen, list | tuple | range)
            index = [self._index(axis, label) for label in (chosen if is_list else [chosen])]
            effects = effects._taken(axis, index if is_list else index[0])
        return effects

    def _index(self, axis: str, label: object) -> int:
        """Where a coordinate is along an axis."""
        labels = self.labels[axis]
        if label in labels:
            return labels.index(label)
        if (
            isinstance(label, int)
            and axis == "pos"
            and "token" in self.axes
            and label in range(-len(labels), 0)
        ):
            return len(labels) + label
        texts = [str(getattr(entry, "label", entry)) for entry in labels]
        if isinstance(label, str):
            for place, text in enumerate(texts):
                if label in (text, text.strip()):
                    return place
        if axis == "token":
            ids = (
                self.columns["id"].movedim(self.axes.index("token"), -1).reshape(-1, len(labels))[0]
            )
            titles = self.metadata["asked"]
            for place, i in enumerate(ids.tolist()):
                if i == label and labels[place] in titles:
                    return place
            raise UnknownNameError(
                f"The token {label!r} was not asked for",
                exists=shorten(titles) or "none",
                fix=f"logit_lens(..., tokens=[{label!r}])",
            )
        raise UnknownNameError(
            f"There is no {axis} {label!r} among these effects",
            exists=shorten(texts),
            nearest=nearest(str(label), texts),
        )

    def _taken(self: V, axis: str, index: int | list[int]) -> V:
        """One index drops the axis, a list keeps it."""
        place = (slice(None),) * self.axes.index(axis) + (index,)
        each = None if self.values_by_prompt is None else self.values_by_prompt[place]
        labels, metadata = dict(self.labels), dict(self.metadata)
        axes = self.axes
        if isinstance(index, int):
            axes = tuple(a for a in axes if a != axis)
            metadata["at"] = {**metadata.get("at", {}), axis: labels.pop(axis)[index]}
        else:
            labels[axis] = tuple(labels[axis][i] for i in index)
        columns = {name: column[place] for name, column in self.columns.items()}
        return replace(
            self,
            values=self.values[place],
            axes=axes,
            labels=labels,
            metadata=metadata,
            values_by_prompt=each,
            columns=columns,
        )
