"""The passes behind ``steer``: what is measured once without the push, and once per strength with it.

1. ``measure``: the prompt is continued, and one forward pass over the whole text gives its logits and
   the activation at the site.
2. ``push``: the prompt is continued with the edit, and one forward pass with it reads the same text.
3. ``compare_next`` compares what both say next at every position of that text.

Cost: a generation and a forward pass each, and four times the vocabulary per position, in tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import SupportsIndex

import torch
from jaxtyping import Bool, Float, Int

from gemmascope_plugin.arguments import feature_ids
from gemmascope_plugin.errors import EmptySelectionError, check_feature
from gemmascope_plugin.models import flatten_heads, special_ids, token_strings
from gemmascope_plugin.models.asked import asked_positions, read_out
from gemmascope_plugin.models.chat import stop_ids
from gemmascope_plugin.models.protocol import HookedModel, check_finite, device_of
from gemmascope_plugin.models.readout import Readout
from gemmascope_plugin.models.tokens import SPECIAL_NAMES, kept_positions
from gemmascope_plugin.splice.edit import Edit
from gemmascope_plugin.splice.edits import Add, Project
from gemmascope_plugin.splice.hooked_sae import HookedCrossLayer, HookedSAE
from gemmascope_plugin.splice.hooked_site import HookedSite
from gemmascope_plugin.splice.sampling import Sampling, SteeringError
from gemmascope_plugin.splice.spliced_model import SplicedModel
from gemmascope_plugin.splice.splicing import splice
from gemmascope_plugin.splice.steering_report import Method, NextTokens, Steering
from gemmascope_plugin.splice.window import Positions, Window


@dataclass(frozen=True, eq=False)
class Baseline:
    """What every strength is compared with, measured once."""

    hooked: HookedSAE | HookedCrossLayer
    """The dictionary, as it was spliced in."""
    site: HookedSite
    feature: int
    prompt: str
    method: Method
    positions: Positions
    sampling: Sampling
    tokens: Int[torch.Tensor, "1 prompt"]
    text: Int[torch.Tensor, "1 pos"]
    """The prompt and the unsteered continuation."""
    readout: Readout
    """What is next at every position."""
    is_kept: Bool[torch.Tensor, " pos"]
    steered: Bool[torch.Tensor, " pos"]
    share: float
    """Length of the push of unit size over the length of the activation, mean over steered tokens."""

    def edit(self, strength: float) -> Edit:
        """The edit that pushes this hard."""
        if self.method == "add":
            return Add(features=self.feature, amount=strength, positions=self.positions)
        return Project(features=self.feature, factor=strength, positions=self.positions)

    def size(self, strength: float) -> float:
        """The push in units of ``share``."""
        return abs(strength) if self.method == "add" else abs(strength - 1)


def measure(
    spliced: SplicedModel,
    feature: SupportsIndex,
    tokens: Int[torch.Tensor, "1 prompt"],
    method: Method,
    positions: Positions,
    sampling: Sampling,
) -> Baseline:
    """Checks what can be checked before anything runs; then continues the prompt without the push."""
    model, site = spliced.model, _one_site(spliced)
    index = feature_ids(feature)
    if not isinstance(index, int):
        raise SteeringError(
            f"feature={feature!r} is not one feature",
            fix="feature=12; one call for each of several",
        )
    check_feature(index, site.d_sae, site.name)
    prompt = _text(model, tokens[0].tolist())
    special = special_ids(model, site.exclude)
    steerable = _steerable(
        site, positions, kept_positions(tokens, special), sampling.max_new_tokens
    )
    ids = _continue(spliced, tokens, sampling)
    text = torch.cat([tokens, tokens.new_tensor([ids])], dim=1)
    readout, (y,) = _read(spliced, text, tokens, sampling, site.hook_out)
    is_kept = kept_positions(text, special)[0]
    steered = steerable[: text.shape[1]] & is_kept
    share = float(_share(y[steered.to(y.device)], site.decoder_from(0)[index], method).mean())
    shared = (spliced.saes[0], site, index, prompt, method, positions, sampling, tokens, text)
    return Baseline(*shared, readout, is_kept.cpu(), steered.cpu(), share)


def push(model: HookedModel, baseline: Baseline, strength: float) -> Steering:
    """Continues the prompt with the push, and reads the unsteered text with it."""
    tokens, text, sampling = baseline.tokens, baseline.text, baseline.sampling
    with splice(model, baseline.hooked, edits=baseline.edit(strength)) as spliced:
        ids = _continue(spliced, tokens, sampling)
        readout, _ = _read(spliced, text, tokens, sampling)
    n_prompt = tokens.shape[1]
    ids_before = text[0, n_prompt:].tolist()
    return Steering(
        prompt=baseline.prompt,
        before=_decode(model, tokens, ids_before),
        after=_decode(model, tokens, ids),
        feature=baseline.feature,
        strength=strength,
        method=baseline.method,
        site=baseline.site.hook_out,
        exclude=baseline.site.exclude,
        sampling=sampling,
        tokens=tuple(token_strings(model, text[0])),
        ids_before=tuple(ids_before),
        ids_after=tuple(ids),
        is_kept=baseline.is_kept,
        steered=baseline.steered,
        next_tokens=compare_next(model, baseline.readout, readout),
        relative_push=baseline.size(strength) * baseline.share,
    )


def _continue(
    spliced: SplicedModel, tokens: Int[torch.Tensor, "1 prompt"], sampling: Sampling
) -> list[int]:
    """Ids of a continuation, without the special tokens at its end."""
    # each step draws from the last position alone
    with sampling.seeded(device_of(spliced.model)), asked_positions(spliced, [-1]):
        out = spliced.generate(tokens, **sampling.options())
    ids = out[0, tokens.shape[1] :].tolist()
    ending = {*stop_ids(spliced.model, sampling.stop)}
    if spliced.model.tokenizer is not None:
        ending |= special_ids(spliced.model, SPECIAL_NAMES)
    while ids and ids[-1] in ending:
        ids.pop()
    return ids


def _read(
    spliced: SplicedModel,
    text: Int[torch.Tensor, "1 pos"],
    tokens: Int[torch.Tensor, "1 prompt"],
    sampling: Sampling,
    *names: str,
) -> tuple[Readout, list[torch.Tensor]]:
    """What is next in a text, and the activations at named hooks, heads flattened."""
    with (
        spliced.continuing(tokens.shape[1], sampling.max_new_tokens),
        read_out(spliced, slice(None)) as readouts,
    ):
        _, cache = spliced.run_with_cache(text, names_filter=names)
    return readouts[0], [flatten_heads(cache[name])[0] for name in names]


def _share(
    y: Float[torch.Tensor, "steered d_out"],
    direction: Float[torch.Tensor, " d_out"],
    method: Method,
) -> Float[torch.Tensor, " steered"]:
    """Length of the push of unit size over that of the activation."""
    y, direction = y.float(), direction.to(y.device).float()
    length, lengths = direction.norm(), y.norm(dim=-1).clamp(min=1e-30)
    push = length if method == "add" else (y @ direction).abs() / length.clamp(min=1e-30)
    return push / lengths


def _decode(model: HookedModel, tokens: Int[torch.Tensor, "1 prompt"], ids: list[int]) -> str:
    """The continuation as it follows the prompt: a word alone may lose the blank before it."""
    prompt = tokens[0].tolist()
    whole, start = _text(model, prompt + ids), _text(model, prompt)
    return whole[len(start) :] if whole.startswith(start) else _text(model, ids)


def _text(model: HookedModel, ids: list[int]) -> str:
    if model.tokenizer is None:
        return " ".join(map(str, ids))
    return model.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def _one_site(spliced: SplicedModel) -> HookedSite:
    sites = list(spliced.sites.values())
    if len(sites) != 1:
        raise SteeringError(
            f"steer() takes a dictionary of one layer, this one has {len(sites)}",
            fix="with splice(model, sae, edits=Add(features=..., amount=..., layer=...)) as spliced: "
            "spliced.generate(prompt)",
        )
    return sites[0]


def _steerable(
    site: HookedSite, positions: Positions, is_kept: Bool[torch.Tensor, "1 prompt"], n_new: int
) -> Bool[torch.Tensor, " horizon"]:
    """Where dictionary and caller want to steer, in the prompt and all that may follow it."""
    n_prompt = is_kept.shape[1]
    possible = torch.nn.functional.pad(is_kept, (0, n_new), value=True)
    window = Window(possible, prompt=n_prompt, horizon=n_prompt + n_new)
    steerable = window.select(positions) & window.select(site.positions)
    if not (steerable & possible).any():
        raise EmptySelectionError(
            "Nothing would be steered: the positions hold excluded tokens only",
            exists=f"exclude={site.exclude!r}",
            fix="other positions, or exclude=() to reach special tokens",
        )
    return steerable[0]


@torch.no_grad()
def compare_next(model: HookedModel, before: Readout, after: Readout) -> NextTokens:
    """Compares what two runs over the same tokens say; a distribution must be finite."""
    best, top_before, lse_before = before.top(1)
    best_after, top_after, lse_after = after.top(1)
    for lse, run in ((lse_before, "before"), (lse_after, "with")):
        check_finite(lse, f"What the model says next, by position, {run} the intervention", model)
    still = after.pick(top_before)[:, 0] - lse_after
    return NextTokens(
        # rounding may leave it a little below 0
        after.divergence_from(before).clamp(min=0).cpu(),
        tuple(token_strings(model, top_before[:, 0])),
        (best[:, 0] - lse_before).exp().cpu(),
        still.exp().cpu(),
        tuple(token_strings(model, top_after[:, 0])),
        (best_after[:, 0] - lse_after).exp().cpu(),
    )
