"""RelP: attribution patching with relevance coefficients (LRP-0) in the place of gradients.

1. One backward pass through the base run under the rules below gives ``R`` at every node.
2. Effect of a node: ``<z' - z, R>`` (Jafari et al., arXiv 2508.21258).

Values stay as they are, to the last bit; what differs is the gradient.

========== ====================================================== ================================
rule       function                                               its gradient becomes that of
========== ====================================================== ================================
norm       ``gain x / s``, every RMS norm                         ``gain x / [s]``
activation ``act(x)``                                             ``x [act(x) / x]``, 0 at x = 0
half       ``act(x) y``, the gated product                        half of it; the rest is constant
pattern    attention                                              ``[p] v``: off unless asked for
caps       ``c tanh(x / c)``, of attention scores and of logits   ``x [y / x]``: off unless asked for
========== ====================================================== ================================

``[.]`` is a constant.  Each rule gives out as much relevance ``<x, gradient>`` as it takes in.
**Relevance is conserved only with ``pattern`` and ``caps``**: the gradient through the softmax, which the
published method keeps, hands out more or less than it was given.

Cost: that of attribution patching.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from gemmascope_plugin.causes.components import Runner
from gemmascope_plugin.causes.experiment import Experiment
from gemmascope_plugin.causes.gradient.slopes import Estimate, FwdHooks, NodeMethod, at_base
from gemmascope_plugin.errors import ModelError, TaskError
from gemmascope_plugin.models.points import hook_points, n_layers, norm_of
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.models.record import hooking, keep, write

HookFn = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class RelpRules:
    """Which rules are used; norm, activation and half always are."""

    pattern: bool = False
    """Attention patterns are constants: queries and keys get no relevance."""
    caps: bool = False
    """Soft-caps pass relevance on as a whole."""

    @contextmanager
    def on(self, runner: Runner, model: HookedModel, *, before_cap: bool = False) -> Iterator[None]:
        """Gradients follow the rules inside the block.

        Args:
            runner: The model, or the model with dictionaries spliced in.
            model: The model itself.
            before_cap: Whether logits are read before the final soft-cap, which then has no rule.

        Raises:
            ModelError: MLPs without a gate.
        """
        with hooking(runner, fwd_hooks=self.hooks(model, before_cap=before_cap)):
            yield

    def hooks(self, model: HookedModel, *, before_cap: bool = False) -> FwdHooks:
        """The rules as forward hooks by name; arguments as for :meth:`on`."""
        names = list(hook_points(model))
        if "blocks.0.mlp.hook_pre_linear" not in names:
            raise ModelError(
                "The MLPs of this model have no gate", fix='a Gemma model, or method="atp"'
            )
        hooks = [rule for name in names if name.endswith(_SCALE) for rule in _norm(model, name)]
        for layer in range(n_layers(model)):
            hooks += _gated(f"blocks.{layer}.mlp.")
            scores, pattern = (f"blocks.{layer}.attn.hook_{n}" for n in ("attn_scores", "pattern"))
            if self.pattern:
                hooks.append((pattern, write(torch.Tensor.detach)))
            elif self.caps and (cap := _cap(model, "attn_scores_soft_cap")):
                hooks.append((scores, _whole_cap(cap, after=True)))
        if self.caps and not before_cap and (cap := _cap(model, "output_logits_soft_cap")):
            hooks.append(("unembed.hook_out", _whole_cap(cap, after=False)))
        return hooks


_SCALE = ".hook_scale"
_THROUGH_PATTERN = ("q", "k", "pattern")


@dataclass(frozen=True)
class RelP(NodeMethod):
    """Relevance times difference of every patch."""

    name = "relp"
    title = "RelP"
    paper = "Jafari et al., arXiv 2508.21258"
    cost = "one forward and one backward pass"

    rules: RelpRules = field(default_factory=RelpRules)

    def estimate(self, run: Experiment, max_rows: int) -> Estimate:
        """Refuses components that no relevance reaches."""
        component = run.grid.component
        if component.endswith("_scale"):
            raise TaskError(
                f"RelP takes what norms divide by as constants, no relevance reaches {component!r}",
                fix='method="atp"',
            )
        if self.rules.pattern and component in _THROUGH_PATTERN:
            raise TaskError(
                f"With attention patterns as constants no relevance reaches {component!r}",
                fix="rules=RelpRules(pattern=False)",
            )
        with self.rules.on(run.runner, run.model, before_cap=run.bound.metric.metric.before_cap):
            return at_base(run)

    def details(self, estimate: Estimate, gap: float) -> Mapping[str, Any]:
        """Which rules were used."""
        return {"pattern_rule": self.rules.pattern, "cap_rule": self.rules.caps}


def _norm(model: HookedModel, scale: str) -> FwdHooks:
    """The norm rule for the norm that has this hook."""
    prefix = scale.removesuffix(_SCALE)
    if f"{prefix}.hook_out" not in hook_points(model):
        return [(scale, write(torch.Tensor.detach))]
    # The bridge rounds differently where a hook changes a scale, so its norms are left to run as they
    # are, and their output gets the other gradient.
    module = model.get_submodule(prefix)  # pyright: ignore[reportAttributeAccessIssue]
    norm = norm_of(model, module)
    inputs: dict[str, torch.Tensor] = {}

    def replace(y: torch.Tensor) -> torch.Tensor:
        x = inputs["x"]
        return _instead(y, norm.frozen(x.detach(), x - x.detach()).to(y.dtype))

    read = keep(inputs, "x", None)
    return [(f"{prefix}.hook_in", read), (f"{prefix}.hook_out", write(replace))]


def _gated(mlp: str) -> FwdHooks:
    """Activation and half rule: half of the product for the gate, half for what it multiplies."""
    values: dict[str, torch.Tensor] = {}

    def replace(product: torch.Tensor) -> torch.Tensor:
        value = product.detach()
        gate, linear = (_ratio(value, x.detach()) * (x - x.detach()) for x in values.values())
        values.clear()
        return _instead(product, (gate + linear) / 2)

    names = ("hook_pre", "hook_pre_linear")
    reads = [(f"{mlp}{name}", keep(values, name, None)) for name in names]
    return [*reads, (f"{mlp}hook_post", write(replace))]


def _instead(y: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """The value of ``y`` with the gradient of ``slope``, whose value is zero."""
    # y stays in the graph with a zero: backward hooks fire only where a gradient passes through
    nowhere = torch.zeros((), dtype=torch.bool, device=y.device)
    return torch.where(nowhere, y, y.detach() + slope)


def _ratio(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``y / x``, 0 where ``x`` is 0."""
    zero = x == 0
    return torch.where(zero, 0, y / torch.where(zero, 1, x))


def _whole_cap(cap: float, *, after: bool) -> HookFn:
    """Corrects the gradient of ``c tanh(x / c)`` to ``y / x``, before or after the cap."""

    def corrected(x: torch.Tensor) -> torch.Tensor:
        if not x.requires_grad:
            return x
        capped = x.detach() / cap if after else (x.detach() / cap).tanh()
        raw = capped.atanh() if after else x.detach() / cap
        factor = _ratio(capped, raw) / (1 - capped.square())
        factor = torch.where((raw == 0) | ~factor.isfinite(), 1, factor)
        same = x.view_as(x)
        same.register_hook(lambda grad: grad * factor)
        return same

    return write(corrected)


def _cap(model: HookedModel, name: str) -> float | None:
    """A soft-cap of the model; None where it has none."""
    cap = getattr(model.cfg, name, None)
    return float(cap) if cap is not None and cap > 0 else None
