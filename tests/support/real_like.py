"""A small random Gemma 3 with the statistics of a real one, and a tokenizer with its traps.

What the tiny models lack, and ordinary faults need to be seen:

* a residual stream of norm 10^5, most of ``E|x|^2`` being its mean, which lies in two coordinates; norms
  after attention and MLP with gains of thousands; float16 overflows;
* one key-value head, QK norms, a window shorter than the prompts, no soft-cap, a vocabulary much larger
  than the width;
* a tokenizer that pads on the left, knows words with and without a space in front, splits others into
  pieces, and spells unknown signs in bytes.
"""

from __future__ import annotations

import atexit
import copy
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

from gemmascope_plugin.models.load_model import bridge_from_hf, hooked_from_hf

PAD, EOS, BOS, UNK, START, END = range(6)
BIG = (11, 5)
"""Coordinates that hold the mean."""
WORDS = (
    "The the Paris Rome France Italy capital city of is in and Mary John gave a book to Yes No ing ed s "
    "walk talk . , ) ( : ; ? ! ' \" - = + 1 2 3 4 5 6 7 8 9 0 Monday Tuesday href < > a b c d e f g h i "
    "j k l m n o p q r t u v w x y z New York user model One Two Three cat cats sat on mat dog ran fast"
).split()
ONLY_SPACED = ("giver", "keys")
"""Words that exist with a space in front only."""
ONLY_EXACT = ("1", "2", "3", "4", "5", "6", "7", "8", "9", "0", "s")
"""Texts that exist without one only."""
PROMPT = "The capital of France is"
OTHER = "The capital of Italy is"
SHORT = "The city"


def vocabulary() -> list[str]:
    """All tokens, by id."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    exact = list(dict.fromkeys(WORDS))
    spaced = [f"\u2581{word}" for word in (*exact, *ONLY_SPACED) if word not in ONLY_EXACT]
    lines = ["\n", "\n\n", "\u2581", "\u2581\u2581"]
    return [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *lines, *exact, *spaced]


@cache
def tokenizer() -> Any:
    """As Gemma's: spaces are part of tokens, signs that are not in the vocabulary become bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # equal scores: the fewest pieces win
    core = Tokenizer(models.Unigram([(t, -1.0) for t in vocabulary()], UNK, byte_fallback=True))
    core.normalizer = normalizers.Replace(" ", "\u2581")
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    core.add_special_tokens(vocabulary()[:6])
    names = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
    fast = PreTrainedTokenizerFast(tokenizer_object=core, padding_side="left", **names)
    folder = Path(tempfile.mkdtemp(prefix="real-like-tokenizer-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    fast.save_pretrained(str(folder))
    return AutoTokenizer.from_pretrained(str(folder))


@cache
def hf_model() -> Any:
    """The ``Gemma3ForCausalLM``; copy it before anything takes it over."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    config = Gemma3TextConfig(
        vocab_size=len(vocabulary()) + 1,  # more rows than tokens, as real checkpoints have
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=12,
        query_pre_attn_scalar=12,
        sliding_window=8,
        max_position_embeddings=64,
        layer_types=kinds,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=BOS,
        attn_implementation="eager",
    )
    config.architectures = ["Gemma3ForCausalLM"]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = Gemma3ForCausalLM(config).float().eval()
        _fill(model)
    model.generation_config.eos_token_id = [EOS, END]
    return model.requires_grad_(False)


def _fill(model: Any) -> None:
    """Random weights of a real model's sizes."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.normal_(0.0, 0.3)  # gains are 1 + w
        elif "proj" in name:
            parameter.normal_(0.0, 0.2)
        elif "embed" in name:
            parameter.normal_(0.0, 0.4)
            parameter[:, BIG[0]] += 4.0
    for layer, block in enumerate(model.model.layers):
        after = block.post_attention_layernorm, block.post_feedforward_layernorm
        for norm, gain in zip(after, (850.0 * layer + 1, 2400.0 * layer + 300), strict=True):
            norm.weight.copy_(gain * (1 + 0.3 * torch.randn_like(norm.weight)))
        # one neuron fires at every token and writes the two coordinates
        mlp, reads = block.mlp, block.pre_feedforward_layernorm.weight
        reads[BIG[0]] = 0.5
        mlp.gate_proj.weight[0], mlp.up_proj.weight[0] = 0.0, 0.0
        mlp.gate_proj.weight[0, BIG[0]] = mlp.up_proj.weight[0, BIG[0]] = 0.5
        mlp.down_proj.weight[:, 0] = 0.0
        for place, size, factor in zip(BIG, (1.0, 0.6), (2.5, 2.0), strict=True):
            mlp.down_proj.weight[place] *= 0.1
            after[0].weight[place] *= 0.1
            mlp.down_proj.weight[place, 0] = size
            after[1].weight[place] *= factor * 0.9**layer


@cache
def real_like(backend: str = "hooked", dtype: torch.dtype = torch.float32) -> Any:
    """The model on a TransformerLens class; never change it."""
    build = {"hooked": hooked_from_hf, "bridge": bridge_from_hf}[backend]
    return build(copy.deepcopy(hf_model()).to(dtype), tokenizer(), "real-like")


def real_like_transcoders(backend: str = "hooked", d_sae: int = 96) -> list[Any]:
    """Random transcoders, one for each layer, each feature active on a few percent of tokens."""
    from tests.factories import activations, random_sae

    model, saes = real_like(backend), []
    n_words = len(vocabulary())
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(END + 1, n_words, (16, 20), generator=generator)
    tokens[:, 0] = BOS
    for layer in range(4):
        hook_in, hook_out = f"blocks.{layer}.ln2.hook_normalized", f"blocks.{layer}.hook_mlp_out"
        x, y = activations(model, tokens, hook_in)[:, 1:], activations(model, tokens, hook_out)
        sae = random_sae(32, d_sae, hook_in, hook_out, d_out=32, seed=layer)
        pre = (x @ sae.W_enc + sae.b_enc).flatten(0, 1)
        sae.threshold.data = pre.quantile(0.94, dim=0).clamp(min=0.02) * 1.001
        sae.W_dec.data *= y.norm(dim=-1).median() / 10
        saes.append(sae)
    return saes


def real_like_sae(backend: str = "hooked", layer: int = 1, d_sae: int = 96) -> Any:
    """A random SAE of the stream whose features are active on a few percent of tokens."""
    from tests.factories import dictionary

    return dictionary(real_like(backend), f"blocks.{layer}.hook_resid_post", d_sae=d_sae)
