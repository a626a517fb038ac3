"""Leaves ``torch.inference_mode()``, in which nothing can be differentiated.

1. A function called inside it runs outside of it: gradients are what many of them are made of.
2. What a model has made inside it is copied: ``HookedTransformer`` extends its table of rotary embeddings
   when a text is long, and a table from inside could never again take part in a backward pass.
3. Weights that were loaded inside it stay unusable for gradients, which is said here.

Cost: nothing outside; a look at two tensors a layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from gemmascope_plugin.errors import ModelError


@contextmanager
def usual_mode(model: Any = None) -> Iterator[None]:
    """The block runs outside of inference mode.

    Args:
        model: Whose tables are mended; None for none.

    Raises:
        ModelError: The model's weights were made inside inference mode.
    """
    # inside inference mode gradients are off whatever is wanted, so that is no answer
    wanted = torch.is_grad_enabled() or torch.is_inference_mode_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(wanted):
        if isinstance(model, torch.nn.Module):
            _mend(model)
        yield


def _mend(model: Any) -> None:
    for block in getattr(model, "blocks", ()):
        attention = getattr(block, "attn", None)
        buffers = getattr(attention, "_buffers", {})
        for name in ("rotary_sin", "rotary_cos"):
            table = buffers.get(name)
            if table is not None and table.is_inference():
                buffers[name] = table.clone()
    weight = next(iter(model.parameters()), None)
    if weight is not None and weight.is_inference():
        raise ModelError(
            "The model was made inside torch.inference_mode(), so nothing can be differentiated",
            fix="load it outside of the block",
        )
