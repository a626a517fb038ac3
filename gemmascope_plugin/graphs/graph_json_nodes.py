"""Nodes of an attribution graph as circuit-tracer's viewer and Neuronpedia name them.

============================ ======================== ================================ ==================
node                         ``feature_type``         ``node_id``                      ``feature``
============================ ======================== ================================ ==================
feature of an MLP            cross layer transcoder   ``{layer}_{index}_{pos}``        Cantor pair
feature elsewhere            cross layer transcoder   ``{layer}_{site}_{index}_{pos}`` the same, shifted
error                        mlp reconstruction error ``{layer}_error_{site}_{pos}``   -1
token                        embedding                ``E_{token}_{pos}``              position
target                       logit                    ``{n_layers + 1}_{token}_{pos}`` token
============================ ======================== ================================ ==================

1. The Cantor pair is of layer and index; dictionaries beside the MLPs' shift their index by ``SHIFT``
   each, so that no two features share a number.
2. Targets that are no token are virtual ones, numbered from ``VIRTUAL``, which no vocabulary reaches.
   ``token_prob`` is a target's weight, from which the viewers compute the same scores as we.
3. What the format has no place for stands under ``gemmascope``.

Cost: about 400 bytes a node.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gemmascope_plugin.errors import GemmaScopeError
from gemmascope_plugin.files.bundle import as_json

FEATURE, ERROR = "cross layer transcoder", "mlp reconstruction error"
EMBEDDING, LOGIT = "embedding", "logit"
TYPES = {"feature": FEATURE, "error": ERROR, "token": EMBEDDING, "target": LOGIT}
SHIFT, VIRTUAL = 1 << 21, 1 << 20
SITES = {"mlp": "hook_mlp_out", "att": "attn.hook_z", "res": "hook_resid_post"}
"""Words of sites, the main set first; a place is the number of shifts."""
_WORDS = {hook: word for word, hook in SITES.items()}
_PLACE = re.compile(r"blocks\.\d+\.(.+)")

Row = Mapping[str, Any]


def cantor(layer: int, index: int) -> int:
    """One number for a pair of them."""
    return (layer + index) * (layer + index + 1) // 2 + index


def from_cantor(number: int) -> tuple[int, int]:
    """Layer and index of a number."""
    diagonal = (math.isqrt(8 * number + 1) - 1) // 2
    index = number - diagonal * (diagonal + 1) // 2
    return diagonal - index, index


def has_word(site: object) -> bool:
    """Whether nodes of a site have a name in this format."""
    match = _PLACE.fullmatch(site) if isinstance(site, str) else None
    return match is not None and match[1] in _WORDS


def site_word(site: str) -> str:
    """``mlp``, ``att`` or ``res`` for an output hook.

    Raises:
        GemmaScopeError: Another hook.
    """
    if not has_word(site):
        raise GemmaScopeError(
            f"Nodes at {site!r} have no name in this format", exists=", ".join(_WORDS)
        )
    return _WORDS[site.split(".", 2)[2]]


def node_records(
    rows: Iterable[Row], explained: Iterable[bool], tokens: Sequence[str], n_layers: int
) -> list[dict[str, Any]]:
    """Nodes of the file.

    Args:
        rows: Of the table of nodes, with ``share``, the cumulative share of influence; no biases.
        explained: Whether each has a row of its own in the matrix.
        tokens: The prompt.
        n_layers: Of the model.
    """
    found, virtual, first = [], VIRTUAL, True
    for row, known in zip(rows, explained, strict=True):
        kind, token, active = row["kind"], row["index"], row["activation"]
        if kind == "target" and token < 0:
            token, virtual = virtual, virtual + 1
        if kind == "token":
            shown = _token(row)
        elif kind == "feature":
            shown = _feature(row)
        elif kind == "error":
            shown = _error(row, tokens)
        else:
            shown = {**_target(row, token, n_layers), "is_target_logit": first}
            first = False
        shown |= {
            "ctx_idx": row["pos"],
            "feature_type": TYPES[kind],
            # null is shown whatever the threshold is, a missing key never
            "influence": None if kind == "target" else row["share"],
            # null is not known, as in files of others; JSON has no NaN
            "activation": active if kind == "feature" and not math.isnan(active) else None,
            "run_idx": 0,
            "reverse_ctx_idx": 0,
        }
        found.append({**shown, "gemmascope": _details(row, shown["clerp"], known)})
    return found


def _details(row: Row, shown: str, explained: bool) -> dict[str, Any]:
    found = {"id": row["id"], "site": row["site"]}
    if shown != row["label"]:
        found["label"] = row["label"]
    if row["kind"] == "target":
        found |= {"value": as_json(row["activation"]), "layer": row["layer"]}
        found |= {"token": row["index"]}
    if row["kind"] == "feature" and row["weight"]:
        found["weight"] = row["weight"]
    if row["kind"] in ("feature", "target") and not explained:
        found["explained"] = False
    return found


def _token(row: Row) -> dict[str, Any]:
    token, pos = row["index"], row["pos"]
    names = {"node_id": f"E_{token}_{pos}", "jsNodeId": f"E_{token}-{pos}"}
    return {**names, "layer": "E", "feature": pos, "clerp": f'Emb: "{_quotable(row["label"])}"'}


def _feature(row: Row) -> dict[str, Any]:
    layer, index, pos, word = row["layer"], row["index"], row["pos"], site_word(row["site"])
    number = cantor(layer, index + list(SITES).index(word) * SHIFT)
    if word == "mlp":
        names = {"node_id": f"{layer}_{index}_{pos}", "jsNodeId": f"{layer}_{index}-0"}
        label = row["label"]
    else:
        name = f"{layer}_{word}_{index}_{pos}"
        names = {"node_id": name, "jsNodeId": name}
        label = f"{word}:{index} {row['label']}"
    return {**names, "layer": str(layer), "feature": number, "clerp": label}


def _error(row: Row, tokens: Sequence[str]) -> dict[str, Any]:
    word, pos = site_word(row["site"]), row["pos"]
    name = f"{row['layer']}_error_{word}_{pos}"
    names = {"node_id": name, "jsNodeId": name, "layer": str(row["layer"])}
    return {**names, "feature": -1, "clerp": f'Err: {word} "{_quotable(str(tokens[pos]))}"'}


def _target(row: Row, token: int, n_layers: int) -> dict[str, Any]:
    layer, pos, weight = n_layers + 1, row["pos"], row["weight"]
    names = {"node_id": f"{layer}_{token}_{pos}", "jsNodeId": f"L_{token}-{pos}"}
    label = f'Output "{_quotable(row["label"])}" (p={weight:.3f})'
    place = {"layer": str(layer), "feature": token}
    return {**names, **place, "clerp": label, "token_prob": weight}


def _quotable(text: str) -> str:
    """Text that the viewers can find in a label: up to the next quote."""
    return text.replace('"', "\N{RIGHT DOUBLE QUOTATION MARK}").replace("(p=", "(p =")
