"""The largest tensor that anything makes while a block lasts."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LargestTensor(TorchDispatchMode):
    """Looks at the results of every operation that are not views of its inputs, backward passes included.

    ``numel`` is the largest number of entries among matrices whose last dimension is ``width`` or more;
    with ``exact`` is ``width``.
    """

    def __init__(self, width: int, exact: bool = False) -> None:
        super().__init__()
        self.width, self.exact = width, exact
        self.numel = 0
        self.shape: tuple[int, ...] = ()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        before = {_storage(x) for x in args if isinstance(x, torch.Tensor)}
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor) and self._is_larger(x) and _storage(x) not in before:
                self.numel, self.shape = x.numel(), tuple(x.shape)
        return result

    def _is_larger(self, x: torch.Tensor) -> bool:
        if x.ndim < 2 or x.numel() <= self.numel:
            return False
        return x.shape[-1] == self.width if self.exact else x.shape[-1] >= self.width


def _storage(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()
