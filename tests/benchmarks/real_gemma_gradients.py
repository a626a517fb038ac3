"""Gradients at the features of an SAE below another SAE, on a real Gemma: SAELens' splice and this one.

With the error term on, two spliced SAEs change no value: the model is itself. So the derivative of a
logit difference with respect to a feature of the lower one is that of the *bare* model along the
feature's decoder row, and central differences of the bare model give it without any SAE.

1. Two TopK SAEs are fitted to activations of the standard library's sources: ``EXPANSION`` times as many
   features as the stream is wide, rows from centred activations, ``STEPS`` Adam steps.
2. Active features of the lower SAE at the last token: gradient by SAELens (``use_error_term=True``), by
   this package (``error="keep"``), and by central differences.
3. Cosine of both with the differences.

Cost: about two minutes on two cores.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int

import gemmascope_plugin as gs
from tests.benchmarks.real_gemma_formulas import Row

PAIRS = ((5 / 18, 12 / 18), (9 / 18, 14 / 18))
"""Depths of the lower and the upper SAE, as shares of the layers."""
EXPANSION, K, STEPS, BATCH = 3, 48, 200, 512
N_TOKENS, CONTEXT = 12_288, 128
N_FEATURES = 32


def table(model: Any, task: Any) -> Iterator[Row]:
    """One row for each pair of layers.

    Args:
        model: A ``HookedTransformer``.
        task: Its first clean prompt is used.
    """
    pairs = [[round(depth * model.cfg.n_layers) for depth in pair] for pair in PAIRS]
    saes = fitted(model, sorted({layer for pair in pairs for layer in pair}))
    bound = task.first(1).bind(model)
    peer = saelens_model(model)
    for lower, upper in pairs:
        features, truth = differences(model, bound, saes[lower])
        from_saelens = gradient(peer, bound, [saes[lower], saes[upper]], features)
        from_splice = spliced_gradient(model, bound, [saes[lower], saes[upper]], features)
        cells = [
            f"{float(torch.cosine_similarity(g, truth, dim=0)):.4f}"
            for g in (from_saelens, from_splice)
        ]
        title = f"gradient at features of layer {lower} below an SAE of layer {upper}: cosine"
        yield (title, *cells, "1")


def fitted(model: Any, layers: list[int]) -> dict[int, Any]:
    """One TopK SAE for each layer's residual stream."""
    names = [f"blocks.{layer}.hook_resid_post" for layer in layers]
    tokens = _text(model)
    pieces: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    with torch.no_grad():
        for batch in tokens.split(8):
            _, cache = model.run_with_cache(
                batch, names_filter=names, stop_at_layer=max(layers) + 1
            )
            for name in names:
                pieces[name].append(cache[name][:, 1:].flatten(0, 1))
    return {
        layer: _fit(torch.cat(pieces[name]), name)
        for layer, name in zip(layers, names, strict=True)
    }


