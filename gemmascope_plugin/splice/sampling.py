"""How a continuation is drawn: every option checked, and none given that would have no effect.

1. At temperature 0 the most probable token is taken at every step; what only sampling reads is refused.
2. Else the model's own ``generate`` samples. TransformerLens reads ``top_p`` only where there is no
   ``top_k``, and a negative ``freq_penalty`` not at all; both are refused instead.
3. A seed holds for one block and for the generators that the block draws from; the caller's random
   state is the same before and after.

Cost: nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch

from gemmascope_plugin.errors import GemmaScopeError


class SteeringError(GemmaScopeError):
    """An option of steering that is out of range, or that would have no effect."""


def _whole(n: object) -> bool:
    return isinstance(n, Integral) and int(n) >= 1


_RANGES: tuple[tuple[str, Callable[[Any], bool], str, str], ...] = (
    (
        "max_new_tokens",
        _whole,
        "whole numbers from 1",
        "20",
    ),
    (
        "temperature",
        lambda t: math.isfinite(t) and t >= 0,
        "0 for the most probable token, positive numbers for sampling",
        "1.0",
    ),
    (
        "top_k",
        lambda k: k is None or _whole(k),
        "None for every token, whole numbers from 1",
        "50",
    ),
    (
        "top_p",
        lambda p: p is None or 0 < p <= 1,
        "None for every token, numbers above 0 and up to 1",
        "0.9",
    ),
    (
        "freq_penalty",
        lambda f: math.isfinite(f) and f >= 0,
        "0 for no penalty, positive numbers",
        "0.5",
    ),
)
"""Option, what it must fulfil, the same in words, an example."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a continuation is drawn."""

    max_new_tokens: int = 20
    temperature: float = 0.0
    """0 for the most probable token at every step."""
    top_k: int | None = None
    """Sample from this many most probable tokens."""
    top_p: float | None = None
    """Sample from the fewest tokens that have this probability together."""
    freq_penalty: float = 0.0
    """What a token's logit loses for every time it is in the text already, prompt included."""
    seed: int = 0
    stop: tuple[int, ...] = ()
    """Ids of tokens that end a continuation, beside those of the model."""

    def __post_init__(self) -> None:
        for name, fits, exists, example in _RANGES:
            value = getattr(self, name)
            if not fits(value):
                raise SteeringError(
                    f"{name}={value!r} is out of range", exists=exists, fix=f"{name}={example}"
                )
        if self.top_k is not None and self.top_p is not None:
            raise SteeringError(
                f"top_k={self.top_k} and top_p={self.top_p} exclude each other: with both, the "
                "model's sampling never reads top_p",
                fix="one of the two",
            )
        idle = {"top_k": self.top_k, "top_p": self.top_p, "freq_penalty": self.freq_penalty or None}
        for name, value in idle.items():
            if self.temperature == 0 and value is not None:
                raise SteeringError(
                    f"{name}={value} has no effect at temperature 0, where the most probable token "
                    "is taken",
                    fix=f"temperature=1.0, or leave {name} out",
                )

    def options(self) -> dict[str, Any]:
        """Keyword arguments of the model's ``generate``."""
        if self.temperature == 0:
            ends = {"stop": self.stop}
            return {"max_new_tokens": self.max_new_tokens, "do_sample": False, **ends}
        return {
            "stop": self.stop,
            "max_new_tokens": self.max_new_tokens,
            "do_sample": True,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "freq_penalty": self.freq_penalty,
        }

    @contextmanager
    def seeded(self, device: torch.device) -> Iterator[None]:
        """Inside the block, draws on this device follow from the seed alone."""
        with ExitStack() as stack:
            sources: list[Any] = [torch.random]
            if device.type != "cpu":
                sources.append(torch.get_device_module(device))
                if device.index is not None:
                    stack.enter_context(sources[-1].device(device))
            for source in sources:
                stack.callback(source.set_rng_state, source.get_rng_state())
            torch.default_generator.manual_seed(self.seed)
            for source in sources[1:]:
                source.manual_seed(self.seed)
            yield
