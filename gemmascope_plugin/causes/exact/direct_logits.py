"""Direct logit attribution: what each component adds to the logit difference, by itself, without others.

1. Run the prompts once and keep each activation at the answer position.
2. Freeze every norm at the scale it has in this run. The end of the residual stream is then a sum over
   components, and so is the logit difference **before** the final soft-cap (``contributions.py``).
3. With dictionaries, split what they decompose into features. A dictionary says of a tensor ``y`` at its
   output hook ``y = s * sum_f a_f W_dec[f] + bias + error``; with the readout ``n`` of that hook feature
   ``f`` adds ``s * a_f <W_dec[f], n>``:

   * at ``hook_mlp_out`` (SAEs and transcoders) and ``hook_attn_out``, ``n`` is that of the stream; the
     MLP or the attention layer is what is split;
   * at ``attn.hook_z``, ``n`` is pulled back through ``W_O`` and the frozen norm; the heads are split;
   * at ``hook_embed`` and in the stream (``hook_resid_pre``, ``mid``, ``post``) everything written up to
     there is split, and later components stay as they are;
   * of a cross-layer dictionary a feature's parts at all its outputs are added up.

   ``bias`` is ``b_dec``, plus what an affine skip or a token's mean writes. At excluded tokens the
   dictionary does not work, and all of ``y`` is in the error.
4. Check the sum. ``metadata["residual"]`` is the largest gap of any prompt.

Where Gemma has a norm after attention, a head's share of what its layer writes is
``gain * r_h / s``. The head's result ``r_h`` itself, which ``stack_head_results`` of TransformerLens
gives, adds up to something else.

A direct effect says what is read off now. What a component does through later ones is not in it, and what
later ones would do without it (self-repair) neither; ``activation_patching`` has both.

The soft-cap is not linear. ``metadata["capped"]`` is the difference after it and
``metadata["cap_slope"]`` the ratio of the two, the cap's average slope between the two logits: a
contribution of 1 is about that much of the model's own logit difference.

Cost: one forward pass over the prompts, per component a product with one vector per prompt; one encode of
the answer positions per dictionary site, and the decoder rows of the features active there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int

from gemmascope_plugin.causes.components import (
    excluded,
    is_stream,
    is_z,
    layer_of,
    patchable,
    sites_in,
    stream_time,
)
from gemmascope_plugin.causes.effects import Effects
from gemmascope_plugin.causes.exact.contributions import (
    BATCH,
    AnswerRun,
    Contribution,
    Totals,
    bind_logit_diff,
    component_hooks,
    components,
    heads,
)
from gemmascope_plugin.causes.metrics import LogitDiff
from gemmascope_plugin.causes.task import Prompts, Task
from gemmascope_plugin.errors import ModelError, UnknownNameError, check_choice
from gemmascope_plugin.graphs.node import FeatureId
from gemmascope_plugin.models.gate import gate
from gemmascope_plugin.models.points import Reading, flatten_heads, n_layers, reading
from gemmascope_plugin.models.protocol import (
    HookedModel,
    check_model,
    wide,
)
from gemmascope_plugin.models.tokens import kept_positions, special_ids
from gemmascope_plugin.saes import SparseActs
from gemmascope_plugin.splice.hooked_sae import Saes, check_saes
from gemmascope_plugin.splice.hooked_site import HookedSite
from gemmascope_plugin.splice.window import Window

Parts = Literal["component", "head", "feature"]


@gate(model=check_model, saes=check_saes)
@torch.no_grad()
def direct_logit_attribution(
    model: HookedModel,
    prompts: Task | Prompts,
    *,
    by: Parts = "component",
    metric: LogitDiff | None = None,
    saes: Saes = None,
    batch_size: int = BATCH,
) -> Effects:
    """What each component adds to ``logit(answer) - logit(wrong)``, before the final soft-cap.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``.
        prompts: A task, whose clean prompts are run, or prompts of any lengths.
        by: ``component``: embedding, attention layers, MLPs. ``head``: attention by head. ``feature``:
            by head, and whatever the dictionaries decompose by feature, ``error`` and ``b_dec``: MLPs,
            heads (dictionaries at ``hook_z``, through ``W_O`` and the frozen norm), or, for a dictionary
            of the stream, everything written before it.
        metric: ``logit_diff(answer, wrong)``; the task's own if None. Of sets of answers the *mean* logit
            counts here, for the log-sum-exp of the metric is not a sum over components.
        saes: Dictionaries, for ``by="feature"``.
        batch_size: Prompts in one forward pass.

    Returns:
        Effects along ``component``, averaged over prompts; they sum to ``metadata["metric_clean"]``, the
        difference before the soft-cap, and ``share`` is each one's part of it. Features that are not
        active at the answer position are left out. Biases (``b_O``, ``b_U``) appear where they are not
        zero.

    Raises:
        TaskError: The metric is not a logit difference.
        UnknownNameError: An unknown ``by``, or dictionaries without ``by="feature"`` or the reverse.
        ModelError: Two dictionaries decompose the same part of the stream.

    Example:
        >>> suite = gs.tiny()
        >>> task = suite.task("agreement", n=8)
        >>> gs.direct_logit_attribution(suite.model, task, by="head").top(3).round(2)
          component  effect  share
        0      MLP3    7.57   0.70
        1      L2H3    2.40   0.22
        2      MLP2    1.85   0.17
    """
    check_choice("by", by, get_args(Parts))
    if saes is not None and by != "feature":
        raise UnknownNameError(f"Dictionaries have no part in by={by!r}", fix='by="feature"')
    bound = bind_logit_diff(model, prompts, metric)
    hooks, sums = component_hooks(n_layers(model)), Totals()
    pieces: dict[str, torch.Tensor] = {}
    with patchable(model, "feature", saes) if by == "feature" else nullcontext() as spliced:
        for chunk in bound.parts(batch_size):
            more = [] if spliced is None else site_hooks(model, spliced)
            run = AnswerRun.of(model, chunk, [*hooks, *more])
            parts = components(run) if by == "component" else heads(run)
            if spliced is not None:
                parts = split(parts, run, spliced)
            _collect(pieces, parts, sums.n_prompts, len(bound))
            sums.add(run, sum((piece.value for piece in parts), torch.zeros_like(run.bias)))
        exclude = () if spliced is None else excluded(sites_in(spliced).values())
    each = torch.stack(list(pieces.values()))
    metadata = {**sums.metadata(model, bound), "component": by, "exclude": exclude}
    metadata |= {"method": "direct logit attribution", "form": "norms frozen"}
    labels = {"component": tuple(pieces)}
    return Effects(each.mean(-1), ("component",), labels, metadata, each)


def _collect(
    pieces: dict[str, torch.Tensor], parts: Iterable[Contribution], start: int, n: int
) -> None:
    """Puts contributions in their prompts' places; those of a feature with several outputs add up."""
    for piece in parts:
        value = piece.value.cpu()
        place = pieces.setdefault(piece.label, value.new_zeros(n))
        place[start : start + len(value)] += value