def _text(model: Any) -> Int[torch.Tensor, "row pos"]:
    """Sources of the standard library, in rows that begin with BOS."""
    ids = model.tokenizer("\n".join(map(inspect.getsource, (inspect, torch.nn.Module))))[
        "input_ids"
    ]
    size = CONTEXT - 1
    ids = (ids * (N_TOKENS // len(ids) + 1))[: N_TOKENS // size * size]
    bos = model.tokenizer.bos_token_id
    return torch.tensor([[bos, *ids[i : i + size]] for i in range(0, len(ids), size)])


def _fit(x: Float[torch.Tensor, "token d_in"], hook: str) -> Any:
    """A TopK SAE as SAELens has it."""
    from sae_lens import TopKSAE, TopKSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    generator = torch.Generator().manual_seed(0)
    mean, size = x.mean(0), (x - x.mean(0)).norm(dim=1).mean() / x.shape[1] ** 0.5
    centred = (x - mean) / size
    d_sae = EXPANSION * x.shape[1]
    rows = centred[torch.randperm(len(x), generator=generator)[:d_sae]]
    decoder = torch.nn.functional.normalize(rows, dim=1).requires_grad_(True)
    encoder = decoder.detach().T.clone().requires_grad_(True)
    optimiser = torch.optim.Adam([encoder, decoder], lr=1e-3)
    for _ in range(STEPS):
        batch = centred[torch.randint(len(x), (BATCH,), generator=generator)]
        loss = (_top(batch @ encoder) @ decoder - batch).square().sum(1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    norms = decoder.detach().norm(dim=1)
    metadata = SAEMetadata(hook_name=hook, model_name="gemma-3-270m")
    config = TopKSAEConfig(
        d_in=x.shape[1], d_sae=len(rows), k=K, apply_b_dec_to_input=True, metadata=metadata
    )
    sae = TopKSAE(config)
    with torch.no_grad():
        sae.W_dec.copy_(decoder.detach() / norms[:, None])
        sae.W_enc.copy_(encoder.detach() * norms)
        sae.b_dec.copy_(mean)
        sae.b_enc.zero_()
    return sae.eval().requires_grad_(False)


def _top(pre: Float[torch.Tensor, "token d_sae"]) -> Float[torch.Tensor, "token d_sae"]:
    values, index = pre.topk(K, dim=1)
    return torch.zeros_like(pre).scatter(1, index, values.relu())


def saelens_model(model: Any) -> Any:
    """SAELens' own splicing class around the same weights."""
    import copy

    from sae_lens import HookedSAETransformer

    peer = HookedSAETransformer(copy.deepcopy(model.cfg), tokenizer=None, move_to_device=False)
    peer.load_state_dict(model.state_dict(), strict=False, assign=True)
    return peer.eval().requires_grad_(False)


@torch.no_grad()
def differences(
    model: Any, bound: Any, sae: Any
) -> tuple[Int[torch.Tensor, " feature"], Float[torch.Tensor, " feature"]]:
    """Active features at the last token, and central differences of the bare model along their rows."""
    name = sae.cfg.metadata.hook_name
    _, cache = model.run_with_cache(bound.clean, names_filter=[name])
    x = cache[name][0, -1]
    acts = sae.encode(x[None])[0]
    features = acts.topk(N_FEATURES).indices
    steps = 0.01 * x.norm()
    moves = torch.cat([steps * sae.W_dec[features], -steps * sae.W_dec[features]])

    def move(stream: torch.Tensor, hook: Any) -> torch.Tensor:
        stream[:, -1] += moves
        return stream

    rows = bound.clean.repeat(len(moves), 1)
    high, low = bound.measure(model, rows, fwd_hooks=[(name, move)]).chunk(2)
    return features, (high - low) / (2 * steps)


def gradient(
    peer: Any, bound: Any, saes: list[Any], features: Int[torch.Tensor, " feature"]
) -> Float[torch.Tensor, " feature"]:
    """SAELens' gradient at the lower SAE's activations, the last token's."""
    collected: list[torch.Tensor] = []
    name = f"{saes[0].cfg.metadata.hook_name}.hook_sae_acts_post"

    def keep(grad: torch.Tensor, hook: Any) -> None:
        collected.append(grad[0, -1, features].detach().clone())

    start = [("hook_embed", lambda x, hook: x.requires_grad_(True))]
    with (
        peer.saes(saes, use_error_term=True),
        peer.hooks(fwd_hooks=start, bwd_hooks=[(name, keep)]),
    ):
        bound.metric(peer(bound.clean)).sum().backward()
    return collected[0]


def spliced_gradient(
    model: Any, bound: Any, saes: list[Any], features: Int[torch.Tensor, " feature"]
) -> Float[torch.Tensor, " feature"]:
    """This package's."""
    from gemmascope_plugin.models import gradients

    name = f"{saes[0].cfg.metadata.hook_name}.hook_sae_acts_post"
    with gs.splice(model, saes, error="keep", exclude=()) as spliced:
        grads = gradients(spliced, bound.clean, lambda logits: bound.metric(logits).sum(), [name])
    return grads[name][0, -1, features]
