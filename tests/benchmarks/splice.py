"""How fast and how small is a splice, against SAELens' own in the same process on the same weights?

    python -m tests.benchmarks.splice [--wide] [--smoke]

Random dictionaries of real size (2304 x 16384; with ``--wide`` also 2304 x 65536), about 70 of whose
features are active per token, 512 tokens, float32, two threads. Everything runs once before it is timed;
the two sides take turns; medians. Ratios above 1 are in our favour unless said.

The two-stage encode needs a CPU with bfloat16 instructions and is skipped elsewhere. Memory is read from
``/proc/self``, so this runs on Linux only.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from transformers import Gemma2Config, Gemma2ForCausalLM

import gemmascope_plugin.saes as saes
from gemmascope_plugin.models.load_model import hooked_from_hf
from gemmascope_plugin.splice import Ablate, HookedSAE, splice

THREADS = 2


@dataclass(frozen=True)
class Sizes:
    """How much is measured, and how often."""

    d_in: int = 2304
    d_sae: int = 16384
    tokens: int = 512
    l0: int = 70
    repeats: int = 7
    layers: int = 26
    passes: int = 40


SMOKE = Sizes(d_in=64, d_sae=512, tokens=16, l0=10, repeats=1, layers=2, passes=4)


def medians(*runs: Callable[[], object], repeats: int) -> list[float]:
    """Median seconds of each call; they take turns, after one round that does not count."""
    times: list[list[float]] = [[] for _ in runs]
    for i in range(repeats + 1):
        for run, series in zip(runs, times, strict=True):
            start = time.perf_counter()
            result = run()
            if i:
                series.append(time.perf_counter() - start)
            del result
    return [statistics.median(series) for series in times]


def status(key: str) -> float:
    """A size of this process in MB: ``VmRSS`` now, ``VmHWM`` at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1e3 for line in lines if line.startswith(key))


def peak(run: Callable[[], object]) -> float:
    """By how many MB a call raises the memory of the process at its peak."""
    run()
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    run()
    return status("VmHWM") - before


def dictionary(sizes: Sizes) -> Any:
    """A random JumpReLU SAE of which ``l0`` features are active on a standard normal token."""
    d_in, d_sae = sizes.d_in, sizes.d_sae
    config = JumpReLUSAEConfig(
        d_in=d_in, d_sae=d_sae, apply_b_dec_to_input=False, normalize_activations="none"
    )
    config.metadata.hook_name = "blocks.0.hook_resid_post"
    sae = JumpReLUSAE(config)
    generator = torch.Generator().manual_seed(0)
    sae.W_enc.data = torch.randn(d_in, d_sae, generator=generator) / d_in**0.5
    sae.W_dec.data = sae.W_enc.data.T.contiguous()
    sae.b_enc.data.zero_()
    level = torch.distributions.Normal(0, 1).icdf(torch.tensor(1 - sizes.l0 / d_sae))
    sae.threshold.data.fill_(float(level))
    return sae


def report(title: str, peer_seconds: float, *variants: tuple[str, float]) -> None:
    parts = [
        f"{name} {seconds * 1e3:.0f} ms: {peer_seconds / seconds:.2f}x"
        for name, seconds in variants
    ]
    print(f"{title}: SAELens {peer_seconds * 1e3:.0f} ms; " + "; ".join(parts))


@torch.no_grad()
def one_site(sizes: Sizes, two_stage: bool) -> None:
    """What a dictionary costs at its site."""
    sae, n_tokens, repeats = dictionary(sizes), sizes.tokens, sizes.repeats
    x = torch.randn(1, n_tokens, sizes.d_in, generator=torch.Generator().manual_seed(1))
    keep = torch.ones(1, n_tokens, dtype=torch.bool)
    l0 = float((sae.encode(x) > 0).sum(-1).float().mean())
    print(f"\n{sizes.d_in} x {sizes.d_sae}, {n_tokens} tokens, L0 {l0:.0f}")
    variants = {"float32": False} | ({"two-stage": True} if two_stage else {})
    dropping = {name: HookedSAE(sae, error="drop", two_stage=on) for name, on in variants.items()}
    keeping = {name: HookedSAE(sae, two_stage=on) for name, on in variants.items()}
    for hooked in keeping.values():
        hooked.points["hook_sae_acts_post"].add_hook(lambda acts, hook: None)
    product, encode, *times = medians(
        lambda: x[0] @ sae.W_enc,
        lambda: sae.encode(x),
        lambda: sae.decode(sae.encode(x)),
        *(lambda h=hooked: h(x, x, keep) for hooked in dropping.values()),
        repeats=repeats,
    )
    print(f"matrix product alone {product * 1e3:.0f} ms, SAELens' encode {encode * 1e3:.0f} ms")
    report("encode + decode, error dropped", times[0], *zip(variants, times[1:], strict=True))
    sae.use_error_term = True
    times = medians(
        lambda: sae.run_with_cache(x, names_filter=["hook_sae_acts_post"]),
        *(lambda h=hooked: h(x, x, keep) for hooked in keeping.values()),
        repeats=repeats,
    )
    report("error kept, features read", times[0], *zip(variants, times[1:], strict=True))
    editing, edit = HookedSAE(sae), [Ablate(features=7)]
    peer_seconds, seconds = medians(
        lambda: sae(x), lambda: editing(x, x, keep, edit), repeats=repeats
    )
    sae.use_error_term = False
    print(
        f"one edited feature, error kept: {seconds * 1e3:.1f} ms, {seconds / encode:.1%} of a full "
        f"encode (SAELens' forward with error term, without any edit: {peer_seconds * 1e3:.0f} ms)"
    )
    backward(sae, x, keep)


