"""Logit lens: what the model would predict if it stopped after each layer (nostalgebraist 2020).

1. Run the prompt once and keep the residual stream after each layer at the wanted positions.
2. Each goes through the final norm, with its own scale, the unembedding and the soft-cap: the same end as
   the model's own, so the last layer's row is the model's prediction.
3. Of each distribution the ``top_k`` tokens are kept, and probability and rank of tokens asked for.

Cost: one forward pass up to the last of the layers, and one unembedding per layer and position, two where
tokens are asked for; a tile of logits at a time, however many layers and positions there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int

import gemmascope_plugin.figures as figures
from gemmascope_plugin.causes.answer_tokens import Answers, TokenSets, answer_list
from gemmascope_plugin.errors import EmptySelectionError, UnknownNameError, shorten
from gemmascope_plugin.figures.theme import plain, short_label
from gemmascope_plugin.models import token_strings
from gemmascope_plugin.models.anatomy import Anatomy
from gemmascope_plugin.models.check_model import check_model
from gemmascope_plugin.models.finite import check_finite
from gemmascope_plugin.models.gate import gate
from gemmascope_plugin.models.prompts import PromptLike, one_prompt
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.models.record import record
from gemmascope_plugin.models.unembed import Unembedding, top_logits


@dataclass(frozen=True, eq=False, repr=False)
class LogitLens:
    """Predictions after each layer at each position."""

    layers: tuple[int, ...]
    positions: tuple[int, ...]
    prompt: tuple[str, ...]
    """The prompt's token at each of the positions."""
    ids: Int[torch.Tensor, "layer pos k"]
    """The most likely next tokens, most likely first."""
    probabilities: Float[torch.Tensor, "layer pos k"]
    """Theirs."""
    asked: tuple[int, ...]
    """Tokens that were asked for."""
    asked_probabilities: Float[torch.Tensor, "layer pos asked"]
    """Theirs."""
    ranks: Int[torch.Tensor, "layer pos asked"]
    """Their ranks; 1 is the most likely token."""
    names: Mapping[int, str]
    """Text of every token id above."""

    def top(self, layer: int, position: int = -1) -> list[tuple[str, float]]:
        """The most likely next tokens after a layer, with their probabilities.

        Args:
            layer: The layer.
            position: Position in the prompt; negative ones count from the end of those kept.

        Raises:
            UnknownNameError: A layer or position that was not kept.
        """
        row, column = self._place(layer, position)
        ids, p = self.ids[row, column].tolist(), self.probabilities[row, column].tolist()
        return [(self.names[i], value) for i, value in zip(ids, p, strict=True)]

    def to_frame(self) -> Any:
        """A DataFrame, one row per layer, position and token: ``token, id, rank, probability``."""
        import pandas as pd

        return pd.DataFrame(self._rows())

    def plot(self, token: int | str | None = None) -> Any:
        """A plotly heatmap of layers and positions that names the most likely token of each.

        Args:
            token: Colour by the probability of this token, one of those asked for; None for that of the
                most likely one.

        Raises:
            UnknownNameError: The token was not asked for.
        """
        values, what = self.probabilities[..., 0], "probability of the most likely token"
        if token is not None:
            index = self._asked_index(token)
            values = self.asked_probabilities[..., index]
            what = f"probability of {self.names[self.asked[index]]!r}"
        figure = figures.heatmap(
            values.cpu().numpy(),
            x=list(self.prompt),
            y=list(self.layers),
            x_title="token",
            y_title="layer",
            title=f"logit lens: {what}",
            color_title="probability",
            symmetric=False,
        )
        best = [
            [plain(short_label(self.names[i])) for i in row] for row in self.ids[..., 0].tolist()
        ]
        return figure.update_traces(text=best, texttemplate="%{text}")

    def __repr__(self) -> str:
        last = ", ".join(f"{text!r} {p:.2f}" for text, p in self.top(self.layers[-1])[:3])
        return (
            f"LogitLens({len(self.layers)} layers x {len(self.positions)} positions, "
            f"top {self.ids.shape[-1]}, after layer {self.layers[-1]} at the end: {last})"
        )

    def _rows(self) -> Iterator[dict[str, Any]]:
        for row, layer in enumerate(self.layers):
            for column, pos in enumerate(self.positions):
                place = {"layer": layer, "pos": pos, "at": self.prompt[column]}
                ids = self.ids[row, column].tolist()
                p = self.probabilities[row, column].tolist()
                ranks = list(range(1, len(ids) + 1))
                asked_p = self.asked_probabilities[row, column].tolist()
                asked_ranks = self.ranks[row, column].tolist()
                for j, i in enumerate(self.asked):
                    if i not in ids:
                        ids, p = [*ids, i], [*p, asked_p[j]]
                        ranks = [*ranks, asked_ranks[j]]
                for i, rank, value in zip(ids, ranks, p, strict=True):
                    token = {"token": self.names[i], "id": i, "rank": rank, "probability": value}
                    yield {**place, **token}

    def _place(self, layer: int, position: int) -> tuple[int, int]:
        if position < 0 and -position <= len(self.positions):
            position = self.positions[position]
        if layer not in self.layers or position not in self.positions:
            raise UnknownNameError(
                f"Layer {layer} at position {position} was not kept",
                exists=f"layers {shorten(self.layers)}, positions {shorten(self.positions)}",
            )
        return self.layers.index(layer), self.positions.index(position)

    def _asked_index(self, token: int | str) -> int:
        texts = [self.names[i] for i in self.asked]
        places = [
            place
            for place, (i, text) in enumerate(zip(self.asked, texts, strict=True))
            if token in (i, text, text.strip())
        ]
        if not places:
            raise UnknownNameError(
                f"The token {token!r} was not asked for",
                exists=shorten(texts) or "none",
                fix=f"logit_lens(..., tokens=[{token!r}])",
            )
        return places[0]


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
) -> LogitLens:
    """The model's predictions as they stand after each layer.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``.
        prompt: Text or token ids ``[pos]`` or ``[1, pos]``.
        layers: Which; negative ones count from the last. None for all.
        positions: Which; negative ones count from the end of the prompt. None for all.
        top_k: Tokens kept of each distribution.
        tokens: Words or ids whose probability and rank are kept as well.

    Returns:
        Probabilities after the final soft-cap, ``[layer, pos, ...]``.

    Raises:
        TaskError: Several prompts.
        EmptySelectionError: A layer or position that does not exist, or none at all.
        UnknownNameError: A word that is not a single token.
    """
    ids = one_prompt(model, prompt, "logit_lens(model, prompt) for each")
    anatomy = Anatomy(model)
    kept = _chosen("layer", layers, anatomy.n_layers)
    at = _chosen("position", positions, ids.shape[1])
    if not 0 < top_k <= model.cfg.d_vocab:
        raise EmptySelectionError(
            f"top_k={top_k} keeps no prediction", exists=f"1 to {model.cfg.d_vocab} tokens"
        )
    words = answer_list("tokens", tokens)
    asked = tuple(TokenSets.of(model, words).ids[:, 0].tolist()) if words else ()
    hooks = [f"blocks.{layer}.hook_resid_post" for layer in kept]
    cache = record(model, ids, hooks)
    streams = torch.stack([cache.pop(hook)[0, list(at)] for hook in hooks])
    out = anatomy.unembedding()
    fields = _predictions(out, out.read(streams).flatten(0, 1), top_k, asked)
    best, p, asked_p, ranks = (field.unflatten(0, streams.shape[:2]).cpu() for field in fields)
    check_finite(p, "The probability by layer, position and rank", model)
    used = torch.cat([best.flatten(), torch.tensor(asked, dtype=best.dtype)]).unique()
    names = dict(zip(used.tolist(), token_strings(model, used), strict=True))
    texts = tuple(token_strings(model, ids[0, list(at)]))
    return LogitLens(kept, at, texts, best, p, asked, asked_p, ranks, names)


def _predictions(
    out: Unembedding, x: Float[torch.Tensor, "row d_model"], top_k: int, asked: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Best ids, their probabilities, probabilities and ranks of the tokens asked for."""
    best, ids, lse = top_logits(out, x, top_k)
    index = torch.tensor(asked, dtype=torch.long, device=x.device)
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


def _chosen(what: str, wanted: Sequence[int] | None, n: int) -> tuple[int, ...]:
    """Indices from the start.

    Raises:
        EmptySelectionError: One that does not exist, or none.
    """
    given = range(n) if wanted is None else wanted
    wrong = [i for i in given if not -n <= i < n]
    if wrong or not len(given):
        problem = f"There is no {what} {wrong[0]}" if wrong else f"No {what} is chosen"
        raise EmptySelectionError(problem, exists=f"{what}s 0 to {n - 1}, or {-n} to -1")
    return tuple(i % n for i in given)
