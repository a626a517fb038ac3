"""Trains the bundled model, a small Gemma 2 on the bundled grammar, and makes its tokenizer.

1. ``Gemma2ForCausalLM`` with grouped-query attention, pre and post norms, alternating sliding
   window and both soft-caps; embeddings tied as in Gemma.
2. Next-token cross-entropy on fresh documents, padding ignored; AdamW, linear warm-up, cosine decay.
3. The state is saved as an ordinary Hugging Face folder (safetensors, no pickle). The tokenizer is one of
   words: an id for each, BOS in front.

Cost: about 12 minutes for 3,500 steps of 4,096 tokens on two cores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int

import gemmascope_plugin.demo.lexicon as lexicon
from gemmascope_plugin.demo.corpus import DOCUMENT_LENGTH, token_batches

if TYPE_CHECKING:
    from transformers import Gemma2ForCausalLM


@dataclass(frozen=True, kw_only=True)
class ModelRecipe:
    """Shape and training of the bundled model."""

    n_layers: int = 4
    d_model: int = 128
    d_mlp: int = 384
    n_heads: int = 4
    n_kv_heads: int = 2
    d_head: int = 32
    window: int = 16
    """Tokens that a local layer sees; documents are four times as long."""
    attn_cap: float = 50.0
    final_cap: float = 30.0
    post_norm_init: float = 0.3
    """Effective gain of both post-norms at the start."""
    steps: int = 3500
    batch_size: int = 64
    """Documents per step."""
    lr: float = 2e-3
    warmup: int = 200
    weight_decay: float = 0.05
    seed: int = 0


def build_model(recipe: ModelRecipe) -> Gemma2ForCausalLM:
    """A freshly initialised model; scaled so that blocks write small at first, seeded."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=len(lexicon.vocabulary()),
        hidden_size=recipe.d_model,
        intermediate_size=recipe.d_mlp,
        num_hidden_layers=recipe.n_layers,
        num_attention_heads=recipe.n_heads,
        num_key_value_heads=recipe.n_kv_heads,
        head_dim=recipe.d_head,
        query_pre_attn_scalar=recipe.d_head,
        sliding_window=recipe.window,
        max_position_embeddings=2 * DOCUMENT_LENGTH,
        attn_logit_softcapping=recipe.attn_cap,
        final_logit_softcapping=recipe.final_cap,
        pad_token_id=lexicon.SPECIAL_TOKENS.index(lexicon.PAD),
        eos_token_id=lexicon.SPECIAL_TOKENS.index(lexicon.EOS),
        bos_token_id=lexicon.SPECIAL_TOKENS.index(lexicon.BOS),
        tie_word_embeddings=True,
    )
    config.architectures = ["Gemma2ForCausalLM"]
    config._attn_implementation = "eager"  # the only one with Gemma 2's soft-cap
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(recipe.seed)
        model = Gemma2ForCausalLM(config).float()
        # transformers' embedding (std 0.02) would be drowned by the first post-norm, whose output
        # has unit size whatever the weights: induction then never forms. Start as large as that.
        model.model.embed_tokens.weight.normal_(0, recipe.d_model**-0.5)
        for name, parameter in model.named_parameters():
            if "post_" in name:
                parameter.fill_(recipe.post_norm_init - 1)  # the effective gain is 1 + weight
            elif "proj" in name:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
    return model


def next_token_loss(
    logits: Float[torch.Tensor, "batch pos d_vocab"], tokens: Int[torch.Tensor, "batch pos"]
) -> Float[torch.Tensor, ""]:
    """Mean cross-entropy of the next token, padding ignored, in nats."""
    pad = lexicon.SPECIAL_TOKENS.index(lexicon.PAD)
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=pad
    )


def train_model(recipe: ModelRecipe, *, progress: bool = True) -> Gemma2ForCausalLM:
    """Trains a model from scratch and returns it frozen, in eval mode."""
    from tqdm.auto import tqdm

    model = build_model(recipe).train()
    optimizer = torch.optim.AdamW(_groups(model, recipe), lr=recipe.lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_share(step, recipe))
    batches = token_batches(recipe.batch_size, recipe.seed)
    bar = tqdm(range(recipe.steps), desc="model", disable=not progress, mininterval=5)
    for step in bar:
        tokens = next(batches)
        loss = next_token_loss(model(tokens, use_cache=False).logits, tokens)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    return model.eval().requires_grad_(False)


def save_model(model: Gemma2ForCausalLM, folder: Path) -> None:
    """Writes config and weights as a Hugging Face folder."""
    model.save_pretrained(str(folder))
    (folder / "model.safetensors").chmod(0o644)  # written for its owner alone; a package is shared


def _lr_share(step: int, recipe: ModelRecipe) -> float:
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))


def _groups(model: torch.nn.Module, recipe: ModelRecipe) -> list[dict]:
    """Matrices decay; norm gains do not."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim == 1]
    return [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": gains, "weight_decay": 0.0},
    ]


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
