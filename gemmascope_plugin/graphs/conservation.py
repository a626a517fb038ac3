"""Whether integrated gradients sum to what they should, as a share of the whole change of the metric.

1. ``residual_max`` (of nodes, the worst hook) or ``conservation`` (of edges) is in the metadata.
2. A share above ``TOLERANCE`` is said wherever the result is printed: more steps make it smaller.
3. A share that is not finite is refused: no number of the result can be trusted then.

Cost: none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gemmascope_plugin.errors import TaskError

TOLERANCE = 0.05
"""Share of the whole change up to which nothing is said."""


def checked_share(share: float) -> float:
    """The share of the whole change that is missing, which is finite."""
    if not math.isfinite(share):
        raise TaskError(
            f"Integrated gradients miss {share} of the change of the metric, which is not finite",
            fix="a metric that is finite on all prompts, and tells clean from corrupted ones",
        )
    return share


def conservation_text(metadata: Mapping[str, Any]) -> str:
    """``, conservation off by 12 %: more steps``; empty up to ``TOLERANCE``, or without a line."""
    share = abs(metadata.get("residual_max", metadata.get("conservation", 0.0)))
    return f", conservation off by {100 * share:.0f} %: more steps" if share > TOLERANCE else ""