@torch.enable_grad()
def backward(sae: Any, x: torch.Tensor, keep: torch.Tensor) -> None:
    """Time and memory of features' gradients; SAELens' dictionary as loaded collects its own too."""
    hooked = HookedSAE(sae)
    hooked.points["hook_sae_acts_post"].add_hook(lambda acts, hook: None)

    def ours() -> None:
        stream = x.clone().requires_grad_(True)
        hooked(stream, stream, keep).sum().backward()

    def theirs() -> None:
        stream = x.clone().requires_grad_(True)
        sae(stream).sum().backward()

    ours_s, ours_mb = medians(ours, repeats=3)[0], peak(ours)
    assert all(p.grad is None for p in sae.parameters()), "a parameter collected a gradient"
    sae.requires_grad_(True).use_error_term = True
    theirs_s, theirs_mb = medians(theirs, repeats=3)[0], peak(theirs)
    grads = sum(p.grad.nbytes for p in sae.parameters() if p.grad is not None) / 1e6
    sae.requires_grad_(False).use_error_term = False
    sae.zero_grad(set_to_none=True)
    print(
        f"forward and backward with features as leaves: SAELens {theirs_s * 1e3:.0f} ms, "
        f"+{theirs_mb:.0f} MB and {grads:.0f} MB of gradients of parameters kept; "
        f"ours {ours_s * 1e3:.0f} ms, +{ours_mb:.0f} MB, none kept: {theirs_s / ours_s:.2f}x"
    )


def random_model(n_layers: int) -> Any:
    """A random Gemma 2 of many layers, narrow enough for this to take seconds."""
    config = Gemma2Config(
        vocab_size=1000,
        hidden_size=640,
        intermediate_size=1280,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
        attn_implementation="eager",
    )
    config.architectures = ["Gemma2ForCausalLM"]
    return hooked_from_hf(Gemma2ForCausalLM(config).eval(), None, "random")


@torch.no_grad()
def whole_model(layers: int, passes: int) -> None:
    """A forward pass with an SAE at every layer and nothing asked for, against the bare model."""
    model, exclude = random_model(layers), (0, 1, 2)
    tokens = torch.randint(5, 1000, (1, 128), generator=torch.Generator().manual_seed(0))
    dictionaries = []
    for layer in range(layers):
        config = JumpReLUSAEConfig(d_in=model.cfg.d_model, d_sae=2048, apply_b_dec_to_input=False)
        config.metadata.hook_name = f"blocks.{layer}.hook_resid_post"
        dictionaries.append(JumpReLUSAE(config))
    times: dict[str, list[float]] = {"bare": [], "spliced": []}
    logits = {}
    for _ in range(passes):
        for name, series in times.items():
            with ExitStack() as stack:
                run = model
                if name == "spliced":
                    run = stack.enter_context(splice(model, dictionaries, exclude=exclude))
                start = time.perf_counter()
                logits[name] = run(tokens)
                series.append(time.perf_counter() - start)
    bare, spliced = (statistics.median(series[3:]) for series in times.values())
    equal = "bitwise equal" if torch.equal(*logits.values()) else "DIFFERENT"
    print(
        f"\n{layers} layers of width {model.cfg.d_model}, {tokens.shape[1]} tokens, an SAE at every "
        f"layer, error kept, nothing asked for: bare {bare * 1e3:.1f} ms, spliced {spliced * 1e3:.1f} "
        f"ms: {spliced / bare:.3f} of the bare forward, logits {equal}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one line per measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wide", action="store_true", help="also four times the features")
    parser.add_argument("--smoke", action="store_true", help="64 x 512, 16 tokens, two layers")
    options = parser.parse_args(arguments)
    sizes = [SMOKE] if options.smoke else [Sizes()]
    if options.wide:
        sizes.append(replace(sizes[0], d_sae=4 * sizes[0].d_sae))
    torch.set_num_threads(1 if options.smoke else THREADS)
    two_stage = saes.has_bf16_instructions()
    if not two_stage:
        print("two-stage encode skipped: this CPU has no bfloat16 instructions")
    for each in sizes:
        one_site(each, two_stage)
    whole_model(sizes[0].layers, sizes[0].passes)


if __name__ == "__main__":
    main()