def site_hooks(model: HookedModel, spliced: Any) -> list[str]:
    """What :func:`split` reads."""
    for site in spliced.sites.values():
        stream_time(site.hook_out)
    readings = [reading(model, site.hook_in) for site in spliced.sites.values()]
    outputs = [site.hook_out for site in spliced.sites.values()]
    return [*(read.hook for read in readings), *outputs]


def split(parts: list[Contribution], run: AnswerRun, spliced: Any) -> list[Contribution]:
    """The parts, with those that dictionaries decompose replaced by features, error and bias."""
    where = {
        id(site): (dictionary, position)
        for dictionary in spliced.saes
        for position, site in enumerate(dictionary.sites)
    }
    acts = {id(site): _active(run, site) for site in spliced.sites.values()}
    for site in sorted(spliced.sites.values(), key=lambda site: _order(site.hook_out)):
        covered = [part for part in parts if _covers(site.hook_out, part)]
        double = [part.hook for part in covered if part.of_dictionary]
        if double:
            raise ModelError(
                f"The dictionaries at {double[0]} and {site.hook_out} decompose the same part of the "
                "stream, so their features would be counted twice",
                fix="one of the two; a dictionary of the stream decomposes all that lies before it",
            )
        dictionary, position = where[id(site)]
        sources = [(source, *acts[id(source)]) for source in dictionary.sites[: position + 1]]
        place = parts.index(covered[0])
        rest = [part for part in parts if not _covers(site.hook_out, part)]
        parts = [*rest[:place], *_site_parts(run, site, sources), *rest[place:]]
    return parts


