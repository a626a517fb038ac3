"""Small GGUF files of the tiny models, written with ``gguf`` as llama.cpp's converter would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gemmascope_plugin.models.gguf_config import _BLOCK, _ROOT

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
SPACES = ["  ", "   "]
LETTERS = list("▁abcdefghijklmnopqrstuvwxyz")
PIECES = ["he", "ll", "hell", "hello", "▁w", "or", "▁wor", "ld", "▁world", "▁▁▁▁"]
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4


def vocabulary(size: int) -> tuple[list[str], list[float], list[int]]:
    """Pieces, scores and kinds."""
    tokens = [*SPECIAL, *SPACES, *PIECES, *LETTERS]
    tokens += [f"<unused{i}>" for i in range(size - len(tokens))]
    kinds = [NORMAL] * size
    for i, token in enumerate(tokens):
        if token in SPACES:
            kinds[i] = USER_DEFINED
        elif token.startswith("<"):
            kinds[i] = UNKNOWN if token == "<unk>" else CONTROL
    return tokens, [-float(i) for i in range(size)], kinds


def write(path: Path, hf: Any, kind: str = "F32", **fields: Any) -> Path:
    """A GGUF file of a transformers model.

    Args:
        path: Where to write it.
        hf: A tiny Gemma 2 or 3.
        kind: Format of the matrices.
        fields: Other values for fields, by their name with ``_`` for ``.``; None leaves one out.
    """
    import gguf

    arch = "gemma2" if hf.config.model_type == "gemma2" else "gemma3"
    writer = gguf.GGUFWriter(path, arch)
    _describe(writer, hf.config, fields)
    names = {hf_name: gguf_name for gguf_name, hf_name in _ROOT.items()}
    for name, tensor in hf.state_dict().items():
        if name == "lm_head.weight" and hf.config.tie_word_embeddings:
            continue
        values = tensor.float().numpy()
        if "norm" in name:
            values = values + np.float32(1)
        stored = gguf.GGMLQuantizationType[kind if values.ndim > 1 else "F32"]
        data = gguf.quants.quantize(values, stored)
        writer.add_tensor(names.get(name) or _block_name(name), data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _block_name(name: str) -> str:
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{ {hf_name: gguf_name for gguf_name, hf_name in _BLOCK.items()}[part] }.weight"


def _describe(writer: Any, config: Any, others: dict[str, Any]) -> None:
    tokens, scores, kinds = vocabulary(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_sliding_window(config.sliding_window)
    arch = writer.arch
    writer.add_uint32(f"{arch}.attention.sliding_window_pattern", 2)
    if config.model_type == "gemma2":
        writer.add_float32(f"{arch}.attn_logit_softcapping", config.attn_logit_softcapping)
        writer.add_float32(f"{arch}.final_logit_softcapping", config.final_logit_softcapping)
    writer.add_file_type(others.get("file_type", 0))
    writer.add_tokenizer_model(others.get("tokenizer_model", "llama"))
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)
    writer.add_add_space_prefix(False)
    if template := others.get("chat_template"):
        writer.add_chat_template(template)
