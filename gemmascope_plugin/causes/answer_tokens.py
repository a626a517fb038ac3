"""Right and wrong answers of each prompt as token ids, sets padded to one width.

An answer is a word, an id of any library's integers, or several of them; a single one is that of one
prompt. Of a word that is a token with and without a space in front, the prompt decides which is meant
(``models/tokens.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

import torch
from jaxtyping import Bool, Float, Int

from gemmascope_plugin.errors import TaskError
from gemmascope_plugin.indices import as_index
from gemmascope_plugin.models.protocol import HookedModel, device_of
from gemmascope_plugin.models.tokens import quoted_label, token_id

Answer = str | int | Sequence[str | int]
"""A token, or a set of tokens of which any counts."""
Answers = str | SupportsIndex | Iterable[Any]
"""Answers as people give them: one per prompt, ids of any library, in a list, an array or a tensor."""


def answer_list(what: str, answers: Any) -> list[Answer]:
    """One entry per prompt, ids as plain integers; a single answer is that of one prompt."""
    single = _single(answers)
    if single is not None:
        return [single]
    return [_entry(what, entry) for entry in _listed(what, answers)]


def _entry(what: str, entry: Any) -> Answer:
    single = _single(entry)
    if single is not None:
        return single
    choices = [_single(choice) for choice in _listed(what, entry)]
    if None in choices:
        raise _no_answer(what, entry)
    return [choice for choice in choices if choice is not None]


def _single(value: Any) -> str | int | None:
    return value if isinstance(value, str) else as_index(value)


def _listed(what: str, value: Any) -> list[Any]:
    if isinstance(value, Mapping | bytes) or not isinstance(value, Iterable):
        raise _no_answer(what, value)
    return list(value)


def _no_answer(what: str, value: Any) -> TaskError:
    return TaskError(
        f"{what} has {value!r}, which is neither a word nor a token id",
        fix=f'{what}=[" Paris", " Rome"], one per prompt, or token ids',
    )


@dataclass(frozen=True)
class TokenSets:
    """One set of token ids per prompt."""

    ids: Int[torch.Tensor, "prompt choice"]
    mask: Bool[torch.Tensor, "prompt choice"]
    """False at padding."""

    @classmethod
    def of(
        cls,
        model: HookedModel,
        entries: Sequence[Answer],
        prompts: Sequence[Any] | None = None,
    ) -> TokenSets:
        """Words and ids as ids of this model."""
        sets = [[e] if isinstance(e, str | int) else list(e) for e in entries]
        width = max(len(choices) for choices in sets)
        ids = torch.zeros(len(sets), width, dtype=torch.long)
        mask = torch.zeros(len(sets), width, dtype=torch.bool)
        for row, choices in enumerate(sets):
            if not choices:
                raise TaskError(f"Prompt {row} has an empty set of answers")
            before = None if prompts is None else prompts[row]
            tokens = [token_id(model, choice, before) for choice in choices]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = True
        return cls(ids.to(device_of(model)), mask.to(device_of(model)))

    def label(self, model: HookedModel, row: int = 0, limit: int = 3) -> str:
        """The tokens of one prompt for people, with their ids."""
        tokens = self.ids[row][self.mask[row]].tolist()
        shown = [quoted_label(model, token) for token in tokens[:limit]]
        more = len(tokens) - len(shown)
        return ", ".join(shown) + (f" and {more} more" if more else "")

    def pick(
        self, values: Float[torch.Tensor, "prompt d_vocab"], fill: float
    ) -> Float[torch.Tensor, "prompt choice"]:
        """The values of the tokens in each set, ``fill`` at padding."""
        return self.filled(values.gather(-1, self.ids), fill)

    def filled(
        self, values: Float[torch.Tensor, "prompt choice"], fill: float
    ) -> Float[torch.Tensor, "prompt choice"]:
        """Values of the tokens in each set with ``fill`` at padding."""
        return values.masked_fill(~self.mask, fill)

    def outside(
        self, values: Float[torch.Tensor, "prompt d_vocab"]
    ) -> Float[torch.Tensor, "prompt d_vocab"]:
        """The values of all other tokens, minus infinity at those of the set."""
        inside = torch.zeros(values.shape, dtype=torch.bool, device=values.device)
        inside = inside.scatter(-1, self.ids, self.mask)
        # where a set is narrower than the widest, its padding points at token 0
        inside[:, 0] = (self.mask & (self.ids == 0)).any(-1)
        return values.masked_fill(inside, -torch.inf)

    def rows(self, index: Int[torch.Tensor, " row"]) -> TokenSets:
        """The sets of some prompts, in this order."""
        return TokenSets(self.ids[index], self.mask[index])
