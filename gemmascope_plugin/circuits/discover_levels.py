"""From coarse to fine: the circuit of a task in each level of nested dictionaries.

A Matryoshka dictionary (arXiv 2503.17547) or a tree reconstructs from a prefix of its features. The
prefixes are dictionaries of their own, coarse ones with few general features, so the same question asked
level by level shows what a coarse feature is split into and what was left to errors.

Cost: one circuit per level.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gemmascope_plugin.causes import Task
from gemmascope_plugin.causes.check_task import check_task
from gemmascope_plugin.circuits.feature_discovery import discover_features
from gemmascope_plugin.errors import EmptySelectionError
from gemmascope_plugin.graphs.circuit import Circuit
from gemmascope_plugin.models.check_model import check_model
from gemmascope_plugin.models.gate import gate
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.splice.check_saes import check_saes


@gate(model=check_model, task=check_task, saes=check_saes)
def discover_levels(
    model: HookedModel, task: Task, *, saes: Any, levels: Sequence[int], **options: Any
) -> dict[int, Circuit]:
    """Level to circuit, in the order of ``levels``.

    Args:
        model: The model.
        task: The task.
        saes: Nested dictionaries with these levels.
        levels: 0 for the coarsest, -1 for the whole.
        **options: As :func:`discover_features` has them, ``level`` aside.

    Raises:
        EmptySelectionError: No level.
        UnknownNameError: A dictionary has no such level.
    """
    if not len(levels):
        raise EmptySelectionError("No level is named", fix="levels=(0, -1)")
    return {
        level: discover_features(model, task, saes=saes, level=level, **options) for level in levels
    }
