"""Which features are active on a text, how well the dictionaries fit, and the words that features write.

1. One forward pass with the dictionaries spliced in, error kept, so that every site sees the real
   model's activations.
2. Per site: active features of every token, mean L0, and the share of variance explained
   ``1 - sum |y - y_hat|^2 / sum |y - mean(y)|^2`` over the text's own tokens. Excluded tokens (BOS, EOS,
   PAD by default) have no features and count in no figure.
3. ``top_words``: ``(direction * gain) @ W_U``, the gain being that of the last norm, is what a direction
   of the residual stream adds to each logit up to a factor, if nothing reads it on the way; the words
   with the largest and smallest sums are those that it speaks for and against.

Cost: one forward pass, one encode and one decode per site; for words ``2 * directions * d_model *
d_vocab`` operations, in chunks of ``CHUNK`` numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from typing import Any, NamedTuple, overload

import torch
from jaxtyping import Float, Int

import gemmascope_plugin.figures as figures
from gemmascope_plugin.errors import EmptySelectionError, check_choice, check_feature
from gemmascope_plugin.models import special_ids
from gemmascope_plugin.models.anatomy import Anatomy
from gemmascope_plugin.models.asked import no_logits
from gemmascope_plugin.models.gate import gate
from gemmascope_plugin.models.prompts import PromptLike, read_prompts
from gemmascope_plugin.models.protocol import HookedModel, check_model
from gemmascope_plugin.models.tokens import kept_positions, token_strings
from gemmascope_plugin.splice import splice
from gemmascope_plugin.splice.hooked_sae import Saes, as_list, check_saes

Exclude = str | int | Sequence[str | int]
_PARTS = ("hook_sae_acts_post", "hook_sae_recons", "hook_sae_error")


@dataclass(frozen=True)
class SiteFit:
    """How one dictionary fits the text."""

    l0: float
    """Mean number of active features per token."""
    variance_explained: float
    """1 = perfect; may be negative."""


@dataclass(frozen=True, eq=False)
class Features:
    """Active features of one text."""

    tokens: tuple[str, ...]
    acts: Mapping[str, Float[torch.Tensor, "pos d_sae"]]
    """Output hook to feature activations; all zero at excluded tokens."""
    fits: Mapping[str, SiteFit]
    exclude: tuple[str | int, ...]
    top_k: int
    """Features per token in tables and pages."""

    @cached_property
    def frame(self) -> Any:
        """A DataFrame, one row per token, site and active feature, strongest ``top_k`` of each token."""
        import pandas as pd

        rows = []
        for site, acts in self.acts.items():
            strongest = acts.topk(min(self.top_k, acts.shape[1]), dim=-1)
            pairs = zip(strongest.values.tolist(), strongest.indices.tolist(), strict=True)
            for pos, (values, indices) in enumerate(pairs):
                rows += [
                    (pos, self.tokens[pos], site, index, value)
                    for value, index in zip(values, indices, strict=True)
                    if value > 0
                ]
        return pd.DataFrame(rows, columns=["pos", "token", "site", "feature", "activation"])

    def to_frame(self) -> Any:
        """The same as :attr:`frame`."""
        return self.frame

    def summary(self) -> Any:
        """A DataFrame, one row per site: ``l0`` and ``variance_explained``."""
        import pandas as pd

        rows = [(site, fit.l0, fit.variance_explained) for site, fit in self.fits.items()]
        return pd.DataFrame(rows, columns=["site", "l0", "variance_explained"])

    def top(self, n: int = 10, *, site: str | None = None) -> Any:
        """The ``n`` features with the largest activation anywhere in the text, one row each.

        Raises:
            UnknownNameError: No such site.
        """
        frame = self.frame
        if site is not None:
            check_choice("site", site, self.acts)
            frame = frame[frame["site"] == site]
        best = frame.sort_values("activation", ascending=False, kind="stable")
        return best.drop_duplicates(["site", "feature"]).head(n).reset_index(drop=True)

    def activations(self, site: str, feature: int) -> list[float]:
        """One feature's activation per token.

        Raises:
            UnknownNameError: No such site.
            FeatureIndexError: No such feature.
        """
        check_choice("site", site, self.acts)
        check_feature(feature, self.acts[site].shape[1], site)
        return self.acts[site][:, feature].tolist()

    def to_html(self, labels: Mapping[tuple[str, int], str] | None = None, n: int = 8) -> str:
        """An HTML fragment: the text, coloured once per strongest feature.

        Args:
            labels: Description of a ``(site, feature)``.
            n: Number of features.
        """
        rows = []
        for row in self.top(n).itertuples():
            name = f"{row.site}/{row.feature}"
            label = (labels or {}).get((row.site, row.feature))
            rows.append(
                (f"{name}: {label}" if label else name, self.activations(row.site, row.feature))
            )
        note = escape(f"excluded tokens: {', '.join(map(str, self.exclude)) or 'none'}")
        return figures.token_rows_html(list(self.tokens), rows) + f"<p><small>{note}</small></p>"

    def _repr_html_(self) -> str:
        return self.to_html()

    def __repr__(self) -> str:
        fits = "; ".join(
            f"{site}: L0 {fit.l0:.1f}, variance explained {fit.variance_explained:.3f}"
            for site, fit in self.fits.items()
        )
        return f"Features({len(self.tokens)} tokens, excluded {self.exclude}, {fits})"


@overload
def analyze(
    model: HookedModel, saes: Saes, prompts: str, *, top_k: int = ..., exclude: Exclude = ...
) -> Features: ...


@overload
def analyze(
    model: HookedModel, saes: Saes, prompts: PromptLike, *, top_k: int = ..., exclude: Exclude = ...
) -> Any: ...


@gate(model=check_model, saes=check_saes)
@torch.no_grad()
def analyze(
    model: HookedModel,
    saes: Saes,
    prompts: PromptLike,
    *,
    top_k: int = 5,
    exclude: Exclude = ("bos", "eos", "pad"),
) -> Any:
    """Active features per token and site.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``.
        saes: Dictionaries; options of a :class:`HookedSAE` do not count here.
        prompts: One prompt: text, token ids, or a conversation; or several of any lengths.
        top_k: Features per token in tables.
        exclude: Special tokens to leave out.

    Returns:
        The :class:`Features` of the prompt; a list of them for several.

    Raises:
        EmptySelectionError: An empty prompt, or one of excluded tokens only.
        UnknownNameError: An unknown special token.

    Example:
        >>> suite = gs.tiny()
        >>> features = gs.analyze(suite.model, suite.load("res", 1), "today the keys near the cabinet")
        >>> features
        Features(7 tokens, excluded ('bos', 'eos', 'pad'), blocks.1.hook_resid_post: L0 11.8,
          variance explained 0.985)
        >>> features.to_frame().head(3).round(2)
           pos  token                      site  feature  activation
        0    1  today  blocks.1.hook_resid_post      497        4.32
        1    1  today  blocks.1.hook_resid_post       22        4.08
        2    1  today  blocks.1.hook_resid_post      388        3.99
    """
    rows = [row[None] for row in read_prompts(model, prompts).rows()]
    exclude = (exclude,) if isinstance(exclude, (str, int)) else tuple(exclude)
    features = [_analyze(model, saes, tokens, top_k, exclude) for tokens in rows]
    return features[0] if len(features) == 1 else features


def _analyze(
    model: HookedModel,
    saes: Saes,
    tokens: Int[torch.Tensor, "1 pos"],
    top_k: int,
    exclude: tuple[str | int, ...],
) -> Features:
    """The features of one prompt."""
    keep = kept_positions(tokens, special_ids(model, exclude))[0]
    plain = [getattr(sae, "sae", sae) for sae in as_list(saes)]
    with splice(model, plain, exclude=exclude) as spliced:
        sites = list(spliced.sites)
        names = [f"{site}.{part}" for site in sites for part in _PARTS]
        with no_logits(spliced):
            _, cache = spliced.run_with_cache(tokens, names_filter=names)
        fits = {site: _fit(site, cache, keep) for site in sites}
    acts = {site: cache[f"{site}.hook_sae_acts_post"][0].cpu() for site in sites}
    words = tuple(token_strings(model, tokens[0]))
    return Features(words, acts, fits, exclude, top_k)


def _fit(site: str, cache: Mapping[str, torch.Tensor], keep: torch.Tensor) -> SiteFit:
    acts, recons, error = (cache[f"{site}.{part}"][0][keep] for part in _PARTS)
    target = recons + error
    spread = (target - target.mean(0)).pow(2).sum()
    explained = 1 - error.pow(2).sum() / spread if len(target) > 1 else torch.tensor(float("nan"))
    return SiteFit(float((acts > 0).sum(-1).float().mean()), float(explained))


CHUNK = 1 << 26


class TopWords(NamedTuple):
    """Words, the strongest first."""

    top: tuple[str, ...]
    """Whose logits rise most."""
    bottom: tuple[str, ...]
    """Whose logits fall most."""


def top_words(
    model: HookedModel, directions: Float[torch.Tensor, "direction d_model"], k: int = 5
) -> list[TopWords]:
    """Words of each direction."""
    anatomy = Anatomy(model)
    W_U, gain = anatomy.W_U, anatomy.ln_final.gain
    if not 1 <= k <= W_U.shape[1]:
        raise EmptySelectionError(f"k={k} is not a number of words", exists=f"1 to {W_U.shape[1]}")
    pairs = []
    for part in directions.split(max(1, CHUNK // W_U.shape[1])):
        read = part.to(W_U) if gain is None else part.to(W_U) * gain.to(W_U)
        logits = read @ W_U
        best, worst = logits.topk(k).indices.tolist(), (-logits).topk(k).indices.tolist()
        pairs += list(zip(best, worst, strict=True))
    tokens = torch.tensor(
        sorted({i for pair in pairs for ids in pair for i in ids}), dtype=torch.long
    )
    names = dict(zip(tokens.tolist(), token_strings(model, tokens), strict=True))
    return [TopWords(*(tuple(names[i] for i in ids) for ids in pair)) for pair in pairs]
