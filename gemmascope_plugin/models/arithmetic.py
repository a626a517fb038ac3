"""A Gemma as functions of its weights, compared with the model itself before anything rests on it.

The arithmetic is that of ``block.py``. :meth:`Arithmetic.of` compares it with the model on one prompt and
gives None where they differ by more than rounding, as they do where the model is not a Gemma or where
somebody's modules take part; ``module_replay.py`` then runs the model's own modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int

from gemmascope_plugin.errors import GemmaScopeError
from gemmascope_plugin.models.anatomy import Anatomy
from gemmascope_plugin.models.asked import final_residuals
from gemmascope_plugin.models.block import Block, normed
from gemmascope_plugin.models.points import can_restart
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.models.replay_points import Points, Rows

_AGREES = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Largest relative difference, of the final norm's output, that other orders of operations explain."""


class Arithmetic:
    """A model as functions of its weights, checked against the model.

    ``embed_scale`` is what the first block gets, in units of the embedding.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        turns: Sequence[tuple[torch.Tensor, torch.Tensor]],
        embed_scale: float,
    ) -> None:
        self.anatomy, self._embed_scale = anatomy, embed_scale
        self.blocks = [Block(anatomy, layer, turns[layer]) for layer in range(anatomy.n_layers)]

    @classmethod
    def of(cls, model: HookedModel, tokens: Int[torch.Tensor, "prompt pos"]) -> Arithmetic | None:
        """That of a model; None where it does not give what the model gives, tried on the first row."""
        if not can_restart(model) or not _is_plain(model):
            return None
        try:
            anatomy = Anatomy(model, is_wide=False)
        except GemmaScopeError:
            return None
        run = _ModelRun.of(model, tokens[:1])
        turns = _turns(model, run, tokens.shape[1])
        if turns is None:
            return None
        with torch.no_grad():
            embedded = model.embed(tokens[:1]).double()
            first = run.first.double()
            scale = float((embedded * first).sum() / embedded.square().sum())
            scale = 1.0 if abs(scale - 1) < 1e-6 else scale
            mine = cls(anatomy, turns, scale)
            final = mine.final(mine.stream(tokens[:1], Points()), Points())
        return mine if _agree(final, run.final) else None

    def embedded(
        self, tokens: Int[torch.Tensor, "row pos"]
    ) -> Float[torch.Tensor, "row pos d_model"]:
        """The stream before the first block."""
        x = self.anatomy.model.embed(tokens).detach()
        return x if self._embed_scale == 1 else x * self._embed_scale

    def stream(self, tokens: torch.Tensor, points: Points) -> torch.Tensor:
        """The last residual stream of whole prompts."""
        x = points("hook_embed", self.embedded(tokens))
        for block in self.blocks:
            x = block.attention(x, Rows(0), None, points, {})
            x = block.mlp(x, Rows(0), points, {})
        return x

    def final(
        self, x: Float[torch.Tensor, "*axes d_model"], points: Points
    ) -> Float[torch.Tensor, "*axes d_model"]:
        """What the unembedding reads."""
        return normed(self.anatomy.ln_final, x, points, "ln_final")


def _is_plain(model: HookedModel) -> bool:
    """Whether nothing but the tokens decides what is attended to, all on one device."""
    cfg = model.cfg
    turned_on_itself = not getattr(cfg, "rotary_adjacent_pairs", False)
    whole = getattr(cfg, "rotary_dim", None) in (None, cfg.d_head)
    on_one_device = len({parameter.device for parameter in model.parameters()}) == 1
    return turned_on_itself and whole and on_one_device and getattr(cfg, "gated_mlp", True)


@dataclass(frozen=True, eq=False)
class _ModelRun:
    """One pass of the model itself."""

    first: torch.Tensor
    """What the first block was given."""
    arguments: list[dict[str, Any]]
    """Of each block."""
    final: torch.Tensor
    """What the unembedding was given."""

    @classmethod
    def of(cls, model: HookedModel, tokens: torch.Tensor) -> _ModelRun:
        """Runs the model."""
        streams: list[torch.Tensor] = []
        arguments: list[dict[str, Any]] = []

        def keep(module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            streams.append(args[0] if args else kwargs["hidden_states"])
            arguments.append(kwargs)

        handles = []
        try:
            for block in model.blocks:
                handles.append(block.register_forward_pre_hook(keep, with_kwargs=True))
            with torch.no_grad(), final_residuals(model) as ends:
                model(tokens)
        finally:
            for handle in handles:
                handle.remove()
        return cls(streams[0], arguments, ends.normed[0])


def _turns(
    model: HookedModel, run: _ModelRun, n_pos: int
) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
    """Cosines and sines of each layer; None for another kind of positions."""
    turns = []
    for block, arguments in zip(model.blocks, run.arguments, strict=True):
        embeddings = arguments.get("position_embeddings")
        if embeddings is not None:
            cos, sin = (turn[0] for turn in embeddings)
        elif hasattr(block.attn, "rotary_cos"):
            cos, sin = (getattr(block.attn, f"rotary_{name}")[:n_pos] for name in ("cos", "sin"))
        else:
            return None
        if cos.shape != (n_pos, int(model.cfg.d_head)):
            return None
        turns.append((cos.detach(), sin.detach()))
    return turns


def _agree(mine: torch.Tensor, models: torch.Tensor) -> bool:
    """Whether two results are the same but for rounding; one that is not finite agrees with none."""
    difference = (mine.double() - models.double()).norm() / models.double().norm()
    return bool(difference < _AGREES.get(models.dtype, 0.0))
