"""What a GGUF file says about its model, as Hugging Face's files: config, names of tensors, tokenizer.

1. What the file does not say about the model is what llama.cpp assumes for it, in
   ``src/models/gemma2.cpp`` and ``gemma3.cpp`` there: which layers are local, the scale of the
   attention scores (the two models of 27B divide by another width than their heads have), and the
   rotary base of local layers.
2. The file holds SentencePiece's view of the tokenizer: texts, scores, and kinds of the pieces.
   Hugging Face's ``tokenizer.json`` holds pairs to merge, in order.  A piece is made by each pair of
   shorter pieces that spell it; pairs are ordered by the id of the piece, the longer left part first,
   which is the order of Gemma's own file (its scores are not).  transformers 5.23 converts these files
   to the same.
3. Normalisation, bytes for unknown characters, and BOS are Gemma's, written out.

Costs about a second for 262,144 pieces.
"""

from __future__ import annotations

import re
from typing import Any

from gemmascope_plugin.errors import BadFileError, ModelError
from gemmascope_plugin.models.gguf_reader import GgufFile, GgufTensor

ARCHITECTURES = {"gemma2": "Gemma2ForCausalLM", "gemma3": "Gemma3ForCausalLM"}
_PATTERN = {"gemma2": 2, "gemma3": 6}
"""Every so many layers one attends to the whole context."""
_WIDE = {("gemma2", 46), ("gemma3", 62)}
"""The models of 27B, by their layers: their queries are scaled by the width per head of the stream."""
_LOCAL_THETA = 10_000.0

_ROOT = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def architecture(file: GgufFile) -> str:
    """``"gemma2"`` or ``"gemma3"``."""
    name = file.fields.get("general.architecture")
    if name not in ARCHITECTURES:
        raise ModelError(
            f"{file.name!r} holds a {name!r} model",
            exists="support for " + " and ".join(ARCHITECTURES),
            fix="a GGUF file of a Gemma 2 or Gemma 3",
        )
    return name


def hf_config(file: GgufFile) -> Any:
    """Transformers' config of the model in the file."""
    from transformers import Gemma2Config, Gemma3TextConfig

    name = architecture(file)
    values = {**_sizes(file, name), **_attention(file, name), **_tokens(file)}
    config = (Gemma2Config if name == "gemma2" else Gemma3TextConfig)(**values)
    config.architectures = [ARCHITECTURES[name]]
    return config


def hf_name(tensor: GgufTensor) -> str:
    """What transformers calls a tensor."""
    if tensor.name in _ROOT:
        return _ROOT[tensor.name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name)
    if not match or match[2] not in _BLOCK:
        raise ModelError(f"The GGUF file has the tensor {tensor.name!r}, which no Gemma 2 or 3 has")
    return f"model.layers.{match[1]}.{_BLOCK[match[2]]}.weight"


def is_norm(tensor: GgufTensor) -> bool:
    """Whether llama.cpp has added the 1 that Gemma's norms add to their gains."""
    return tensor.name.endswith("norm.weight")


def _sizes(file: GgufFile, name: str) -> dict[str, Any]:
    return {
        "hidden_size": _field(file, f"{name}.embedding_length"),
        "intermediate_size": _field(file, f"{name}.feed_forward_length"),
        "num_hidden_layers": _field(file, f"{name}.block_count"),
        "num_attention_heads": _field(file, f"{name}.attention.head_count"),
        "num_key_value_heads": _field(file, f"{name}.attention.head_count_kv"),
        "head_dim": _field(file, f"{name}.attention.key_length"),
        "max_position_embeddings": _field(file, f"{name}.context_length"),
        "rms_norm_eps": _field(file, f"{name}.attention.layer_norm_rms_epsilon"),
        "sliding_window": _field(file, f"{name}.attention.sliding_window"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }


def _attention(file: GgufFile, name: str) -> dict[str, Any]:
    sizes = _sizes(file, name)
    n_layers, n_heads = sizes["num_hidden_layers"], sizes["num_attention_heads"]
    is_wide = (name, n_layers) in _WIDE
    period = file.fields.get(f"{name}.attention.sliding_window_pattern", _PATTERN[name])
    is_local = (
        period if isinstance(period, list) else [(i + 1) % period > 0 for i in range(n_layers)]
    )
    caps = (50.0, 30.0) if name == "gemma2" else (None, None)
    return {
        "query_pre_attn_scalar": sizes["hidden_size"] // n_heads if is_wide else sizes["head_dim"],
        "layer_types": [
            "sliding_attention" if local else "full_attention" for local in is_local[:n_layers]
        ],
        "attn_logit_softcapping": file.fields.get(f"{name}.attn_logit_softcapping", caps[0]),
        "final_logit_softcapping": file.fields.get(f"{name}.final_logit_softcapping", caps[1]),
        "rope_parameters": _rope(file, name),
    }


def _rope(file: GgufFile, name: str) -> dict[str, Any]:
    theta = float(file.fields.get(f"{name}.rope.freq_base", 10_000.0 if name == "gemma2" else 1e6))
    kind = file.fields.get(f"{name}.rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise ModelError(f"{file.name!r} scales its rotary embedding in the way {kind!r}")
    factor = float(file.fields.get(f"{name}.rope.scaling.factor", 1.0))
    is_scaled = kind == "linear" and factor != 1
    scaling = {"rope_type": "linear", "factor": factor} if is_scaled else {"rope_type": "default"}
    whole = {"rope_theta": theta, **scaling}
    if name == "gemma2":
        return whole
    local = float(file.fields.get(f"{name}.rope.freq_base_swa", _LOCAL_THETA))
    return {
        "full_attention": whole,
        "sliding_attention": {"rope_theta": local, "rope_type": "default"},
    }


def _tokens(file: GgufFile) -> dict[str, Any]:
    if "token_embd.weight" not in file.tensors:
        raise BadFileError(f"{file.name!r} holds no token_embd.weight")
    ids, ends = special_ids(file), end_ids(file)
    return {
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "bos_token_id": ids.get("bos"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": ids.get("pad"),
    }


def _field(file: GgufFile, key: str) -> Any:
    if key not in file.fields:
        raise BadFileError(
            f"{file.name!r} does not say its {key}",
            fix="a GGUF file that llama.cpp's convert_hf_to_gguf.py wrote",
        )
    return file.fields[key]


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
