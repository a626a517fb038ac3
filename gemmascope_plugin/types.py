"""Words that several floors share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

Kind = Literal["sae", "transcoder", "crosscoder", "clt"]
"""What a dictionary maps: a tensor to itself, MLP input to MLP output, several layers at once."""

Site = Literal["res", "att", "mlp", "embedding"]
"""Where it lives: residual stream after a block, attention head outputs ``z``, MLP, embedding."""

Provenance = Literal["listed", "derived"]
"""Whether a path is known to exist or follows from the published pattern only."""

ErrorMode = Literal["keep", "drop", "detach"]
"""What a splice does with the reconstruction error."""

Backend = Literal["hooked", "bridge"]
"""TransformerLens model class: ``HookedTransformer`` or ``TransformerBridge``."""

Direction = Literal["denoising", "noising"]
"""Clean values into the corrupted run, or corrupted values into the clean run."""

HookFn = Callable[..., Any]
"""A function at a hook point: called with the tensor and ``hook=`` the point; None leaves the tensor."""

Hooks = Iterable[tuple[str, HookFn]]
"""Names of hook points and functions, in the order in which they run."""


@runtime_checkable
class SAE(Protocol):
    """A dictionary of any architecture, as ``load`` returns it; which weights it has its class says."""

    cfg: Any

    if TYPE_CHECKING:

        def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
            ...

        def __getattr__(self, name: str) -> Any: ...
