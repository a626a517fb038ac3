"""Where the weights of a model come from, and where its texts end: what ``load_model`` noted on it."""

from __future__ import annotations

from gemmascope_plugin.models.protocol import HookedModel


def weights_of(model: HookedModel) -> str | None:
    """Where the weights come from, for results and pages; None of a model that was made elsewhere.

    Args:
        model: Any model.
    """
    return getattr(model, "gemmascope_source", None)


def end_ids(model: HookedModel) -> tuple[int, ...]:
    """The ids at which a generated text ends: those of the generation config, else the tokenizer's EOS.

    Args:
        model: Any model.
    """
    ids = getattr(model, "gemmascope_eos_ids", None)
    if ids is not None:
        return ids
    eos = getattr(model.tokenizer, "eos_token_id", None)
    return () if eos is None else (int(eos),)
