"""The word-level tokenizer of the bundled model: one id per word, BOS in front."""

from __future__ import annotations

from pathlib import Path

import gemmascope_plugin.demo.lexicon as lexicon


def save_tokenizer(folder: Path) -> None:
    """Writes the tokenizer as Hugging Face files that ``AutoTokenizer`` reads back."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate(lexicon.vocabulary())}
    core = Tokenizer(models.WordLevel(vocab, unk_token=lexicon.UNK))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single=f"{lexicon.BOS} $A", special_tokens=[(lexicon.BOS, vocab[lexicon.BOS])]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=lexicon.BOS,
        eos_token=lexicon.EOS,
        pad_token=lexicon.PAD,
        unk_token=lexicon.UNK,
    )
    fast.save_pretrained(str(folder))
