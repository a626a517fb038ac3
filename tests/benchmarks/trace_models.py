"""Random models and transcoders to trace: what the benchmark of attribution graphs runs on.

    python tests/benchmarks/trace_models.py FOLDER [small medium large] [--d-model 64]

Needs torch and safetensors alone, so it runs in any environment. Nothing here was trained: a model has
the *shape* of Gemma 2 (norms with random gains before and after attention and MLP, grouped queries, both
soft-caps, windowed attention in every other layer, gated MLP), and its weights are random. Times and
sizes of a trace depend on the shapes and on the number of active features, not on what the features
mean.

A case is a folder:

* ``model.safetensors``: the weights under the names of a ``HookedTransformer``'s ``state_dict``, nothing
  folded, buffers left out;
* ``transcoders.safetensors``: ``{layer}.W_enc [d_model, d_sae]``, ``W_dec [d_sae, d_model]``, ``b_enc``,
  ``b_dec``, ``threshold``, and ``W_skip [d_model, d_model]`` (``x @ W_skip.T``) if there is a skip;
* ``case.json``: ``config`` (arguments of ``HookedTransformerConfig``), ``hook_in`` and ``hook_out``
  within a block, ``tokens`` (BOS first).

How many features are active follows without running the model: what a transcoder reads has a mean square
of one, so that its pre-activations are standard normal over random encoders and the threshold is a
quantile. Features at BOS are not counted, as circuit-tracer sets them to zero.

Cost: a second and 2 to 8 MB a case.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

BOS = 2
FIRST_WORD = 4
HOOK_IN, HOOK_OUT = "ln2.hook_normalized", "hook_mlp_out"


@dataclass(frozen=True)
class Case:
    """One prompt, the model that it runs through, and its transcoders."""

    config: dict[str, Any]
    """Arguments of ``HookedTransformerConfig``."""
    state: dict[str, torch.Tensor]
    """Weights of the model."""
    transcoders: dict[str, torch.Tensor]
    """Weights of the transcoders, ``{layer}.{name}``."""
    tokens: list[int]
    hook_in: str = HOOK_IN
    """What a transcoder reads, without ``blocks.{layer}.``."""
    hook_out: str = HOOK_OUT

    def save(self, folder: Path) -> None:
        """Writes the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.state, folder / "model.safetensors")
        save_file(self.transcoders, folder / "transcoders.safetensors")
        words = {"config": self.config, "hook_in": self.hook_in, "hook_out": self.hook_out}
        (folder / "case.json").write_text(json.dumps({**words, "tokens": self.tokens}, indent=1))

    @classmethod
    def load(cls, folder: Path) -> Case:
        """Reads the folder."""
        words = json.loads((folder / "case.json").read_text())
        weights = (load_file(folder / f"{part}.safetensors") for part in ("model", "transcoders"))
        config, tokens = words["config"], words["tokens"]
        return cls(config, *weights, tokens, words["hook_in"], words["hook_out"])


def gemma2_config(**overrides: Any) -> dict[str, Any]:
    """Arguments of ``HookedTransformerConfig`` for a small model of Gemma 2's shape.

    Args:
        **overrides: Sizes, soft-caps, window; ``attn_types`` follows the number of layers.
    """
    config = {
        "n_layers": 6,
        "d_model": 64,
        "d_head": 16,
        "n_heads": 4,
        "n_key_value_heads": 2,
        "d_mlp": 128,
        "d_vocab": 512,
        "n_ctx": 256,
        "eps": 1e-6,
        "act_fn": "gelu_pytorch_tanh",
        "normalization_type": "RMS",
        "final_rms": True,
        "gated_mlp": True,
        "use_normalization_before_and_after": True,
        "positional_embedding_type": "rotary",
        "rotary_adjacent_pairs": False,
        "use_attn_scale": True,
        "use_local_attn": True,
        "window_size": 32,
        "attn_scores_soft_cap": 50.0,
        "output_logits_soft_cap": 30.0,
        "original_architecture": "Gemma2ForCausalLM",
        "model_name": "random-gemma-2",
        "device": "cpu",
    } | overrides
    kinds = ("local", "global")
    config["attn_types"] = [kinds[layer % 2] for layer in range(config["n_layers"])]
    # Neither the square root of d_head, which is what TransformerLens takes if it is not told.
    derived = {"rotary_dim": config["d_head"], "attn_scale": (0.75 * config["d_head"]) ** 0.5}
    return {**derived, **config}


