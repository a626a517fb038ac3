"""How steering changes what an answer is worth: ``log p(answer | prompt)`` without and with the push.

1. The prompt is read with the answer behind it, once as it is and once with the push, which acts as it
   does while text is generated: answer tokens count as generated ones.
2. ``sum_i log p(answer_i | prompt, answer_<i)`` in nats, minus that of ``wrong`` where there is one.

Cost: a forward pass per answer and run; logits at the answer's tokens only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gemmascope_plugin.errors import EmptySelectionError
from gemmascope_plugin.models.answers import answer_ids
from gemmascope_plugin.models.asked import asked_positions
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.splice.spliced_model import SplicedModel

Answer = str | Sequence[int]


@dataclass(frozen=True)
class AnswerChange:
    """An answer's log-probability without and with steering, in nats."""

    answer: str
    wrong: str | None
    before: float
    """Minus that of ``wrong``, where there is one."""
    after: float

    def __repr__(self) -> str:
        against = "" if self.wrong is None else f" against {self.wrong!r}"
        return f"{self.answer!r}{against} {self.before:+.3f} -> {self.after:+.3f} nats"


@dataclass(frozen=True)
class AskedAnswer:
    """An answer, and what it is compared with, behind one prompt."""

    answer: tuple[int, ...]
    wrong: tuple[int, ...] | None
    prompt: torch.Tensor

    @classmethod
    def of(
        cls, model: HookedModel, prompt: torch.Tensor, answer: Answer | None, wrong: Answer | None
    ) -> AskedAnswer | None:
        """Token ids of both; None where nothing is asked.

        Raises:
            EmptySelectionError: Something to compare with and no answer.
            TaskError: An answer that would run into the last word of the prompt, or is empty.
        """
        if answer is None:
            if wrong is not None:
                raise EmptySelectionError(
                    f"wrong={wrong!r} is compared with no answer", fix="answer="
                )
            return None
        end = int(prompt[0, -1])
        other = None if wrong is None else tuple(answer_ids(model, wrong, end, "wrong"))
        return cls(tuple(answer_ids(model, answer, end, "answer")), other, prompt)

    def value(self, spliced: SplicedModel, max_new_tokens: int) -> float:
        """The metric in a model that may be steered."""
        right = self._log_prob(spliced, self.answer, max_new_tokens)
        return (
            right
            if self.wrong is None
            else right - self._log_prob(spliced, self.wrong, max_new_tokens)
        )

    def change(self, model: HookedModel, before: float, after: float) -> AnswerChange:
        """Both values, with the texts."""
        decode: Any = model.tokenizer.decode
        wrong = None if self.wrong is None else decode(list(self.wrong))
        return AnswerChange(decode(list(self.answer)), wrong, before, after)

    @torch.no_grad()
    def _log_prob(self, spliced: SplicedModel, ids: tuple[int, ...], n_new: int) -> float:
        n = self.prompt.shape[1]
        text = torch.cat([self.prompt, self.prompt.new_tensor([ids[:-1]])], 1)
        positions = list(range(n - 1, n - 1 + len(ids)))
        with (
            spliced.continuing(n, max(n_new, len(ids))),
            asked_positions(spliced, positions),
        ):
            logits = spliced(text)[0].float()
        token = torch.tensor(ids, device=logits.device)
        return float((logits.gather(1, token[:, None])[:, 0] - logits.logsumexp(-1)).sum())
