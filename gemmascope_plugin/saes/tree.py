"""Tree SAE (arXiv 2605.07922) as a SAELens dictionary: a feature may fire only where its parent fires.

1. Standardise each token: ``x' = (x - mean) / (std + 1e-5)``, ``std`` unbiased, over ``d_in``.
2. ``z = (x' - b_dec) @ W_enc``; there is no encoder bias.
3. Layer by layer: keep ``z`` where the parent's activation exceeds 1e-3 (always below the root), of
   these the ``k_l`` largest, and of these the positive ones; in a layer with thresholds those above
   them.  A parent's activation is already gated, so every active feature has active ancestors up to
   the root ("activation coverage", equation 6).
4. ``x_hat = (f @ W_dec + b_dec) * std + mean``; the first layers alone are a dictionary of their own.
5. Mean and deviation are the token's and travel with the activations (``dense_encoder.py``):
   ``decode(encode(x))`` works as in SAELens, and any other tensor needs ``decode(acts, like=x)``.

An edit of one feature needs the whole encode: what a feature is depends on its ancestors and, under
TopK, on all features of its layer.  Edits change the features that they name and no others: children
are gated by the parent that was encoded, not by the edited one.  Who wants the gates to follow changes
``hook_sae_acts_pre``, from which gates and top-k are computed.

Importing this module registers the architecture ``"tree"`` with SAELens: ``SAE.load_from_disk`` reads
what ``save_model`` or ``save_inference_model`` wrote, the parents among it.

Cost: that of a dense SAE; the gates add one gather a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from sae_lens.registry import get_sae_class
from sae_lens.saes.sae import SAEConfig
from typing_extensions import override

from gemmascope_plugin.errors import ModelError, UnknownNameError
from gemmascope_plugin.saes.dense_encoder import DenseEncoder, in_model_units, with_units
from gemmascope_plugin.saes.jumprelu import jump
from gemmascope_plugin.saes.registration import register_class
from gemmascope_plugin.saes.sparse import Acts, Inputs
from gemmascope_plugin.saes.tree_config import (
    ROOT,
    Config,
    Layer,
    TreeLinks,
    TreeSAEConfig,
    check_parents,
    from_digits,
    to_digits,
)

GATE = 1e-3
"""A gate is open where the parent's activation exceeds this."""