def random_state(config: dict[str, Any], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Weights for the config. Queries and keys are large, so that attention is far from uniform."""
    d, dh, heads = config["d_model"], config["d_head"], config["n_heads"]
    kv, d_mlp, vocab = config["n_key_value_heads"], config["d_mlp"], config["d_vocab"]

    def normal(*shape: int, std: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * std

    state = {
        "embed.W_E": normal(vocab, d, std=1.0),
        "ln_final.w": 1 + normal(d, std=0.3),
        "unembed.W_U": normal(d, vocab, std=2.3 * d**-0.5),
        "unembed.b_U": torch.zeros(vocab),
    }
    for layer in range(config["n_layers"]):
        block = {
            f"{norm}.w": 1 + normal(d, std=0.3) for norm in ("ln1", "ln1_post", "ln2", "ln2_post")
        }
        block |= {
            "attn.W_Q": normal(heads, d, dh, std=1.7 * d**-0.5),
            "attn._W_K": normal(kv, d, dh, std=1.7 * d**-0.5),
            "attn._W_V": normal(kv, d, dh, std=0.85 * d**-0.5),
            "attn.W_O": normal(heads, dh, d, std=0.85 * (heads * dh) ** -0.5),
            # Gemma has no biases, TransformerLens has parameters for them.
            "attn.b_Q": torch.zeros(heads, dh),
            "attn._b_K": torch.zeros(kv, dh),
            "attn._b_V": torch.zeros(kv, dh),
            "attn.b_O": torch.zeros(d),
            "mlp.W_gate": normal(d, d_mlp, std=0.85 * d**-0.5),
            "mlp.W_in": normal(d, d_mlp, std=0.85 * d**-0.5),
            "mlp.W_out": normal(d_mlp, d, std=0.85 * d_mlp**-0.5),
            "mlp.b_in": torch.zeros(d_mlp),
            "mlp.b_out": torch.zeros(d),
        }
        state |= {f"blocks.{layer}.{name}": value for name, value in block.items()}
    return state


def random_transcoders(
    config: dict[str, Any],
    d_sae: int,
    density: float,
    generator: torch.Generator,
    *,
    skip: bool = False,
) -> dict[str, torch.Tensor]:
    """JumpReLU transcoders of every layer with the given share of active features.

    Args:
        config: The model's.
        d_sae: Features of each.
        density: Expected share of active features on inputs with a mean square of one.
        generator: Source of the weights.
        skip: Whether they have an affine skip.
    """
    d = config["d_model"]
    spread = 1.01**0.5  # of a pre-activation, with the bias
    level = spread * float(torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(1 - density)))
    weights = {}
    for layer in range(config["n_layers"]):
        tensors = {
            "W_enc": torch.randn(d, d_sae, generator=generator) * d**-0.5,
            "W_dec": torch.randn(d_sae, d, generator=generator) * 0.3,
            "b_enc": torch.randn(d_sae, generator=generator) * 0.1,
            "b_dec": torch.randn(d, generator=generator) * 0.3,
            "threshold": torch.full((d_sae,), level),
        }
        if skip:
            tensors["W_skip"] = torch.randn(d, d, generator=generator) * 0.5 * d**-0.5
        weights |= {f"{layer}.{name}": value for name, value in tensors.items()}
    return weights


def random_tokens(config: dict[str, Any], length: int, generator: torch.Generator) -> list[int]:
    """BOS and random words."""
    words = torch.randint(FIRST_WORD, config["d_vocab"], (length - 1,), generator=generator)
    return [BOS, *words.tolist()]


# Prompt length, d_sae and expected number of active features.
CASES = {"small": (60, 512, 3_000), "medium": (100, 1024, 11_000), "large": (130, 2048, 23_000)}


def random_case(name: str, d_model: int = 64, seed: int = 0) -> Case:
    """One of the three cases of the benchmark; circuit-tracer takes minutes for the large one."""
    length, d_sae, active = CASES[name]
    generator = torch.Generator().manual_seed(seed)
    config = gemma2_config(d_model=d_model, d_head=d_model // 4, d_mlp=2 * d_model)
    density = active / (config["n_layers"] * (length - 1) * d_sae)
    return Case(
        config,
        random_state(config, generator),
        random_transcoders(config, d_sae, density, generator),
        random_tokens(config, length, generator),
    )


def main() -> None:
    """Writes the cases that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("cases", nargs="*", metavar="case", help=f"of {', '.join(CASES)}; or all")
    parser.add_argument("--d-model", type=int, default=64, help="width of the model; four heads")
    arguments = parser.parse_args()
    for name in arguments.cases or CASES:
        random_case(name, arguments.d_model).save(arguments.folder / name)
        length, d_sae, active = CASES[name]
        print(f"{arguments.folder / name}: {length} tokens, d_sae {d_sae}, about {active} features")


if __name__ == "__main__":
    main()
