"""Specs by name, the published recipes and one for small models, and whole specs from parts of one.

1. ``gemma-scope`` (arXiv 2408.05147, section 3): one squared norm for all inputs, the L0 penalty with a
   warm-up of 10,000 steps, bandwidth and first thresholds 0.001, unit decoder rows without a gradient
   along them, Adam (0, 0.999) at 7e-5 after a cosine warm-up, batches of 4,096 out of buckets of a
   million, no loss on dead features. The penalty's coefficients are not published: set
   ``sparsity_coefficient`` for the L0 that you want. Gradients are clipped, which the papers do not
   mention and ``max_grad_norm`` sets.
2. ``gemma-scope-2`` (its technical paper): the same with the quadratic penalty around ``target_l0``, a
   penalty on frequent features, transcoders that read the norm's output with its gain, and Gemma Scope
   2's files. With ``levels``, whose sizes are not published, a Matryoshka.
3. ``quick``: minutes on a CPU, for small models; close to what trained the bundled suite.

Values that the chosen architecture does not read are left out, the scale of activations is the one its
settings are meant for, and what the user says goes before the preset.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from gemmascope_plugin.errors import GemmaScopeError, InputError, check_choice
from gemmascope_plugin.models.protocol import describe, with_call
from gemmascope_plugin.training.architectures import ARCHITECTURES, SELECTIVE, architecture
from gemmascope_plugin.training.train_spec import TrainSpec, check_keys


def check_spec(spec: object, call: str = "") -> None:
    """Refuses what is neither a spec nor fields of one."""
    if not isinstance(spec, TrainSpec | Mapping):
        fix = '{"architecture": "jumprelu", "site": "res", "layer": 9, "d_sae": 4096}'
        raise InputError(
            f"{describe(spec)} is not a training spec",
            exists="TrainSpec, or a dict of some of its fields",
            fix=with_call(fix, call),
        )


def whole_spec(spec: TrainSpec | Mapping[str, Any], preset: str | None) -> TrainSpec:
    """A spec that can be trained, from a whole one or some of its fields and a preset (``quick``)."""
    check_spec(spec)
    if not isinstance(spec, TrainSpec):
        spec = preset_spec(preset or "quick", spec)
    elif preset is not None:
        raise GemmaScopeError(
            f"preset={preset!r} beside a whole TrainSpec",
            fix="a dict of the fields that differ from the preset, or no preset",
        )
    spec.sites(architecture(spec).kind)
    return spec


def preset_spec(name: str, values: Mapping[str, Any]) -> TrainSpec:
    """A preset with some fields chosen.

    Args:
        name: One of ``PRESETS``.
        values: Fields that go before those of the preset, at least the site.

    Raises:
        UnknownNameError: No such preset, architecture or field.
        GemmaScopeError: A value of another type or out of range.
    """
    check_choice("preset", name, PRESETS)
    check_keys(values)
    recipe: dict[str, Any] = PRESETS[name](dict(values))
    architecture = values.get("architecture", recipe.get("architecture", "jumprelu"))
    check_choice("architecture", architecture, ARCHITECTURES)
    entry = ARCHITECTURES[architecture]
    unread = set(SELECTIVE) - entry.uses
    usable = {key: value for key, value in recipe.items() if key not in unread}
    options = {**recipe.get("options", {}), **values.get("options", {})}
    chosen = {"options": options} if options else {}
    return TrainSpec.from_dict({"scale": entry.scale, **usable, **values, **chosen})


def _quick(values: dict[str, Any]) -> dict[str, Any]:
    steps, lr = values.get("steps", 2000), values.get("lr", 2e-3)
    whole = isinstance(steps, int)
    selects = any(word in values.get("architecture", "") for word in ("topk", "soft"))
    return {
        "d_sae": 512,
        "steps": steps,
        "lr": lr,
        "lr_end": lr / 50 if isinstance(lr, float) else None,
        "lr_warm_up": steps // 50 if whole else 0,
        "sparsity_warm_up": steps // 4 if whole else 0,
        "context": 64,
        "rows": 128,
        # Features that lose the competition in a short run have no time to come back by themselves.
        "dead_after": max(1, steps // 20) if whole else 100,
        "dead_coefficient": 1.0 if selects else None,
    }


def _gemma_scope(_: dict[str, Any]) -> dict[str, Any]:
    return {
        "architecture": "gemma_scope_jumprelu",
        "d_sae": 1 << 14,
        "scale": "unit",
        "sparsity": "step",
        "target_l0": 71.0,
        "sparsity_coefficient": 1e-3,
        "sparsity_warm_up": 10_000,
        "bandwidth": 0.001,
        "init_threshold": 0.001,
        "subtract_b_dec": True,
        "lr": 7e-5,
        "lr_warm_up": 1000,
        "beta1": 0.0,
        "batch_size": 4096,
        "steps": 977_000,
        "bucket": 1_000_000,
        "dead_features": "none",
        "dead_after": 2500,
    }


def _gemma_scope_2(values: dict[str, Any]) -> dict[str, Any]:
    usual = "matryoshka_prefix_jumprelu" if values.get("levels") else "gemma_scope_jumprelu"
    coefficient = values.get("sparsity_coefficient", 1e-3)
    penalised = values.get("architecture", usual) == usual
    return _gemma_scope(values) | {
        "architecture": usual,
        "options": {"frequency_coefficient": coefficient} if penalised else {},
        "sparsity": "quadratic",
        "target_l0": 60.0,
        "sparsity_warm_up": 50_000,
        "gain": "with",
        "layout": "gemma-scope-2",
    }


PRESETS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "quick": _quick,
    "gemma-scope": _gemma_scope,
    "gemma-scope-2": _gemma_scope_2,
}
"""Name to what it sets, given what the user has set."""
