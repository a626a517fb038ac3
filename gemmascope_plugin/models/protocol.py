"""What this package asks of a TransformerLens model: its parts, and numbers that are finite.

1. ``HookedModel`` is a structural type. ``HookedTransformer`` and ``TransformerBridge`` both fit, in
   TransformerLens 3.9; neither class is imported here, so the code does not break when one goes away.
2. ``check_model`` comes first in every public function, and says what to type where something else
   does.
3. What a result rests on is finite, or the call says where it first was not. A NaN passes every
   comparison by failing it (``abs(nan) > tolerance`` is False), so nothing downstream notices one. It
   is looked for where numbers enter (weights of a dictionary), where a pass is read (activations,
   losses, metrics) and where a result is handed out. The error names the first entry that is not
   finite, and the model's weight that is the cause, if one is: the weights are looked at only then.
4. Sums are taken in at least float32, whatever the type of the model (:func:`wide`). A model in half
   precision keeps its stream, its weights and what is inserted into it in its own type. What is added
   up outside of it (products of writes and gradients, norms, projections, means) is widened first:
   bfloat16 has 8 binary digits, and a sum over hundreds of terms in it has none left. ``Anatomy``
   widens weights, a layer at a time. In a float32 model nothing is copied.

Cost: one pass over the tensor that is checked; weights of a dictionary once, until somebody changes
them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float, Shaped
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakIdKeyDictionary

from gemmascope_plugin.errors import InputError, ModelError
from gemmascope_plugin.types import HookFn, Hooks


@runtime_checkable
class Runner(Protocol):
    """A model, or what runs one as its ``model``, such as a model with dictionaries in it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward pass."""

    def hooks(self, fwd_hooks: Hooks = ..., bwd_hooks: Hooks = ...) -> Any:
        """Context manager that attaches hooks and removes them."""


@runtime_checkable
class HookedModel(Protocol):
    """A language model with named hook points."""

    cfg: Any
    tokenizer: Any
    embed: Any
    blocks: Any
    hook_dict: dict[str, Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward pass; token ids in, logits ``[batch, pos, d_vocab]`` out."""

    def hooks(self, fwd_hooks: Hooks = ..., bwd_hooks: Hooks = ...) -> Any:
        """Context manager that attaches hooks and removes them."""

    def run_with_cache(self, *args: Any, **kwargs: Any) -> Any:
        """Forward pass that also returns activations by hook name."""

    def run_with_hooks(self, *args: Any, **kwargs: Any) -> Any:
        """Forward pass with temporary hooks."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Sample a continuation."""

    def parameters(self) -> Any:
        """All parameters."""

    def register_forward_hook(self, hook: HookFn, *, always_call: bool = ...) -> Any:
        """Calls ``hook`` after every forward pass."""

    def register_forward_pre_hook(self, hook: HookFn, *, with_kwargs: bool = ...) -> Any:
        """Calls ``hook`` before every forward pass."""


def model_of(runner: Runner) -> HookedModel:
    """The model itself; those that run it have no unembedding of their own."""
    model: Any = runner
    return model if hasattr(model, "unembed") else model.model


def device_of(model: HookedModel) -> torch.device:
    """Device of the embedding, where token ids belong."""
    return next(iter(model.parameters())).device


def dtype_of(model: HookedModel) -> torch.dtype:
    """Type of the weights."""
    return next(iter(model.parameters())).dtype


def weights_of(model: HookedModel) -> str | None:
    """Where the weights come from, for results and pages; None of a model that was made elsewhere."""
    return getattr(model, "gemmascope_source", None)


_PARTS = ("cfg", "blocks", "embed", "hook_dict", "run_with_cache")


def check_model(model: object, call: str = "") -> HookedModel:
    """The model, if it is one; ``call`` is how the function is called: ``"splice(model, saes)"``."""
    if is_model(model) or hasattr(model, "_orig_mod"):  # compiled ones are refused where it matters
        return cast("HookedModel", model)
    raise InputError(
        f"{describe(model)} is not a model",
        exists="HookedTransformer, TransformerBridge",
        fix=_fix(model, call),
    )


def is_model(value: object) -> bool:
    """Whether something is a model of TransformerLens."""
    if isinstance(value, type) or value is None:
        return False
    # hook_dict of TransformerBridge is made anew whenever it is asked for: the class is asked instead
    if isinstance(value, torch.nn.Module):
        attributes = vars(value) | value._modules
        if all(part in attributes or hasattr(type(value), part) for part in _PARTS):
            return True
    return all(hasattr(value, part) for part in _PARTS)


def with_call(fix: str, call: str) -> str:
    """What to type, behind how the function is called where that is known."""
    return f"{call}; {fix}" if call else fix


