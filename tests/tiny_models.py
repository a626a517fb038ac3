"""Random Gemma 2 and Gemma 3 models, built in memory, and a word-level tokenizer.

For wiring, shapes, gradients and algebraic identities only. Two choices make the models *sensitive*:

* Norm gains are random. transformers starts Gemma's ``1 + weight`` at ``weight = 0``, where a forgotten
  ``1 +``, a skipped post-norm or a wrong fold would be invisible.
* Projections are large, the soft-caps low, ``query_pre_attn_scalar != head_dim``, and the sliding window
  (16) is shorter than the test prompts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCABULARY = 256
PAD_ID, EOS_ID, BOS_ID, UNK_ID = 0, 1, 2, 3
FIRST_WORD_ID = 4  # ids below are special tokens


def gemma2(seed: int = 0, **overrides: Any) -> Any:
    """A frozen ``Gemma2ForCausalLM`` of 3 layers (local, global, local)."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    soft_caps = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}
    return _build(Gemma2ForCausalLM, Gemma2Config(**{**_fields(), **soft_caps, **overrides}), seed)


def gemma3(seed: int = 0, **overrides: Any) -> Any:
    """A frozen text-only ``Gemma3ForCausalLM`` of 3 layers (local, global, local)."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    kinds = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    return _build(Gemma3ForCausalLM, Gemma3TextConfig(**{**_fields(), **kinds, **overrides}), seed)


def _fields() -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,  # 4 x 12 != 32: a mix-up of d_model and the width of z is an error
        "query_pre_attn_scalar": 24,
        "sliding_window": 16,
        "max_position_embeddings": 128,
        "pad_token_id": PAD_ID,
        "eos_token_id": EOS_ID,
        "bos_token_id": BOS_ID,
        "attn_implementation": "eager",
    }


def _build(model_class: Any, config: Any, seed: int) -> Any:
    config.architectures = [model_class.__name__]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = model_class(config).float().eval()
        for name, parameter in model.named_parameters():
            if "norm" in name:  # also q_norm and k_norm of Gemma 3
                parameter.normal_(0.0, 0.3)
            elif "proj" in name:
                parameter.normal_(0.0, 0.2)
            elif "embed" in name:
                parameter.normal_(0.0, 0.1)
    return model.requires_grad_(False)


def random_tokens(batch_size: int = 2, length: int = 20, seed: int = 0) -> torch.Tensor:
    """Random word ids ``[batch, length]`` that start with BOS and hold no other special token."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(FIRST_WORD_ID, VOCABULARY, (batch_size, length), generator=generator)
    tokens[:, 0] = BOS_ID
    return tokens


def tokenizer(folder: Path) -> Any:
    """A tokenizer with ``"w5 w6"`` -> ``[2, 5, 6]``, saved in ``folder``, which must outlive it.

    TransformerLens reads the path that a tokenizer came from, so it cannot exist in memory alone.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    special = {"<pad>": PAD_ID, "<eos>": EOS_ID, "<bos>": BOS_ID, "<unk>": UNK_ID}
    words = {f"w{i}": i for i in range(FIRST_WORD_ID, VOCABULARY)}
    core = Tokenizer(models.WordLevel(special | words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS_ID)]
    )
    names = {name: f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core, **{f"{name}_token": text for name, text in names.items()}
    )
    fast.save_pretrained(str(folder))
    return AutoTokenizer.from_pretrained(str(folder))
