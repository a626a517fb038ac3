"""Several passes over the same tokens that differ from a layer on: the layers below run once.

1. The first pass of :meth:`SharedLayers.passing` is whole, and what the last layer below returns is held.
2. In later passes every layer below returns that at once. The embedding still runs, and so does whoever
   watches the model's calls; hooks inside the layers below do not fire.
3. Where somebody else listens in the model, every pass is whole.

Cost: one tensor ``[batch, pos, d_model]``; it saves ``layer / n_layers`` of every pass but the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from gemmascope_plugin.models.points import can_restart
from gemmascope_plugin.models.protocol import HookedModel


class SharedLayers:
    """The layers of a model below one.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``, as it is in the first pass.
        layer: The lowest layer in which later passes differ.
    """

    def __init__(self, model: HookedModel, layer: int) -> None:
        shares = layer > 0 and can_restart(model)
        self._below: list[Any] = list(model.blocks[:layer]) if shares else []
        self._returned: Any = None

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Inside the block one pass runs, always over the same tokens."""
        with ExitStack() as stack:
            if self._below and self._returned is None:
                handle = self._below[-1].register_forward_hook(self._hold)
                stack.callback(handle.remove)
            else:
                for block in self._below:
                    stack.enter_context(computed_by(block, lambda *args, **kwargs: self._returned))
            yield

    def _hold(self, module: Any, args: Any, output: Any) -> None:
        self._returned = output


@contextmanager
def computed_by(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside the block a module returns what ``forward`` does; its hooks before and behind stay."""
    # not by setattr, which the bridge hands on to the module that it wraps
    names = vars(module)
    before = names.get("forward")
    names["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del names["forward"]
        else:
            names["forward"] = before
