"""Forward passes that make no more than is asked: logits at some positions, none, or losses alone.

1. While a block of :func:`asked_positions`, :func:`final_residuals` or :func:`no_logits` lasts, the
   model's unembedding does less and nothing else changes: every layer runs, hooks fire, the model
   applies its own soft-cap. Somebody else's hook at ``unembed.hook_out`` may do anything with the
   logits, so where there is one it sees all of them, at the asked positions.
2. :class:`NextTokenLosses` are those of several passes over the same tokens. The first pass of
   :meth:`SharedLayers.passing` is whole, and what the last layer below the first difference returns is
   kept. In later passes every layer below returns that at once. The embedding still runs, and so does
   whoever watches the model's calls; hooks inside the layers below do not fire. Where somebody else
   listens in the model, every pass is whole.
3. A pass that leaves at a position what the first one left there, to the last bit, has its loss
   without another look at the vocabulary.

Cost of shared layers: one tensor ``[batch, pos, d_model]``; they save ``layer / n_layers`` of every
pass but the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int

from gemmascope_plugin.models.points import can_restart
from gemmascope_plugin.models.protocol import HookedModel, Runner, model_of
from gemmascope_plugin.models.readout import OfLogits, OfResiduals, Readout, cross_entropy
from gemmascope_plugin.models.unembed import Unembedding, all_logits, unembedding

Places = Callable[[int], tuple[torch.Tensor, torch.Tensor]]
"""From the number of rows of a pass to the rows and positions that are read."""
At = Int[torch.Tensor, " prompt"] | Sequence[int] | slice | Places


@dataclass(eq=False)
class Ends:
    """What passes left at their ends, at the positions that were asked."""

    normed: list[torch.Tensor] = field(default_factory=list)
    """``unembed.hook_in`` ``[row, asked, d_model]``, an entry per pass."""
    before_cap: list[torch.Tensor] = field(default_factory=list)
    """``unembed.hook_out`` likewise."""


@contextmanager
def asked_positions(
    runner: Runner,
    at: At,
    tokens: Int[torch.Tensor, "ask choice"] | None = None,
) -> Iterator[Ends]:
    """Inside the block forward passes give logits ``[row, asked, d_vocab]`` at some positions alone.

    ``at`` is a position per prompt, where rows are copies of the prompts, copy after copy; a slice or a
    list of positions that are the same in every row; or a function from the number of rows to the rows
    and the positions that are read, one by one. In the first and last case ``asked`` is 1, and there is
    a row for each that is read. ``tokens`` are words to read in place of the whole vocabulary: an entry
    for each row that comes out, or fewer of which they are copies.
    """
    ends = Ends()

    def unembed(module: Any, out: Unembedding, x: torch.Tensor) -> torch.Tensor:
        x = _cut(x, at)
        ends.normed.append(x)
        wide = out.read(x, normed=True)
        words = None if tokens is None else _repeated(tokens, len(x)).to(x.device)[:, None]
        if words is None or has_hooks(module.hook_out):
            logits = module.hook_out(all_logits(out, wide))
            logits = logits if words is None else logits.gather(-1, words)
        else:
            logits = out.logits_each(wide, words)
        ends.before_cap.append(logits)
        return logits

    with _unembedding_by(runner, unembed):
        yield ends


@contextmanager
def final_residuals(runner: Runner) -> Iterator[Ends]:
    """Inside the block forward passes leave ``unembed.hook_in`` at every position, and make no logits.

    What a pass returns means nothing.
    """
    ends = Ends()

    def unembed(module: Any, out: Unembedding, x: torch.Tensor) -> torch.Tensor:
        ends.normed.append(x)
        return x[..., :1]

    with _unembedding_by(runner, unembed):
        yield ends


@contextmanager
def read_out(runner: Runner, at: At, *, before_cap: bool = False) -> Iterator[list[Readout]]:
    """Inside the block forward passes leave what they say about the next token, a row per position.

    What a pass returns means nothing. ``at`` is as for :func:`asked_positions`; an entry per pass.
    """
    readouts: list[Readout] = []

    def unembed(module: Any, out: Unembedding, x: torch.Tensor) -> torch.Tensor:
        rows = out.read(_cut(x, at), normed=True)
        whole = unembedding(model_of(runner), before_cap=before_cap)
        if has_hooks(module.hook_out):
            logits = module.hook_out(all_logits(out, rows))
            readouts.append(OfLogits.of(whole.capped(logits).flatten(0, -2)))
        else:
            readouts.append(OfResiduals(whole, rows.flatten(0, -2)))
        return x[..., :1]

    with _unembedding_by(runner, unembed):
        yield readouts


@contextmanager
def no_logits(runner: Runner) -> Iterator[None]:
    """Inside the block forward passes make no logits; what they return means nothing."""
    with _unembedding_by(runner, lambda module, out, x: x[..., :1]):
        yield


def has_hooks(point: Any) -> bool:
    """Whether anybody listens at a hook point, forwards or backwards."""
    return bool(point.fwd_hooks or point.bwd_hooks or point._forward_hooks)


@contextmanager
def _unembedding_by(runner: Runner, unembed: Callable[..., torch.Tensor]) -> Iterator[None]:
    """The model's unembedding computed by ``unembed(module, weights, what it is given)``."""
    model = model_of(runner)
    module: Any = model.unembed  # pyright: ignore[reportAttributeAccessIssue]

    def forward(x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        # without the soft-cap, which the model applies to what comes out
        return unembed(module, unembedding(model, before_cap=True), module.hook_in(x))

    with computed_by(module, forward):
        yield


def _cut(x: torch.Tensor, at: At) -> torch.Tensor:
    if isinstance(at, slice):
        return x[:, at]
    if isinstance(at, torch.Tensor):
        rows = torch.arange(len(x), device=x.device)
        return x[rows, at.to(x.device)[rows % len(at)]][:, None]
    if callable(at):
        rows, positions = at(len(x))
        return x[rows.to(x.device), positions.to(x.device)][:, None]
    return x[:, list(at)]


def _repeated(tokens: torch.Tensor, n_rows: int) -> torch.Tensor:
    """What each row reads, the rows being copies of the prompts."""
    return tokens.repeat(n_rows // len(tokens), 1)


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


class SharedLayers:
    """The layers below the lowest in which later passes differ."""

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

    def _hold(self, module: object, args: object, output: object) -> None:
        self._returned = output


class NextTokenLosses:
    """Cross-entropies of next tokens in nats, of several passes over the same tokens.

    They are read at ``mask[row, pos]``, for the token after it; ``layer`` is the lowest in which the
    passes differ, and the layers below it run in the first pass alone.
    """

    def __init__(
        self,
        model: HookedModel,
        tokens: Int[torch.Tensor, "batch pos"],
        mask: Bool[torch.Tensor, "batch next"],
        layer: int = 0,
    ) -> None:
        self._shared = SharedLayers(model, layer)
        self._tokens = tokens
        self._mask = mask
        self._targets = tokens[:, 1:][mask.to(tokens.device)]
        self._first: tuple[torch.Tensor, torch.Tensor] | None = None

    @torch.no_grad()
    def __call__(self, runner: Runner) -> Float[torch.Tensor, " read"]:
        """Those of one pass of a model, or of what runs one as its ``model``."""
        model = model_of(runner)
        if has_hooks(model.unembed.hook_out):  # pyright: ignore[reportAttributeAccessIssue]
            return self._of_logits(runner(self._tokens))
        with final_residuals(runner) as ends, self._shared.passing():
            runner(self._tokens)
        (normed,) = ends.normed
        rows = normed[:, :-1][self._mask.to(normed.device)]
        targets = self._targets.to(rows.device)
        if self._first is None:
            losses = cross_entropy(model, rows, targets, normed=True)
            self._first = rows, losses
            return losses
        before, losses = self._first
        differs = (rows != before).any(-1)
        losses = losses.clone()
        losses[differs] = cross_entropy(model, rows[differs], targets[differs], normed=True)
        return losses

    def _of_logits(self, logits: torch.Tensor) -> Float[torch.Tensor, " read"]:
        rows = logits[:, :-1][self._mask.to(logits.device)].float()
        targets = self._targets.to(rows.device)
        return torch.nn.functional.cross_entropy(rows, targets, reduction="none")