def describe(value: object) -> str:
    """A value in words short enough for an error."""
    if isinstance(value, str):
        return f"The text {_short(repr(value))}"
    if isinstance(value, (list, tuple)):
        kinds = sorted({type(item).__name__ for item in value})
        return f"A {type(value).__name__} of {' and '.join(kinds) or 'nothing'}"
    if isinstance(value, torch.Tensor):
        return f"A tensor of shape {list(value.shape)}"
    if value is None:
        return "None"
    if isinstance(value, (bool, int, float)):
        return repr(value)
    if isinstance(value, type):
        return f"The class {value.__name__}"
    return f"A {type(value).__name__}"


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:56]}...'"


def _fix(model: object, call: str) -> str:
    first = f"{call}: the model comes first" if call else "the model comes first"
    if isinstance(model, str):
        return f"model = gemmascope_plugin.load_model({_short(repr(model))}), or {first}"
    if hasattr(model, "config") and hasattr(model, "get_input_embeddings"):
        return "model = gemmascope_plugin.load_model(model), which takes a transformers model"
    if isinstance(getattr(model, "model", None), torch.nn.Module):
        return f"its attribute .model, or {first}"
    return first


_CHECKED: Any = WeakIdKeyDictionary()
"""Weights that were finite, to their version."""


def is_finite(x: Shaped[torch.Tensor, "*axes"]) -> bool:
    """Whether every entry is finite; no second tensor of that size is made."""
    has_values = not (x.is_meta or isinstance(x, FakeTensor))
    if not has_values or not x.is_floating_point() or not x.numel():
        return True
    # NaN and infinities of either sign come out as one of the two
    return all(bool(extreme.isfinite()) for extreme in x.detach().aminmax())


def check_finite(
    x: Shaped[torch.Tensor, "*axes"] | float, where: str, model: object = None
) -> torch.Tensor:
    """The tensor, if it is finite, else an error that names the first entry that is not, and the cause.

    ``where`` is what it is, as a sentence begins: ``"The metric of the clean prompts"``. The weights of
    ``model`` are asked for the cause.
    """
    tensor = torch.as_tensor(x)
    if is_finite(tensor):
        return tensor
    bad = ~tensor.detach().isfinite()
    first = bad.nonzero()[0]
    value = float(tensor[tuple(first)])
    at = f", first at {first.tolist()}" if tensor.ndim else ""
    count = f"{int(bad.sum())} of {bad.numel()} numbers are not" if tensor.ndim else "it is"
    raise ModelError(
        f"{where} is not finite: {count} {'finite' if tensor.ndim else value}{at}"
        + (f" ({value})" if tensor.ndim else ""),
        exists=_cause(model),
        fix="weights without NaN, and dtype='bfloat16' or 'float32' where float16 overflows",
    )


def check_all(named: Mapping[str, torch.Tensor], where: str, model: object = None) -> None:
    """Checks activations by hook, in the order of the pass, ``where``: ``"the prompt's pass"``."""
    for name, x in named.items():
        check_finite(x, f"What {name} has in {where}", model)


def check_weights(weights: Iterable[tuple[str, torch.Tensor]], owner: str) -> None:
    """Checks weights once, until they are changed; ``owner`` is whose they are, as a sentence begins."""
    for name, x in weights:
        if x.is_inference():
            raise ModelError(
                f"{owner} was made inside torch.inference_mode(), so nothing can be differentiated",
                fix="load it outside of the block",
            )
        if _CHECKED.get(x) == x._version:
            continue
        if not is_finite(x):
            first = (~x.detach().isfinite()).nonzero()[0].tolist()
            raise ModelError(
                f"{owner} has a weight that is not finite: {name}{first} is {float(x[tuple(first)])}",
                fix="the file it came from, loaded again",
            )
        _CHECKED[x] = x._version


def first_bad_weight(model: Any) -> str | None:
    """The first weight of a model that is not finite, by name and place; None where all are."""
    for name, x in model.named_parameters():
        if not is_finite(x):
            first = (~x.detach().isfinite()).nonzero()[0].tolist()
            return f"{name}{first} = {float(x[tuple(first)])}"
    return None


def _cause(model: object) -> str | None:
    if model is None:
        return None
    inner = getattr(model, "model", model)
    named = getattr(inner, "named_parameters", None)
    bad = None if named is None else first_bad_weight(inner)
    if bad is not None:
        return f"a weight of the model that is not finite, {bad}"
    return "finite weights in the model, so something overflowed on the way"


def wide(x: Shaped[torch.Tensor, "*axes"]) -> Float[torch.Tensor, "*axes"]:
    """The tensor in at least float32; itself where it already is."""
    return x if x.dtype == torch.float64 else x.float()
