"""What the model would say if it stopped after each layer: its predictions, and a logit difference.

The logit lens (nostalgebraist 2020):

1. Run the prompt once and keep the residual stream after each layer at the wanted positions.
2. Each goes through the final norm, with its own scale, the unembedding and the soft-cap: the same end as
   the model's own, so the last layer's row is the model's prediction.
3. Of each distribution the ``top_k`` tokens are kept, and probability and rank of tokens asked for.

The accumulated logit difference is read after each half layer at the answer position, before the
soft-cap, with the stream's own scale or with that of its end; then it is the sum of the direct
contributions so far (``direct_logits.py``).

Cost: one forward pass, of the lens up to the last of the layers; one unembedding per layer and position,
two where tokens are asked for, a tile of logits at a time; a product per half layer and prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int

from gemmascope_plugin.causes.effects import Effects
from gemmascope_plugin.causes.exact.contributions import BATCH, AnswerRun, Totals, bind_logit_diff
from gemmascope_plugin.causes.metric import Answers, TokenSets, answer_list
from gemmascope_plugin.causes.metrics import LogitDiff
from gemmascope_plugin.causes.task import Prompts, Task
from gemmascope_plugin.errors import EmptySelectionError, check_choice
from gemmascope_plugin.models import token_strings
from gemmascope_plugin.models.anatomy import Anatomy
from gemmascope_plugin.models.gate import gate
from gemmascope_plugin.models.points import n_layers
from gemmascope_plugin.models.prompts import PromptLike, one_prompt
from gemmascope_plugin.models.protocol import HookedModel, check_finite, check_model
from gemmascope_plugin.models.record import record
from gemmascope_plugin.models.unembed import Unembedding, top_logits

Scale = Literal["own", "final"]


@gate(model=check_model)
@torch.no_grad()
def logit_lens(
    model: HookedModel,
    prompt: PromptLike,
    *,
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    top_k: int = 5,
    tokens: Answers = (),
) -> Effects:
    """The model's predictions as they stand after each layer.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``.
        prompt: Text or token ids ``[pos]`` or ``[1, pos]``.
        layers: Which; negative ones count from the last. None for all.
        positions: Which; negative ones count from the end of the prompt. None for all.
        top_k: Tokens kept of each distribution.
        tokens: Words or ids whose probability and rank are kept as well.

    Returns:
        Probabilities after the final soft-cap, along ``layer``, ``pos`` and ``token``: the most likely
        ones, ``#1`` to ``#k``, and the tokens asked for. ``columns`` has their ids and ranks; 1 is the
        most likely token. ``lens.at(layer=3, pos=-1).to_frame()`` lists a prediction,
        ``lens.at(token=" Paris").plot()`` shows where one comes up.

    Raises:
        TaskError: Several prompts.
        EmptySelectionError: A layer or position that does not exist, or none at all.
        UnknownNameError: A word that is not a single token.

    Example:
        >>> suite = gs.tiny()
        >>> lens = gs.logit_lens(suite.model, "today the keys near the cabinet", top_k=2)
        >>> lens
        Effects(logit lens, 4 layer x 7 pos x 2 token, after layer 3 at position 6: 'are' 1.00,
          'containing' 0.00)
        >>> lens.top(2).round(2)
           layer  pos    at token  id  rank  probability
        0      3    4  near   the  12     1          1.0
        1      0    5   the   the  12     1          1.0
    """
    ids = one_prompt(model, prompt, "logit_lens(model, prompt) for each")
    anatomy = Anatomy(model)
    rows = _chosen("layer", layers, anatomy.n_layers)
    columns = _chosen("position", positions, ids.shape[1])
    if not 0 < top_k <= model.cfg.d_vocab:
        raise EmptySelectionError(
            f"top_k={top_k} keeps no prediction", exists=f"1 to {model.cfg.d_vocab} tokens"
        )
    words = answer_list("tokens", tokens)
    asked_ids = tuple(TokenSets.of(model, words).ids[:, 0].tolist()) if words else ()
    hooks = [f"blocks.{layer}.hook_resid_post" for layer in rows]
    cache = record(model, ids, hooks)
    streams = torch.stack([cache.pop(hook)[0, list(columns)] for hook in hooks])
    out = anatomy.unembedding()
    fields = _predictions(out, out.read(streams).flatten(0, 1), top_k, asked_ids)
    best, p, asked_p, ranks = (field.unflatten(0, streams.shape[:2]).cpu() for field in fields)
    values = torch.cat([p, asked_p], -1)
    check_finite(values, "The probability by layer, position and token", model)
    used = torch.cat([best.flatten(), torch.tensor(asked_ids, dtype=best.dtype)]).unique()
    names = dict(zip(used.tolist(), token_strings(model, used), strict=True))
    texts = [names[i] for i in asked_ids]
    titles = [f"{names[i]} ({i})" if texts.count(names[i]) > 1 else names[i] for i in asked_ids]
    metadata = {
        "component": "stream",
        "method": "logit lens",
        "top_k": top_k,
        "asked": tuple(titles),
        "texts": {str(i): text for i, text in names.items()},
        "tokens": token_strings(model, ids[0]),
    }
    labels = {
        "layer": rows,
        "pos": columns,
        "token": (*(f"#{rank + 1}" for rank in range(top_k)), *titles),
    }
    return Effects(values, tuple(labels), labels, metadata, None, _columns(best, ranks, asked_ids))


@gate(model=check_model)
@torch.no_grad()
def accumulated_logit_diff(
    model: HookedModel,
    prompts: Task | Prompts,
    *,
    metric: LogitDiff | None = None,
    scale: Scale = "own",
    batch_size: int = BATCH,
) -> Effects:
    """The logit difference of the residual stream after each half layer, before the final soft-cap.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``.
        prompts: A task, whose clean prompts are run, or prompts of any lengths.
        metric: ``logit_diff(answer, wrong)``; the task's own if None. Sets count with their mean.
        scale: ``own`` normalises each stream by itself, as the logit lens does. ``final`` uses the scale
            of the end of the stream, so that what lies between two entries is the direct contribution of
            the components between them.
        batch_size: Prompts in one forward pass.

    Returns:
        Effects along ``layer`` and ``stream``: ``pre``, ``mid`` (after attention), ``post``.

    Raises:
        TaskError: The metric is not a logit difference.
        UnknownNameError: An unknown ``scale``.
    """
    check_choice("scale", scale, get_args(Scale))
    bound = bind_logit_diff(model, prompts, metric)
    layers, points = tuple(range(n_layers(model))), ("pre", "mid", "post")
    names = [f"blocks.{layer}.hook_resid_{point}" for layer in layers for point in points]
    sums, curves = Totals(), []
    for part in bound.parts(batch_size):
        run = AnswerRun.of(model, part, names)
        ln = run.anatomy.ln_final
        streams = (run.at[name] for name in names)
        normed = [ln(x) if scale == "own" else ln.frozen(run.end, x) for x in streams]
        values = torch.stack([(x * run.question).sum(-1) + run.bias for x in normed])
        curves.append(values.cpu())
        sums.add(run, values[-1])
    each = torch.cat(curves, -1).unflatten(0, (len(layers), len(points)))
    method = "logit lens" if scale == "own" else "final norm frozen"
    metadata = sums.metadata(model, bound) | {"component": "stream", "method": method}
    metadata |= {"form": "accumulated", "exclude": ()}
    labels = {"layer": layers, "stream": points}
    return Effects(each.mean(-1), ("layer", "stream"), labels, metadata, each)


def _columns(
    best: Int[torch.Tensor, "layer pos k"],
    ranks: Int[torch.Tensor, "layer pos asked"],
    asked_ids: Sequence[int],
) -> dict[str, Int[torch.Tensor, "layer pos token"]]:
    """Id and rank of each token, whether it was asked for, and the most likely id beside it."""
    n_asked, top_k = len(asked_ids), best.shape[-1]
    ids = torch.cat([best, torch.tensor(asked_ids, dtype=best.dtype).expand_as(ranks)], -1)
    orders = torch.arange(1, top_k + 1).expand_as(best)
    is_asked = torch.arange(top_k + n_asked) >= top_k
    return {
        "id": ids,
        "rank": torch.cat([orders, ranks], -1),
        "asked": is_asked.long().expand_as(ids).contiguous(),
        "best": best[..., :1].expand_as(ids).contiguous(),
    }


def _predictions(
    out: Unembedding, x: Float[torch.Tensor, "row d_model"], top_k: int, asked_ids: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Best ids, their probabilities, probabilities and ranks of the tokens asked for."""
    best, ids, lse = top_logits(out, x, top_k)
    index = torch.tensor(asked_ids, dtype=torch.long, device=x.device)
    logits = out.logits(x, index)
    p, asked_p = ((some - lse[:, None]).exp() for some in (best, logits))
    return ids, p, asked_p, _ranks(out, x, index, logits)


def _ranks(
    out: Unembedding,
    x: Float[torch.Tensor, "row d_model"],
    index: Int[torch.Tensor, " asked"],
    logits: Float[torch.Tensor, "row asked"],
) -> Int[torch.Tensor, "row asked"]:
    """One more than the number of other words with a larger logit."""
    ranks = torch.ones_like(logits, dtype=torch.long)
    if not len(index):
        return ranks
    for part, words, _, tile in out.each_tile(x):
        for i, word in enumerate(index.tolist()):
            larger = tile > logits[part, i, None]
            if words.start <= word < words.stop:
                larger[:, word - words.start] = False
            ranks[part, i] += larger.sum(-1)
    return ranks


def _chosen(noun: str, indices: Sequence[int] | None, n: int) -> tuple[int, ...]:
    """Indices from the start."""
    chosen = range(n) if indices is None else indices
    wrong = [i for i in chosen if not -n <= i < n]
    if wrong or not len(chosen):
        problem = f"There is no {noun} {wrong[0]}" if wrong else f"No {noun} is chosen"
        raise EmptySelectionError(problem, exists=f"{noun}s 0 to {n - 1}, or {-n} to -1")
    return tuple(i % n for i in chosen)
