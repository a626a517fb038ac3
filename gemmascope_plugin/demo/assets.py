"""Where the files of the bundled suite lie inside the package, and how they are written; the tokenizer.

The tokenizer is one of words: an id for each, BOS in front.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gemmascope_plugin.demo.lexicon as lexicon
from gemmascope_plugin.files.whole import write_text_whole
from gemmascope_plugin.loading.sources import ASSETS

__all__ = ["ASSETS", "LABELS_FILE", "MODEL_FOLDER", "SUITE_FILE", "read_json", "write_json"]

MODEL_FOLDER = "model"
SUITE_FILE = "suite.json"
LABELS_FILE = "labels.json"


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Writes JSON, whole or not at all."""
    write_text_whole(path, json.dumps(content, indent=1) + "\n")


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
