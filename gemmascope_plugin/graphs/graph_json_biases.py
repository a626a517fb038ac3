"""Biases of an attribution graph in its JSON, where no viewer looks for nodes.

    {"nodes": [{"place": 15, "id": "bias:...", ...}],
     "links": [{"source": "bias:...", "target": ..., "weight": ...}]}

1. Viewers would take biases for targets, so they stand in ``metadata.gemmascope``: a record of each with
   its place among all nodes, and their links under their own ids.
2. Without them rows do not sum to what they explain. Where they are not in the file, or links were added
   or taken out since it was written, the largest gap of a row is not known: ``residual`` is NaN.

Cost: that of their links.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gemmascope_plugin.files.bundle import as_json, from_json_value
from gemmascope_plugin.graphs.parts import NODE_COLUMNS

if TYPE_CHECKING:
    import pandas as pd


def bias_records(nodes: pd.DataFrame) -> list[dict[str, Any]]:
    """Every bias of a table of nodes, with its place in it."""
    places = np.flatnonzero((nodes["kind"] == "bias").to_numpy()).tolist()
    columns = [*NODE_COLUMNS, *(["influence"] if "influence" in nodes else [])]
    rows = nodes.iloc[places][columns].to_dict("records")
    return [{"place": place, **as_json(row)} for place, row in zip(places, rows, strict=True)]


def with_biases(rows: Sequence[dict[str, Any]], own: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a table with those of biases where they were.

    Args:
        rows: Of all other nodes.
        own: ``metadata.gemmascope`` of the file.

    Raises:
        ValueError: A bias that cannot be one; also KeyError, TypeError.
    """
    whole = list(rows)
    for record in own.get("biases", {"nodes": []})["nodes"]:
        row = from_json_value(record)
        place = row.pop("place")
        if type(place) is not int or not 0 <= place <= len(whole):
            raise ValueError(f"a bias has the place {place!r:.60}")
        if row["kind"] != "bias" or not isinstance(row["id"], str):
            raise ValueError(f"{row['id']!r:.60} stands among the biases")
        for name in ("layer", "pos", "index"):
            if type(row[name]) is not int:
                raise ValueError(f"the {name} of {row['id']!r:.60} is not a whole number")
        for name in ("activation", "weight"):
            if type(row[name]) not in (int, float):
                raise ValueError(f"the {name} of {row['id']!r:.60} is not a number")
        whole.insert(place, {"influence": 1.0, **row, "node_id": row["id"], "explained": False})
    return whole


def is_whole(own: Mapping[str, Any], n_edges: int) -> bool:
    """Whether a graph that was read has all that it was written with.

    Args:
        own: ``metadata.gemmascope`` of the file.
        n_edges: Links that were read, those of biases among them.
    """
    if "biases" not in own:
        return not own.get("bias_sums")
    return own.get("n_edges") == n_edges


def without_residual(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata that no longer say how far rows are from their sums."""
    unknown = {"residual": math.nan} if "residual" in metadata else {}
    return {**metadata, **unknown}