def _active(run: AnswerRun, site: HookedSite) -> tuple[SparseActs, torch.Tensor, torch.Tensor]:
    """Features at the answer positions, the tensor they were read from, and where the site works."""
    model, weights = run.anatomy.model, site.weights
    read: Reading = reading(model, site.hook_in)
    x = _flat(read(run.at[read.hook])).to(weights.W_enc.device)
    keep = _kept(run, site).to(x.device)
    return weights.encode_sparse(x, keep=keep, two_stage=site.two_stage), x, keep


def _kept(run: AnswerRun, site: HookedSite) -> Bool[torch.Tensor, " prompt"]:
    tokens, at = run.bound.clean, run.bound.metric.at
    assert at is not None
    keep = kept_positions(tokens, special_ids(run.anatomy.model, site.exclude))
    if site.positions is not None:
        keep = keep & Window(keep).select(site.positions)
    return keep.gather(1, at[:, None])[:, 0]


def _site_parts(
    run: AnswerRun,
    site: HookedSite,
    sources: Sequence[tuple[HookedSite, SparseActs, torch.Tensor, torch.Tensor]],
) -> list[Contribution]:
    """Features, error and bias of what is written at one site."""
    when, readout = stream_time(site.hook_out), _readout(run, site.hook_out)
    parts: list[Contribution] = []

    def add(label: str, value: torch.Tensor) -> None:
        parts.append(Contribution(label, site.hook_out, when, value, of_dictionary=True))

    total = (_flat(run.at[site.hook_out]) * readout).sum(-1)
    for position, (source, acts, x, _) in enumerate(sources):
        index = acts.indices.unique()
        values = _of_features(source, site, position, acts, x, index, readout)
        for feature, value in zip(index.tolist(), values.unbind(-1), strict=True):
            add(str(FeatureId(source.name, feature)), value)
    _, _, x, keep = sources[-1]
    bias = wide(site.weights.bias(x)).to(readout.device).expand_as(readout)
    from_bias = (bias * readout).sum(-1) * keep.to(readout.device)
    explained = sum((part.value for part in parts), from_bias)
    add(f"{site.name} error", total - explained)
    add(f"{site.name} b_dec", from_bias)
    return parts


def _of_features(
    source: HookedSite,
    site: HookedSite,
    position: int,
    acts: SparseActs,
    x: torch.Tensor,
    index: Int[torch.Tensor, " k"],
    readout: Float[torch.Tensor, "prompt d_out"],
) -> Float[torch.Tensor, "prompt k"]:
    """``s * a_f <W_dec[f], n>``."""
    W_dec = site.decoder_from(position)
    rows = wide(W_dec[index.to(W_dec.device)]).to(readout.device)
    amounts, scale = acts.columns(index), source.weights.scale(x)
    if scale is not None:
        amounts = amounts * scale
    return wide(amounts).to(readout.device) * (readout @ rows.to(readout.dtype).T)


def _readout(run: AnswerRun, hook: str) -> Float[torch.Tensor, "prompt d_out"]:
    """The readout of what is written at a hook."""
    return run.readout_of_z(layer_of(hook)).flatten(1) if is_z(hook) else run.readout


def _order(hook: str) -> tuple[int, bool, bool]:
    """By time, and at one time what contains the other last."""
    return stream_time(hook), hook.endswith("hook_attn_out"), is_stream(hook)


def _covers(hook: str, part: Contribution) -> bool:
    """Whether what is at a hook contains a part."""
    if is_stream(hook):
        return part.stream_time <= stream_time(hook)
    if hook.endswith("hook_attn_out"):
        return part.stream_time == stream_time(hook)
    return part.hook == hook


def _flat(x: torch.Tensor) -> Float[torch.Tensor, "prompt d"]:
    return flatten_heads(x[:, None])[:, 0] if x.ndim == 3 else x
