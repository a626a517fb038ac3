"""The tokenizer of a GGUF file as ``tokenizer.json``.

1. The file holds SentencePiece's view: texts, scores, and kinds of the pieces.  Hugging Face's holds
   pairs to merge, in order.  A piece is made by each pair of shorter pieces that spell it; pairs are
   ordered by the id of the piece, the longer left part first, which is the order of Gemma's own
   ``tokenizer.json`` (its scores are not).  transformers 5.23 converts these files to the same.
2. Normalisation, bytes for unknown characters, and BOS are Gemma's, written out.

Costs about a second for 262,144 pieces.
"""

from __future__ import annotations

from typing import Any

from gemmascope_plugin.errors import ModelError
from gemmascope_plugin.models.gguf.reader import GgufFile

_PREFIX = "tokenizer.ggml."
_CONTROL, _USER_DEFINED, _UNKNOWN = 3, 4, 2
_NAMED = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id"}


def special_ids(file: GgufFile) -> dict[str, int]:
    """Ids of BOS, EOS, UNK and PAD, as far as the file names them."""
    keys = {**_NAMED, "pad": "padding_token_id"}
    ids = {name: file.fields.get(_PREFIX + key) for name, key in keys.items()}
    return {name: int(token) for name, token in ids.items() if token is not None}


def end_ids(file: GgufFile) -> list[int]:
    """Ids that end a text: EOS, the end of a turn where the model has a template for turns."""
    tokens = file.fields[_PREFIX + "tokens"]
    ends = [file.fields.get(_PREFIX + key) for key in ("eos_token_id", "eot_token_id")]
    if "tokenizer.chat_template" in file.fields and "<end_of_turn>" in tokens:
        ends.append(tokens.index("<end_of_turn>"))
    return sorted({int(end) for end in ends if end is not None})


def tokenizer_files(file: GgufFile) -> tuple[dict[str, Any], dict[str, Any]]:
    """Contents of ``tokenizer.json`` and ``tokenizer_config.json``."""
    kind = file.fields.get(_PREFIX + "model")
    if kind != "llama" or file.fields.get(_PREFIX + "add_space_prefix", False):
        raise ModelError(
            f"{file.name!r} has a tokenizer of the kind {kind!r}, which is not Gemma's",
            fix="a GGUF file that llama.cpp's convert_hf_to_gguf.py wrote from a Gemma 2 or 3",
        )
    tokens = [_spelled(token) for token in file.fields[_PREFIX + "tokens"]]
    kinds: list[int] = file.fields[_PREFIX + "token_type"]
    ids = special_ids(file)
    named = {name: tokens[token] for name, token in ids.items()}
    if "<mask>" in tokens:
        named["mask"] = "<mask>"
    return _tokenizer(tokens, kinds, named), _settings(file, named)


def merges(tokens: list[str]) -> list[list[str]]:
    """Pairs of pieces in the order in which they are merged."""
    pieces = set(tokens)
    return [
        [token[:cut], token[cut:]]
        for token in tokens
        for cut in range(len(token) - 1, 0, -1)
        if token[:cut] in pieces and token[cut:] in pieces
    ]


def _spelled(token: str) -> str:
    """Runs of spaces as BPE meets them, after normalisation; llama.cpp stores them as spaces."""
    return "▁" * len(token) if " " in token and not token.strip(" ") else token


def _tokenizer(tokens: list[str], kinds: list[int], named: dict[str, str]) -> dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(tokens, kinds, set(named.values())),
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": _bos_first(named["bos"], tokens.index(named["bos"])),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": named.get("unk"),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges(tokens),
        },
    }


def _added(tokens: list[str], kinds: list[int], named: set[str]) -> list[dict[str, Any]]:
    """Pieces that are found in a text before anything is merged."""
    return [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind in (_CONTROL, _UNKNOWN) or token in named,
        }
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if (kind in (_CONTROL, _USER_DEFINED, _UNKNOWN) or token in named) and token.strip("▁")
    ]


def _bos_first(bos: str, token: int) -> dict[str, Any]:
    def special(part: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": bos, "type_id": part}}

    def sequence(part: int) -> dict[str, Any]:
        return {"Sequence": {"id": "AB"[part], "type_id": part}}

    return {
        "type": "TemplateProcessing",
        "single": [special(0), sequence(0)],
        "pair": [special(0), sequence(0), special(1), sequence(1)],
        "special_tokens": {bos: {"id": bos, "ids": [token], "tokens": [bos]}},
    }


def _settings(file: GgufFile, named: dict[str, str]) -> dict[str, Any]:
    template = file.fields.get("tokenizer.chat_template")
    return {
        "tokenizer_class": "GemmaTokenizer",
        "backend": "tokenizers",
        "model_max_length": 1_000_000_000_000_000_019_884_624_838_656,  # transformers' "no limit"
        **{f"{name}_token": text for name, text in sorted(named.items())},
        **({"chat_template": template} if template else {}),
    }
