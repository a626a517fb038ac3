"""What a result rests on is finite, or the call says where it first was not.

A NaN passes every comparison by failing it (``abs(nan) > tolerance`` is False), so nothing downstream
notices one. It is looked for where numbers enter (weights of a dictionary), where a pass is read
(activations, losses, metrics) and where a result is handed out.

The error names the first entry that is not finite, and the model's weight that is the cause, if one is:
the weights are looked at only then.

Cost: one pass over the tensor that is checked; weights of a dictionary once, until somebody changes them.

Sums are taken in at least float32, whatever the type of the model (:func:`wide`). A model in half
precision keeps its stream, its weights and what is inserted into it in its own type. What is added up
outside of it (products of writes and gradients, norms, projections, means) is widened first: bfloat16
has 8 binary digits, and a sum over hundreds of terms in it has none left. ``Anatomy`` widens weights, a
layer at a time. In a float32 model nothing is copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakIdKeyDictionary

from gemmascope_plugin.errors import ModelError

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
