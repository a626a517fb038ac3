"""Measures of one dictionary on a corpus: sparsity, fit, loss, frequencies, evenness, geometry.

1. One pass reads the dictionary's input and output sites at the tokens that are not excluded. Features
   are encoded sparsely and only counts and sums are kept, so that the corpus may be of any size. The
   target is the tensor at the *output* site; an affine skip is part of the reconstruction.
2. ``l0``, ``fvu`` (about the mean of the same tokens) and the loss measures: arXiv 2408.05147,
   section 4; see ``splice/fit.py``. They are read and changed at the same tokens.
3. ``dead_share``, ``dense_share`` (features active on more than a tenth of the tokens) and the
   histogram of firing frequencies in half decades, from the same counts.
4. ``r_l0``, how evenly a token's active features matter for the next token (see below).
5. ``max_cosine`` of the decoder: for each row the largest cosine with any *other* row, the mean over the
   rows that are not zero. High values mean that features are compositions or copies of one another (the
   composition measure of Matryoshka SAEs, arXiv 2503.17547). Signed: opposite rows are not alike.

``r_L0`` of Gemma Scope (appendix C.3): ``L`` is the logit of the correct next token minus the mean logit,
``g = d L / d y`` its gradient with respect to the tensor at the output site, at the token itself, of the
real model, at the real tensor: nothing is spliced. ``a_i = f_i * (W_dec[i] . g)`` is each feature's
first-order effect, ``p = |a| / sum |a|``, and ``r_L0 = exp(S(p)) / L0`` with ``S`` the entropy in nats
and ``L0`` the token's number of active features: ``1 / L0 <= r_L0 <= 1``, and 1 where all matter alike.
The mean over tokens is reported; a token without active features, or whose features have no effect, is
left out. Later tokens' logits also depend on the tensor, so each position needs a backward pass of its
own; positions are sampled evenly, all documents of a batch at once.

Cost: six forward passes over the corpus, one encode and sparse decode of it and one more in the
spliced pass, ``n_positions`` backward passes a batch (logits at these positions only), and ``2 * d_sae **
2 * d_out`` operations for the cosines, of which ``_VALUES`` are held and never ``d_sae ** 2``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Int

import gemmascope_plugin.saes as saes
from gemmascope_plugin.errors import ModelError
from gemmascope_plugin.features.stream import Corpus, Tokens, corpus, hooked_for, site_tensors
from gemmascope_plugin.measures.measure_results import Measures, subject
from gemmascope_plugin.models import flatten_heads
from gemmascope_plugin.models.asked import NextTokenLosses, final_residuals
from gemmascope_plugin.models.gate import gate
from gemmascope_plugin.models.gradients import frozen
from gemmascope_plugin.models.points import lowest_layer, reading
from gemmascope_plugin.models.protocol import HookedModel, check_model
from gemmascope_plugin.models.record import hooking, keep
from gemmascope_plugin.models.unembed import mean_logit, unembedding
from gemmascope_plugin.saes import Coder
from gemmascope_plugin.splice import HookedSAE, splice
from gemmascope_plugin.splice.fit import SpliceLoss, mean_losses, putting
from gemmascope_plugin.splice.hooked_sae import check_sae
from gemmascope_plugin.types import SAE


class _Sums:
    """Running sums over a corpus, in float64."""

    def __init__(self, coder: Coder) -> None:
        d_out, device = coder.W_dec.shape[1], coder.W_dec.device
        self.n = 0
        self.error = 0.0
        self.squares = 0.0
        self.total = torch.zeros(d_out, dtype=torch.float64, device=device)
        self.fires = torch.zeros(coder.d_sae, dtype=torch.long, device=device)

    def add(
        self,
        coder: Coder,
        x: Float[torch.Tensor, "token d_in"],
        y: Float[torch.Tensor, "token d_out"],
    ) -> None:
        """Counts one batch."""
        acts = coder.encode_sparse(x)
        target = y.double()
        self.n += len(x)
        self.error += float((target - saes.reconstruct(coder, acts, x)).pow(2).sum())
        self.squares += float(target.pow(2).sum())
        self.total += target.sum(0)
        self.fires += torch.bincount(acts.indices, minlength=len(self.fires))

    @property
    def fvu(self) -> float:
        """NaN where the tokens do not vary."""
        variance = self.squares - float(self.total.pow(2).sum()) / self.n
        varies = variance > 1e-12 * max(self.squares, 1e-30)
        return self.error / variance if varies else math.nan


@gate(model=check_model, sae=check_sae)
def measure(
    model: HookedModel,
    sae: SAE | HookedSAE,
    tokens: Tokens,
    *,
    exclude: str | int | Sequence[str | int] = ("bos", "eos", "pad"),
    batch_size: int = 16,
    n_positions: int = 8,
) -> Measures:
    """Measures a dictionary on a corpus.

    Args:
        model: The bare model.
        sae: A JumpReLU SAE or transcoder; ``HookedSAE(sae, level=0)`` for a level of a Matryoshka
            dictionary, whose other options do not count.
        tokens: Token ids ``[document, pos]``, or several such tensors.
        exclude: Special tokens that are neither measured nor touched.
        batch_size: Documents per forward pass.
        n_positions: Positions per document at which ``r_l0`` is measured, a backward pass each; 0
            leaves it NaN.

    Raises:
        EmptySelectionError: No token, or excluded ones only.
        ModelError: Not a JumpReLU dictionary, or ``batch`` or ``n_positions`` out of range.
        MissingHookError: The model has no such hook.
        WidthMismatchError: The dictionary has another width than the model's tensor.

    Example:
        >>> suite = gs.tiny()
        >>> tokens = suite.task("agreement").bind(suite.model).clean
        >>> gs.measure(suite.model, suite.load("res", 1), tokens, n_positions=2)
        Measures(blocks.1.hook_resid_post, 512 features, 384 tokens, excluded ('bos', 'eos',
          'pad'): L0 12.0, FVU 0.017, delta loss -0.0104 (-0.2% of zeros, -0.1% of the mean),
          dead 73.2%, dense 7.8%, r_L0 0.668, max cosine 0.327)
    """
    if n_positions < 0:
        raise ModelError(f"n_positions={n_positions} is negative", fix="n_positions=0 to skip r_L0")
    text = corpus(model, tokens, exclude, batch_size)
    return _measure(model, hooked_for(sae, text.exclude), text, n_positions)


@torch.no_grad()
def _measure(model: HookedModel, hooked: HookedSAE, text: Corpus, n_positions: int) -> Measures:
    coder = hooked.weights
    sums = _Sums(coder)
    for x, y in site_tensors(model, hooked, text):
        sums.add(coder, x, y)
    mean = (sums.total / sums.n).float()
    losses = splice_loss(model, hooked, text, mean)
    r_l0, r_l0_tokens = importance(model, hooked, text, n_positions)
    return Measures(
        **subject(hooked, sums.n, text.exclude),
        l0=float(sums.fires.sum()) / sums.n,
        fvu=sums.fvu,
        losses=losses,
        frequencies=sums.fires.double() / sums.n,
        r_l0=r_l0,
        r_l0_tokens=r_l0_tokens,
        max_cosine=mean_max_cosine(coder.W_dec),
    )


def splice_loss(
    model: HookedModel, hooked: HookedSAE, text: Corpus, mean: Float[torch.Tensor, " d_out"]
) -> SpliceLoss:
    """The losses of a dictionary whose error is dropped; ``mean`` is that of its output site."""
    assert hooked.error == "drop", "the reconstruction alone must flow"

    def passes(
        read: NextTokenLosses, tokens: Int[torch.Tensor, "batch pos"]
    ) -> Iterator[tuple[str, Float[torch.Tensor, " read"]]]:
        yield "clean", read(model)
        with splice(model, hooked) as run:
            yield "spliced", read(run)
        for name, value in (("zeroed", torch.zeros_like(mean)), ("mean-ablated", mean)):
            hook_fn = putting(text.kept(tokens), value)
            with hooking(model, fwd_hooks=[(hooked.hook_out, hook_fn)]):
                yield name, read(model)

    batches = ((tokens, text.readable(tokens)) for tokens in text.batches)
    layer = lowest_layer(hooked.hook_in, hooked.hook_out)
    means = mean_losses(model, batches, layer, passes)
    return SpliceLoss(**{name.replace("-", "_"): value for name, value in means.items()})


_VALUES = 1 << 24
"""Cosines held at a time: 64 MB, 64 rows of 262,144 features."""


@torch.no_grad()
def max_cosines(
    W_dec: Float[torch.Tensor, "d_sae d_out"], *, chunk: int | None = None
) -> Float[torch.Tensor, " rows"]:
    """Each row's largest cosine with another row, for the rows that are not zero."""
    rows = W_dec.detach().float()
    norms = torch.linalg.vector_norm(rows, dim=-1)
    is_direction = norms > 0
    if int(is_direction.sum()) < 2:
        return norms.new_zeros(0)
    size = chunk or max(1, _VALUES // len(rows))
    largest = []
    for start in range(0, len(rows), size):
        block = slice(start, start + size)
        cosines = (rows[block] @ rows.T).div_(norms[block, None]).div_(norms)
        cosines[:, ~is_direction] = -math.inf
        here = torch.arange(len(cosines), device=rows.device)
        cosines[here, here + start] = -math.inf
        largest.append(cosines.amax(-1)[is_direction[block]])
    return torch.cat(largest)


def mean_max_cosine(W_dec: Float[torch.Tensor, "d_sae d_out"]) -> float:
    """Mean over rows of the largest cosine with another row; NaN for fewer than two rows."""
    cosines = max_cosines(W_dec)
    return float(cosines.mean()) if len(cosines) else math.nan


def importance(
    model: HookedModel, hooked: HookedSAE, text: Corpus, n_positions: int
) -> tuple[float, int]:
    """Mean ``r_L0``, and the number of tokens it was measured on; NaN for none."""
    total, n = 0.0, 0
    for tokens in text.batches:
        mask = text.readable(tokens)
        positions = _spread(mask.any(0), n_positions)
        if not positions:
            continue
        for values in _batch(model, hooked, tokens, mask, positions):
            total += float(values.double().sum())
            n += len(values)
    return (total / n if n else math.nan), n


def _batch(
    model: HookedModel,
    hooked: HookedSAE,
    tokens: torch.Tensor,
    mask: Bool[torch.Tensor, "batch next"],
    positions: list[int],
) -> list[torch.Tensor]:
    read, seen = reading(model, hooked.hook_in), {}

    def start(y: torch.Tensor, hook: object) -> torch.Tensor:
        seen["y"] = y.detach().requires_grad_(True)
        return seen["y"]

    hooks = [(read.hook, keep(seen, "x")), (hooked.hook_out, start)]
    with (
        torch.enable_grad(),
        frozen(model.parameters()),
        hooking(model, fwd_hooks=hooks),
        final_residuals(model) as end,
    ):
        model(tokens)
        (normed,) = end.normed
        device = hooked.weights.W_dec.device
        x, values = flatten_heads(read(seen["x"])).to(device), []
        for pos in positions:
            rows = mask[:, pos]
            score = _scores(model, normed[rows, pos], tokens[rows, pos + 1]).sum()
            (grad,) = torch.autograd.grad(score, seen["y"], retain_graph=True)
            values.append(uniformity(hooked.weights, x[rows, pos], flatten_heads(grad)[rows, pos]))
    return values


def _scores(
    model: HookedModel, normed: Float[torch.Tensor, "row d_model"], targets: torch.Tensor
) -> Float[torch.Tensor, " row"]:
    """The correct token's logit minus the mean logit."""
    out = unembedding(model)
    x = out.read(normed, normed=True)
    correct = out.logits_each(x, targets[:, None].to(x.device))[:, 0]
    return correct - mean_logit(out, x)


@torch.no_grad()
def uniformity(
    coder: Coder,
    x: Float[torch.Tensor, "token d_in"],
    grad: Float[torch.Tensor, "token d_out"],
) -> Float[torch.Tensor, " measured"]:
    """``r_L0`` of each token that has one; a factor on all features of a token cancels."""
    acts = coder.encode_sparse(x)
    toward = grad.to(coder.W_dec.device, torch.float32)[acts.rows]
    size = (acts.values.float() * (coder.W_dec[acts.indices].float() * toward).sum(-1)).abs()
    whole = size.new_zeros(acts.n_tokens).index_add(0, acts.rows, size)
    share = size / whole[acts.rows].clamp(min=torch.finfo(size.dtype).tiny)
    entropy = torch.zeros_like(whole).index_add(0, acts.rows, torch.special.entr(share))
    return (entropy.exp() / acts.offsets.diff())[whole > 0]


def _spread(possible: Bool[torch.Tensor, " next"], n: int) -> list[int]:
    """At most ``n`` of the possible positions, evenly spaced from the first to the last."""
    places = possible.nonzero().flatten()
    if len(places) <= n:
        return places.tolist()
    return places[torch.linspace(0, len(places) - 1, n).round().long().to(places.device)].tolist()
