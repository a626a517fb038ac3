"""Meetings of ``torch.compile`` and a splice, one line of output each; see test_devices_and_compile.py.

A program of its own: in a test run the compiler would trace the type checks as well, which takes minutes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gemmascope_plugin.errors import GemmaScopeError
from gemmascope_plugin.models.load_model import bridge_from_hf, hooked_from_hf
from gemmascope_plugin.splice import Add, splice
from tests.factories import residual, tiny_tokenizer
from tests.tiny_models import gemma2, random_tokens

TOKENS = random_tokens(batch_size=1, length=6)
EDIT = Add(features=3, amount=9.0)
BUILDERS = {"hooked": hooked_from_hf, "bridge": bridge_from_hf}


def compiled(runnable: Any) -> Any:
    return torch.compile(runnable, backend="eager")


def inside_object(model: Any, spliced: Any) -> torch.Tensor:
    return compiled(model)(TOKENS)


def inside_block(model: Any, spliced: Any) -> torch.Tensor:
    model.blocks[0].compile(backend="eager")
    return spliced(TOKENS)


CASES = {
    "hooked": (inside_object, inside_block),
    "bridge": (inside_object,),
}
"""Tracing takes a second or two each, so not every case has every class."""


def fresh(backend: str) -> Any:
    torch.compiler.reset()
    return BUILDERS[backend](gemma2(num_hidden_layers=1), tiny_tokenizer(), "tiny")


def outcome(backend: str, model: Any, run: Callable[[Any], torch.Tensor]) -> str:
    """What a run inside the block gives: the edited values, the bare ones, or an error's name."""
    clean = BUILDERS[backend](gemma2(num_hidden_layers=1), tiny_tokenizer(), "tiny")
    sae, bare = residual(clean, 0), clean(TOKENS)
    with splice(clean, sae, edits=EDIT) as spliced:
        edited = spliced(TOKENS)
    assert not torch.allclose(bare, edited, atol=1e-2)
    try:
        with splice(model, sae, edits=EDIT) as spliced:
            got = run(spliced)
    except GemmaScopeError as error:
        return type(error).__name__
    names = [
        name
        for name, x in (("edited", edited), ("bare", bare))
        if torch.allclose(got, x, atol=1e-4)
    ]
    return "".join(names) or "something else"


@torch.no_grad()
def main() -> None:
    """Prints ``case backend outcome``."""
    for backend, cases in CASES.items():
        for case in cases:
            model = fresh(backend)
            result = outcome(backend, model, lambda spliced, case=case, m=model: case(m, spliced))
            print(case.__name__, backend, result)
    for name in ("object", "function"):
        model = fresh("hooked")
        run = compiled(model if name == "object" else lambda tokens, m=model: m(tokens))
        bare = run(TOKENS)
        result = outcome("hooked", model, lambda spliced, run=run: run(TOKENS))
        print(f"{name}_run_before", "hooked", result)
        print(
            f"{name}_after_the_block", "hooked", "bare" if torch.equal(run(TOKENS), bare) else "not"
        )


if __name__ == "__main__":
    main()
