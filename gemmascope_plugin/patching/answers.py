"""Right and wrong answers of each prompt as token ids, sets padded to one width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int

from gemmascope_plugin.errors import TaskError, UnknownNameError
from gemmascope_plugin.models.protocol import HookedModel, device_of
from gemmascope_plugin.models.tokens import token_id

Answer = str | int | Sequence[str | int]
"""A token, or a set of tokens of which any counts."""


@dataclass(frozen=True)
class TokenSets:
    """One set of token ids per prompt."""

    ids: Int[torch.Tensor, "prompt choice"]
    mask: Bool[torch.Tensor, "prompt choice"]
    """False at padding."""

    @classmethod
    def of(cls, model: HookedModel, entries: Sequence[Answer]) -> TokenSets:
        """Words and ids as ids of this model.

        Raises:
            TaskError: A prompt has no answer.
            UnknownNameError: A word is not a single token, or an id is outside the vocabulary.
        """
        sets = [[e] if isinstance(e, str | int) else list(e) for e in entries]
        width = max(len(choices) for choices in sets)
        ids = torch.zeros(len(sets), width, dtype=torch.long)
        mask = torch.zeros(len(sets), width, dtype=torch.bool)
        for row, choices in enumerate(sets):
            if not choices:
                raise TaskError(f"Prompt {row} has an empty set of answers")
            found = [c if isinstance(c, int) else token_id(model, c) for c in choices]
            beyond = [i for i in found if not 0 <= i < model.cfg.d_vocab]
            if beyond:
                raise UnknownNameError(
                    f"Token id {beyond[0]} does not exist",
                    exists=f"token ids 0 to {model.cfg.d_vocab - 1}",
                )
            ids[row, : len(found)] = torch.tensor(found)
            mask[row, : len(found)] = True
        return cls(ids.to(device_of(model)), mask.to(device_of(model)))

    def pick(
        self, values: Float[torch.Tensor, "prompt d_vocab"], fill: float
    ) -> Float[torch.Tensor, "prompt choice"]:
        """The values of the tokens in each set, ``fill`` at padding."""
        return values.gather(-1, self.ids).masked_fill(~self.mask, fill)

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
