"""What is trained and how: one frozen record, written to the run folder and read back from it.

1. The site: a kind of dictionary and a layer of Gemma Scope's (``site``, ``layer``), or any hooks of
   the model (``hook_in``, ``hook_out``).
2. The dictionary: an architecture by name (``architectures.py``), its size, its target sparsity.
3. The data: how much text is read at once, which tokens are left out, how activations are scaled.
4. The optimiser: steps, batch, learning rate with warm-up and cosine decay, clipping, dead features.

Where it runs and what is written how often are arguments of ``train()``: they change no number.
A key that does not exist and a value of another type or out of range are errors that name the key.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import gemmascope_plugin.catalog.site_names as sites
from gemmascope_plugin.catalog.site_names import Gain
from gemmascope_plugin.errors import GemmaScopeError, InputError, UnknownNameError, nearest, shorten
from gemmascope_plugin.models.protocol import describe
from gemmascope_plugin.types import Kind, Site

Sparsity = Literal["quadratic", "step", "tanh"]
Scale = Literal["sqrt_d", "unit", "layer_norm", "none"]
DeadFeatures = Literal["auxiliary", "ghost", "none"]
Layout = Literal["npz", "gemma-scope-2"]


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """One dictionary to be trained.

    Raises:
        GemmaScopeError: A number is out of range, or two fields contradict each other.

    Example:
        >>> spec = gs.TrainSpec(d_sae=256, layer=1, target_l0=8, steps=20)
        >>> spec.architecture, spec.exclude
        ('jumprelu', ('bos', 'eos', 'pad'))
    """

    d_sae: int
    """Number of features."""
    layer: int | None = None
    """Zero-based layer; None with ``hook_in`` or ``layers``."""
    site: Site = "res"
    """``res``, ``att``, ``mlp`` or ``embedding``; transcoders and CLTs live at ``mlp``
    whatever this says, crosscoders at ``res``."""
    layers: tuple[int, ...] = ()
    """Layers of a crosscoder or cross-layer transcoder, increasing; ``d_sae`` is the total over them."""
    hook_in: str | None = None
    """Hook that is read, where ``site`` and ``layer`` do not say it."""
    hook_out: str | None = None
    """Hook that is reconstructed; ``hook_in`` when None."""
    gain: Gain = "without"
    """Whether a transcoder reads the norm's output with its gain, as those of Gemma Scope 2 do."""
    model: str | None = None
    """How the model is called in metadata and export; what its config says when None."""
    architecture: str = "jumprelu"
    target_l0: int | float = 10.0
    """Active features per token to aim at: ``k`` of top-k architectures."""
    levels: tuple[int, ...] = ()
    """Matryoshka prefix sizes, the last one ``d_sae``."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the architecture's own config."""

    sparsity: Sparsity = "quadratic"
    """Penalty of JumpReLU: ``quadratic`` around ``target_l0`` (Gemma Scope 2), ``step`` (its L0, Gemma
    Scope 1) or ``tanh`` (Anthropic)."""
    sparsity_coefficient: int | float = 0.3
    sparsity_warm_up: int = 0
    """Steps over which the coefficient grows from 0."""
    bandwidth: float = 0.1
    """Of JumpReLU's straight-through estimator, in units of the scaled input."""
    init_threshold: float = 0.1
    subtract_b_dec: bool = False
    """Whether ``b_dec`` is subtracted from the input; folded into ``b_enc`` at the end."""

    context: int = 1024
    """Tokens per piece of text."""
    rows: int = 32
    """Pieces of text per forward pass of the model."""
    bucket: int = 1 << 16
    """Activations that are collected and shuffled together."""
    exclude: tuple[str | int, ...] = ("bos", "eos", "pad")
    """Special tokens, by name or id, whose activations are left out."""
    scale: Scale = "sqrt_d"
    """``sqrt_d`` and ``unit``: one factor for all tokens, so that the mean squared norm is the width, or
    1; folded into the weights at the end. ``layer_norm``: every token by itself, which stays in the
    dictionary. ``none``: as they are."""

    steps: int = 2000
    batch_size: int = 1024
    """Tokens per step."""
    lr: float = 2e-3
    lr_end: float | None = None
    """Learning rate at the last step, reached along half a cosine; None for no decay."""
    lr_warm_up: int = 0
    """Steps of warm-up, half a cosine from a tenth of ``lr``."""
    beta1: int | float = 0.9
    beta2: int | float = 0.999
    max_grad_norm: int | float = 1.0
    dead_features: DeadFeatures = "auxiliary"
    """What pulls features back that do not fire: the architecture's own loss, ghost gradients (kept for
    comparison, see ``learner.py``) or nothing."""
    dead_coefficient: int | float | None = None
    """Of that loss; None for the usual one of the architecture."""
    dead_after: int = 300
    """Steps without firing after which a feature counts as dead."""
    seed: int = 0
    layout: Layout = "npz"
    """Gemma Scope layout of the export; ``gemma-scope-2`` wherever ``npz`` has no form for it."""

    def __post_init__(self) -> None:
        named = [self.hook_in is not None, self.layer is not None, bool(self.layers)]
        if sum(named) != 1:
            raise GemmaScopeError(
                "The spec names two sites" if any(named) else "The spec names no site",
                fix="site= and layer=, or hook_in= (and hook_out=) alone, or layers= alone",
            )
        if self.hook_out is not None and self.hook_in is None:
            raise GemmaScopeError("hook_out without hook_in", fix="both, or site= and layer=")
        for name in ("d_sae", "steps", "rows", "dead_after"):
            _at_least(self, name, 1)
        _at_least(self, "batch_size", 2)
        _at_least(self, "context", 2)
        _at_least(self, "bucket", self.batch_size, " (the batch)")
        _at_least(self, "layer", 0)
        for name in ("lr_warm_up", "sparsity_warm_up", "sparsity_coefficient", "lr_end"):
            _at_least(self, name, 0)
        for name in ("lr", "max_grad_norm", "bandwidth", "target_l0"):
            if getattr(self, name) <= 0:
                raise _out_of_range(name, getattr(self, name), "numbers above 0")
        if self.target_l0 > self.d_sae:
            raise _out_of_range("target_l0", self.target_l0, f"{self.d_sae} features (d_sae)")
        if self.lr_warm_up >= self.steps:
            raise _out_of_range("lr_warm_up", self.lr_warm_up, f"{self.steps} steps")
        layers = self.layers
        if layers and (sorted(set(layers)) != list(layers) or layers[0] < 0):
            raise _out_of_range("layers", layers, "increasing layers from 0")
        if layers and self.d_sae % len(layers):
            raise _out_of_range("d_sae", self.d_sae, f"multiples of the {len(layers)} layers")
        levels = self.levels
        if levels and (
            sorted(set(levels)) != list(levels) or levels[0] < 1 or levels[-1] != self.d_sae
        ):
            raise _out_of_range(
                "levels", levels, f"growing sizes of which the last is {self.d_sae}"
            )

    def sites(self, kind: Kind) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of all tensors read, and of all reconstructed.

        Args:
            kind: What the dictionary maps.

        Raises:
            GemmaScopeError: There is no such site, or none for this kind.
        """
        if kind not in ("crosscoder", "clt"):
            read, written = self.hooks(kind)
            return (read,), (written,)
        if not self.layers:
            raise GemmaScopeError(f"A {kind} needs layers", fix="layers=(0, 1, 2), without layer=")
        if kind == "crosscoder" and self.site != "res":
            raise GemmaScopeError(
                f"A crosscoder reads the residual stream, not site={self.site!r}", fix="site='res'"
            )
        pair = ("sae", "res") if kind == "crosscoder" else ("transcoder", "mlp")
        reads, writes = zip(*(sites.hooks(*pair, layer) for layer in self.layers), strict=True)
        if kind == "clt" and self.gain == "with":
            reads = tuple(sites.GAINED_HOOK.format(layer=layer) for layer in self.layers)
        return reads, writes

    def hooks(self, kind: Kind) -> tuple[str, str]:
        """Names of the tensors read and reconstructed.

        Args:
            kind: ``sae`` or ``transcoder``.

        Raises:
            GemmaScopeError: There is no such site, or an SAE that reconstructs another tensor.
        """
        if self.layers:
            raise GemmaScopeError(
                f"layers={self.layers} mean nothing to the architecture {self.architecture!r}",
                exists="layers of jumprelu_crosscoder, jumprelu_clt",
                fix="layer= for one layer",
            )
        if self.hook_in is not None:
            read, written = self.hook_in, self.hook_out or self.hook_in
        else:
            assert self.layer is not None
            site: Site = "mlp" if kind == "transcoder" else self.site
            read, written = sites.hooks(kind, site, self.layer)
            if kind == "transcoder" and self.gain == "with":
                read = sites.GAINED_HOOK.format(layer=self.layer)
        if (kind == "sae") != (read == written):
            raise GemmaScopeError(
                f"A {self.architecture!r} cannot read {read!r} and reconstruct {written!r}",
                exists="SAEs, which reconstruct what they read, and transcoders, which do not",
                fix="architecture='jumprelu_transcoder'" if kind == "sae" else "hook_out=",
            )
        return read, written

    @property
    def name(self) -> str:
        """A name for folders and logs: ``res_1``, ``jumprelu_transcoder_1``, or that of the hook."""
        if self.layers:
            return "_".join([self.architecture, *map(str, self.layers)])
        if self.layer is None:
            return (self.hook_in or "").replace(".", "_")
        prefix = self.architecture if "transcoder" in self.architecture else self.site
        return f"{prefix}_{self.layer}"

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values, as JSON keeps them."""
        values = asdict(self)
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainSpec:
        """The inverse of ``to_dict``; fields that are not given have their defaults.

        Raises:
            UnknownNameError: A key that does not exist; with the nearest that does.
            GemmaScopeError: A value of another type or out of range, or no ``d_sae``.
        """
        check_keys(values)
        required = {f.name for f in fields(cls) if f.default is f.default_factory is MISSING}
        if missing := sorted(required - set(values)):
            raise GemmaScopeError(
                f"The training spec lacks {shorten(missing)}", fix=f"{missing[0]}=512"
            )
        return cls(**_check_types(values))