Jump = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Pre-activations and thresholds of a layer to its activations."""


def open_gates(
    earlier: Float[torch.Tensor, "*tokens n_earlier"], parent: Int[torch.Tensor, " n_layer"]
) -> Bool[torch.Tensor, "*tokens n_layer"]:
    """Where the features of a layer may fire, from the final activations of all earlier layers."""
    return (parent == ROOT) | (earlier[..., parent.clamp(min=0)] > GATE)


def activate(
    pre: Acts,
    parent: Int[torch.Tensor, " d_sae"],
    layers: Sequence[Layer],
    *,
    threshold: Float[torch.Tensor, " d_sae"] | None,
    coverage: bool = True,
    jump: Jump = jump,
) -> Acts:
    """Activations, gated from the root down; gradient 1 where active."""
    acts: list[torch.Tensor] = []
    for start, stop, k in layers:
        gated = pre[..., start:stop]
        if coverage and start:
            gated = gated * open_gates(torch.cat(acts, dim=-1), parent[start:stop])
        if k is None:
            assert threshold is not None, "a layer without k has thresholds"
            acts.append(jump(gated, threshold[start:stop]))
        else:
            best = gated.topk(k, dim=-1)
            acts.append(torch.zeros_like(gated).scatter(-1, best.indices, best.values.relu()))
    return torch.cat(acts, dim=-1)


@dataclass(frozen=True, eq=False)
class TreeCoder(DenseEncoder):
    """The tensors of a Tree SAE, whole or cut to its first layers; views of the dictionary."""

    description = "tree"

    W_enc: Float[torch.Tensor, "d_in d_sae"]
    W_dec: Float[torch.Tensor, "d_sae d_in"]
    b_dec: Float[torch.Tensor, " d_in"]
    parent: Int[torch.Tensor, " d_sae"]
    threshold: Float[torch.Tensor, " d_sae"] | None
    layers: tuple[Layer, ...]
    coverage: bool
    standardize: bool
    subtract_b_dec: bool

    @override
    def pre_activations(self, x: Inputs) -> Acts:
        """``(x' - b_dec) @ W_enc``, before gates and sparsity."""
        return self.encoder_input(x) @ self.W_enc

    @override
    def activate(self, pre: Acts, x: Inputs) -> Acts:
        """Gates and sparsity of all layers."""
        return activate(
            pre, self.parent, self.layers, threshold=self.threshold, coverage=self.coverage
        )


class TreeDictionary(TreeLinks[Config], SAE[Config]):
    """A dictionary whose features form a forest under one root, for inference or training.

    ``state_dict`` has ``W_enc [d_in, d_sae]``, ``W_dec [d_sae, d_in]``, ``b_dec [d_in]``, the buffer
    ``parent [d_sae]`` and, if a layer fires by thresholds, ``threshold [d_sae]``.  Files have
    ``parent_digits [d_sae, 4]`` instead (``tree_config.py``).  Before anything is loaded every feature
    hangs on the root. Parents are checked when they are loaded and saved.
    """

    parent: torch.Tensor
    threshold: torch.nn.Parameter | None

    def __init__(self, cfg: Config, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        self.register_load_state_dict_pre_hook(_check_loaded)

    @override
    def initialize_weights(self) -> None:
        """Random matrices, thresholds 0, everything under the root."""
        super().initialize_weights()
        shape = {"size": (self.cfg.d_sae,), "device": self.device}
        self.register_buffer("parent", torch.full(fill_value=ROOT, dtype=torch.int64, **shape))
        threshold = torch.zeros(dtype=self.dtype, **shape) if self.cfg.has_thresholds else None
        self.threshold = None if threshold is None else torch.nn.Parameter(threshold)

    @property
    def n_layers(self) -> int:
        """Number of privilege layers."""
        return len(self.cfg.features_per_layer)

    def coder(self, level: int | None = None) -> TreeCoder:
        """The dictionary's tensors, cut to its first layers; of level 0 the first alone."""
        level = -1 if level is None else level
        if not -self.n_layers <= level < self.n_layers:
            widths = self.cfg.bounds[1:]
            raise UnknownNameError(
                f"The dictionary has no level {level}",
                exists=", ".join(f"level {i}: {width} features" for i, width in enumerate(widths)),
            )
        layers = self.cfg.layers[: level % self.n_layers + 1]
        stop = layers[-1].stop
        return TreeCoder(
            W_enc=self.W_enc[:, :stop],
            W_dec=self.W_dec[:stop],
            b_dec=self.b_dec,
            parent=self.parent[:stop],
            threshold=None if self.threshold is None else self.threshold[:stop],
            layers=layers,
            coverage=self.cfg.gate == "coverage",
            standardize=self.cfg.standardize,
            subtract_b_dec=self.cfg.apply_b_dec_to_input,
        )

    def jump(
        self, pre: Float[torch.Tensor, "*tokens k"], threshold: Float[torch.Tensor, " k"]
    ) -> Float[torch.Tensor, "*tokens k"]:
        """The activation of layers with thresholds."""
        return jump(pre, threshold)

    @override
    def encode(self, x: Float[torch.Tensor, ...]) -> Acts:
        """Activations, gated from the root down, of tokens at ``cfg.hook_name``.

        Tokens are ``[*tokens, d_in]``, or ``[*tokens, head, d_head]`` where ``reshape_activations`` is
        ``"hook_z"``.
        """
        return self.encode_with_hidden_pre(x)[0]

    def encode_with_hidden_pre(self, x: Float[torch.Tensor, ...]) -> tuple[Acts, Acts]:
        """Activations, and pre-activations before gates and sparsity."""
        coder, cfg = self.coder(), self.cfg
        x = self.hook_sae_input(self.reshape_fn_in(x.to(self.dtype)))
        pre = self.hook_sae_acts_pre(coder.pre_activations(x))
        acts = activate(
            pre,
            self.parent,
            cfg.layers,
            threshold=self.threshold,
            coverage=coder.coverage,
            jump=self.jump,
        )
        return with_units(self.hook_sae_acts_post(acts), coder.units(x)), pre

    @override
    def decode(
        self,
        feature_acts: Acts,
        like: Float[torch.Tensor, ...] | None = None,
        *,
        layers: int | None = None,
    ) -> Float[torch.Tensor, ...]:
        """The reconstruction in the units of the model.

        Args:
            feature_acts: Activations, edited or not.
            like: The tokens that were encoded; their mean and deviation are put back. Not needed for
                the very tensor that ``encode`` returned, nor without standardisation.
            layers: Number of privilege layers to use; all when None.

        Raises:
            ModelError: Whose mean and deviation to use is not known.
        """
        if layers is not None and not 1 <= layers <= self.n_layers:
            raise UnknownNameError(f"no prefix of {layers} layers", exists=f"1 to {self.n_layers}")
        stop = self.cfg.bounds[self.n_layers if layers is None else layers]
        out = self.hook_sae_recons(feature_acts[..., :stop] @ self.W_dec[:stop] + self.b_dec)
        if self.cfg.standardize:
            units = None if like is None else self.coder().units(self.reshape_fn_in(like))
            out = in_model_units(out, feature_acts, units)
        return self.reshape_fn_out(out, self.d_head)

    @override
    def fold_W_dec_norm(self) -> None:
        """Refuses: scaled pre-activations would compete and gate differently."""
        raise ModelError(
            "Folding decoder norms would change which features of a tree are active",
            fix="fold_W_dec_norm=False",
        )

    @override
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        """Files hold plain rows, also of a mapped and transposed encoder, and ``parent_digits``."""
        if state_dict["parent"].device.type != "meta":  # a parent edited by hand
            check_parents(state_dict["parent"], self.cfg.layers)
        state_dict["parent_digits"] = to_digits(state_dict.pop("parent"))
        for name, value in state_dict.items():
            state_dict[name] = value.contiguous()

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        """The parents from their digits, which survive SAELens' cast of all that a file holds."""
        if "parent_digits" in state_dict:
            state_dict["parent"] = from_digits(state_dict.pop("parent_digits"))

    @classmethod
    @override
    def get_sae_config_class_for_architecture(cls, architecture: str) -> type[SAEConfig]:
        """The config class itself, whose ``from_dict`` refuses unknown keys."""
        return get_sae_class(architecture)[1]

    def extra_repr(self) -> str:
        """Site, shape and sparsity."""
        return (
            f"{self.cfg.hook_name}, d_in={self.cfg.d_in}, layers="
            f"{list(self.cfg.features_per_layer)}, k={list(self.cfg.k_per_layer)}"
        )


class TreeSAE(TreeDictionary[TreeSAEConfig]):
    """SAELens' inference class for the architecture ``"tree"``."""


def _check_loaded(
    module: TreeDictionary[Any], state_dict: dict[str, Any], prefix: str, *others: object
) -> None:
    """Parents are checked before they are taken over, wherever they come from."""
    if (parent := state_dict.get(f"{prefix}parent")) is not None:
        check_parents(parent, module.cfg.layers)


register_class(TreeSAE, TreeSAEConfig)
