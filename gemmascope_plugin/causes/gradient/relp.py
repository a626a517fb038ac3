"""RelP: attribution patching with relevance coefficients in the place of gradients.

1. One backward pass through the base run under the rules of ``relp_rules.py`` gives ``R`` at every node.
2. Effect of a node: ``<z' - z, R>`` (Jafari et al., arXiv 2508.21258).

Cost: that of attribution patching.
"""

from __future__ import annotations

from gemmascope_plugin.causes.experiment import Experiment
from gemmascope_plugin.causes.gradient.relp_rules import RelpRules
from gemmascope_plugin.causes.gradient.slopes import Estimate, at_base
from gemmascope_plugin.errors import TaskError
from gemmascope_plugin.models.protocol import HookedModel

_THROUGH_PATTERN = ("q", "k", "pattern")
_NORMS = "_scale"


def relp(run: Experiment, model: HookedModel, rules: RelpRules) -> Estimate:
    """Relevance times difference of every patch.

    Args:
        run: The experiment.
        model: Its model.
        rules: Which rules are used.

    Raises:
        TaskError: What the rules make a constant is asked for: scales of norms, or queries, keys
            and patterns under the pattern rule.
        ModelError: MLPs without a gate.
    """
    component = run.grid.component
    if component.endswith(_NORMS):
        raise TaskError(
            f"RelP takes what norms divide by as constants, no relevance reaches {component!r}",
            fix='method="atp"',
        )
    if rules.pattern and component in _THROUGH_PATTERN:
        raise TaskError(
            f"With attention patterns as constants no relevance reaches {component!r}",
            fix="rules=RelpRules(pattern=False)",
        )
    with rules.on(run.runner, model, before_cap=run.bound.metric.metric.before_cap):
        return at_base(run)
