"""A tokenizer whose words differ by the blank before them, trained on the built-in prompts."""

from __future__ import annotations

from functools import cache
from random import Random
from types import SimpleNamespace
from typing import Any

from gemmascope_plugin.causes.builtin.builtin_tasks import RECIPES, SPLITS, TASKS
from gemmascope_plugin.causes.builtin.drafts import Draft, Half


def drafts(name: str, split: str, n: int, seed: int = 0) -> list[Draft]:
    """Some drafts of a task, whatever the tokenizer."""
    drawn = RECIPES[name].draw(Random(seed), Half(SPLITS.index(split)))
    return [next(drawn) for _ in range(n)]


@cache
def tokenizer(size: int = 3000) -> Any:
    """Byte-level pairs: many words are one token with their blank, rarer ones several; digits are single.

    Args:
        size: Of the vocabulary; a small one breaks most words.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    core.decoder = decoders.ByteLevel()
    texts = [
        draft.clean + end
        for name in TASKS
        for split in SPLITS
        for draft in drafts(name, split, 200)
        for end in (draft.answer[:3] + draft.wrong[:3])
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<pad>", "<eos>", "<bos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )


class Words:
    """Stands for a model where its tokenizer is all that counts."""

    embed = blocks = hook_dict = None

    def __init__(self, size: int = 3000) -> None:
        self.tokenizer = tokenizer(size)
        self.cfg = SimpleNamespace(d_vocab=len(self.tokenizer), model_name="words")

    def _never(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("There is no model here")

    __call__ = hooks = run_with_cache = run_with_hooks = generate = parameters = _never
    register_forward_hook = register_forward_pre_hook = _never