def check_keys(values: Mapping[str, Any]) -> None:
    """Refuses keys that a spec does not have."""
    if not isinstance(values, Mapping):
        raise InputError(
            f"{describe(values)} is not a training spec",
            fix='TrainSpec(d_sae=512, layer=12), or {"d_sae": 512, "layer": 12}',
        )
    keys = [f.name for f in fields(TrainSpec)]
    for key in values:
        if key not in keys:
            raise UnknownNameError(
                f"A training spec has no key {key!r}",
                exists=", ".join(keys),
                nearest=nearest(str(key), keys),
                fix="options={...} for further fields of the architecture's own config",
            )


def _at_least(spec: TrainSpec, name: str, least: int, why: str = "") -> None:
    value = getattr(spec, name)
    if value is not None and value < least:
        raise _out_of_range(name, value, f"numbers from {least}{why}")


def _out_of_range(name: str, value: object, exists: str) -> GemmaScopeError:
    return GemmaScopeError(f"{name}={value!r} is out of range", exists=exists)


def _check_types(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the declared types: lists, as JSON has them, as tuples, integers as floats."""
    hints = get_type_hints(TrainSpec)
    result = {}
    for name, value in values.items():
        value = tuple(value) if isinstance(value, list) else value
        if hints[name] in (float, float | None) and type(value) is int:
            value = float(value)
        if not _fits(value, hints[name]):
            raise _wrong_type(name, value, hints[name])
        result[name] = value
    return result


def _fits(value: object, hint: Any) -> bool:
    """Whether a value has the type of an annotation; a boolean is not a number."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in inner
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in inner)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, inner[0]) for item in value)
    plain = origin or hint
    if plain is int or plain is float:
        return type(value) is plain
    return isinstance(value, plain)


def _wrong_type(name: str, value: object, hint: Any) -> GemmaScopeError:
    if get_origin(hint) is Literal:
        options = [str(option) for option in get_args(hint)]
        return UnknownNameError(
            f"Unknown {name} {value!r}",
            exists=shorten(options),
            nearest=nearest(str(value), options),
        )
    type_name = str(hint).removeprefix("<class '").removesuffix("'>")
    return GemmaScopeError(f"{name}={value!r} is of type {type(value).__name__}, not {type_name}")
