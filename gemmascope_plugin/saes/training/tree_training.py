"""A Tree SAE that SAELens' trainer can train (arXiv 2605.07922).

Everything happens in ``training_forward_pass``, which ``SAETrainer`` calls once a step; a loop of one's
own calls it likewise, with the number of the step, and needs nothing else:

1. ``prepare_step``: at step 0 ``b_dec`` becomes the geometric median of the first batch; decoder rows are
   brought to unit norm; at the steps of ``reallocation_steps`` dead children move (``reallocate``); at
   ``freeze_step`` those that are dead go to the root (``reset_dead_to_root``) and the tree is frozen.
2. Encode, decode every prefix, and the losses (``tree_steps.py``).
3. ``record_step``: tokens since each feature fired, and each parent's capacity (``tree_steps.py``).

Who is dead is counted here, in tokens, and kept in checkpoints; SAELens' own mask counts batches and is
not used.  The official code brings rows to unit norm between backward pass and optimiser step; here that
is before the forward pass, so that every loss is one of unit rows.

The defaults of the hyperparameters are those of the published runs: AuxK with 256 features and weight
1/32 on the first layer, features dead after 10 million tokens, parents eligible if they fired in the last
50,000, children moved after 3,000 steps and then at intervals that double up to 10,000, the tree frozen
at step 50,000, decoder rows of unit norm.  They are meant for 5,120 tokens a step and 100,000 steps;
shorter runs need smaller ones.

Cost: one encode, one decode for all prefixes, and AuxK; a re-allocation some 20 ms a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from sae_lens import TrainingSAE
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.jumprelu_sae import JumpReLU, Step
from sae_lens.saes.sae import (
    TrainCoefficientConfig,
    TrainingSAEConfig,
    TrainStepInput,
    TrainStepOutput,
)
from typing_extensions import override

from gemmascope_plugin.errors import ModelError, check_choice
from gemmascope_plugin.saes.dense_encoder import EPS
from gemmascope_plugin.saes.registration import register_class
from gemmascope_plugin.saes.training.step_parts import geometric_median
from gemmascope_plugin.saes.training.tree_steps import (
    aux_loss,
    move_dead_children,
    prefix_losses,
    reallocation_steps,
    scalar_sum_loss,
    shares,
    vector_sum_loss,
)
from gemmascope_plugin.saes.tree import TreeDictionary, open_gates
from gemmascope_plugin.saes.tree_config import ROOT, TreeSAEConfig


@dataclass(kw_only=True)
class TreeTrainingSAEConfig(TreeSAEConfig, TrainingSAEConfig):
    """Shapes and hyperparameters.

    Raises:
        ModelError: Impossible layers, intervals or combinations.
        UnknownNameError: There is no such gate or sum consistency.
    """

    decoder_init_norm: float | None = 1.0
    aux_coefficient: float = 1 / 32
    k_aux: int = 256
    aux_layers: Sequence[int] = (0,)
    """Layers whose dead features explain the residual."""
    dead_after_tokens: int = 10_000_000
    """Tokens without firing after which a feature is dead."""
    parent_within_tokens: int = 50_000
    """A parent may gain children if it fired within so many tokens."""
    first_reallocation: int = 3000
    """Steps until dead children move for the first time; each interval is twice the last."""
    longest_interval: int = 10_000
    freeze_step: int = 50_000
    """At this step dead children go to the root, for good."""
    sum_consistency: Literal["none", "scalar", "vector"] = "none"
    sum_consistency_coefficient: float = 0.01
    threshold_init: float = 0.01
    bandwidth: float = 0.05
    """Of the straight-through estimator of thresholds."""
    l0_coefficient: float = 1e-3
    """On the number of active features of layers with thresholds."""
    l0_warm_up_steps: int = 0

    @override
    def __post_init__(self) -> None:
        self.aux_layers = tuple(self.aux_layers)
        super().__post_init__()
        check_choice("sum consistency", self.sum_consistency, ("none", "scalar", "vector"))
        if self.sum_consistency == "vector" and self.gate == "none":
            raise ModelError(
                "sum_consistency='vector' sums over families of active parents, but gate='none' lets "
                "children fire without them",
                fix="sum_consistency='scalar', or gate='coverage'",
            )
        n_layers = len(self.features_per_layer)
        if any(not 0 <= layer < n_layers for layer in self.aux_layers):
            raise ModelError(f"aux_layers={self.aux_layers}", exists=f"layers 0 to {n_layers - 1}")
        reallocation_steps(self.first_reallocation, self.longest_interval, self.freeze_step)


_STATE = ("tokens_since_fired", "capacity")
"""Buffers of training alone."""


class TreeTrainingSAE(TreeDictionary[TreeTrainingSAEConfig], TrainingSAE[TreeTrainingSAEConfig]):
    """A Tree SAE with losses and a tree that is learned; ``save_inference_model`` keeps the tree."""

    tokens_since_fired: torch.Tensor
    """Tokens since each feature last fired, ``[d_sae]``."""
    capacity: torch.Tensor
    """Row ``l``: of the candidates for parents in layer ``l``, then the root, at its first feature."""

    def __init__(self, cfg: TreeTrainingSAEConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        self._moves = set(
            reallocation_steps(cfg.first_reallocation, cfg.longest_interval, cfg.freeze_step)
        )

    @override
    def initialize_weights(self) -> None:
        """Unit rows, the encoder their transpose, parents uniform among candidates and root."""
        super().initialize_weights()
        device, cfg = self.device, self.cfg
        for start, stop, _ in cfg.layers[1:]:
            drawn = torch.randint(start + 1, (stop - start,), device=device)
            self.parent[start:stop] = torch.where(drawn == start, ROOT, drawn)
        if self.threshold is not None:
            self.threshold.data.fill_(cfg.threshold_init)
        since = torch.zeros(cfg.d_sae, dtype=torch.int64, device=device)
        self.register_buffer("tokens_since_fired", since)
        capacity = torch.zeros(self.n_layers, cfg.d_sae + 1, device=device)
        self.register_buffer("capacity", capacity)

    @override
    def jump(
        self, pre: Float[torch.Tensor, "*tokens k"], threshold: Float[torch.Tensor, " k"]
    ) -> Float[torch.Tensor, "*tokens k"]:
        """JumpReLU with a gradient for thresholds; SAELens' sums it over the first axis alone."""
        flat = JumpReLU.apply(pre.flatten(0, -2), threshold, self.cfg.bandwidth, False)
        assert isinstance(flat, torch.Tensor)
        return flat.reshape(pre.shape).relu()

    @override
    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        """What SAELens schedules: ``aux``, and ``sum_consistency`` and ``l0`` where they are used."""
        cfg = self.cfg
        used: dict[str, float | TrainCoefficientConfig] = {"aux": cfg.aux_coefficient}
        if cfg.sum_consistency != "none":
            used["sum_consistency"] = cfg.sum_consistency_coefficient
        if cfg.has_thresholds:
            used["l0"] = TrainCoefficientConfig(cfg.l0_coefficient, cfg.l0_warm_up_steps)
        return used

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """One step on a batch ``[tokens, d_in]``: losses, and all that the tree needs besides."""
        x = step_input.sae_in
        self.prepare_step(step_input.n_training_steps, x)
        acts, pre = self.encode_with_hidden_pre(x)
        prefixes = self.decode_prefixes(acts, x)
        *inner, last = prefix_losses(x, prefixes)
        losses = {"mse_loss": last}
        losses |= {f"prefix_loss_{layer}": loss for layer, loss in enumerate(inner)}
        losses |= self.calculate_aux_loss(step_input, acts, pre, prefixes[-1])
        loss = torch.stack(list(losses.values())).sum()
        self.record_step(step_input.n_training_steps, acts, loss)
        return TrainStepOutput(
            sae_in=x,
            sae_out=prefixes[-1],
            feature_acts=acts,
            hidden_pre=pre,
            loss=loss,
            losses=losses,
        )

    def decode_prefixes(
        self, acts: Float[torch.Tensor, "tokens d_sae"], x: Float[torch.Tensor, "tokens d_in"]
    ) -> list[Float[torch.Tensor, "tokens d_in"]]:
        """The reconstructions by layer 0, by layers 0 and 1, and so on, each layer decoded once."""
        _, mean, std = self.coder().units(x)
        total, prefixes = self.b_dec, []
        for start, stop, _ in self.cfg.layers:
            total = total + acts[:, start:stop] @ self.W_dec[start:stop]
            prefixes.append(total if mean is None or std is None else total * std + mean)
        return prefixes

    @override
    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: torch.Tensor,
        hidden_pre: torch.Tensor,
        sae_out: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """AuxK of ``aux_layers``, sum consistency and the L0 of layers with thresholds, weighted."""
        cfg, weight = self.cfg, step_input.coefficients
        losses = {
            "auxk_loss": weight["aux"]
            * self._auxk(step_input.sae_in, sae_out, hidden_pre, feature_acts)
        }
        if cfg.sum_consistency == "scalar":
            loss = scalar_sum_loss(feature_acts, self.parent)
            losses["sum_consistency_loss"] = weight["sum_consistency"] * loss
        if cfg.sum_consistency == "vector":
            loss = vector_sum_loss(feature_acts, self.parent, self.W_dec)
            losses["sum_consistency_loss"] = weight["sum_consistency"] * loss
        if cfg.has_thresholds:
            losses["l0_loss"] = weight["l0"] * self._soft_l0(hidden_pre, feature_acts)
        return losses

    def _gates(self, layer: int, acts: torch.Tensor) -> torch.Tensor:
        """Where the features of a layer may fire, broadcasting against ``[tokens, n_layer]``."""
        start, stop, _ = self.cfg.layers[layer]
        if self.cfg.gate == "none" or not start:
            return torch.ones(stop - start, dtype=torch.bool, device=acts.device)
        return open_gates(acts[:, :start], self.parent[start:stop])

    def _auxk(
        self, x: torch.Tensor, out: torch.Tensor, pre: torch.Tensor, acts: torch.Tensor
    ) -> torch.Tensor:
        _, _, std = self.coder().units(x)
        residual = (x - out).detach() / (1 if std is None else std + EPS)
        dead, total = self.dead, pre.new_zeros(())
        for layer in self.cfg.aux_layers:
            features = slice(*self.cfg.layers[layer][:2])
            may_fire = dead[features] & self._gates(layer, acts)
            total = total + aux_loss(
                residual, pre[:, features], may_fire, self.W_dec[features], self.cfg.k_aux
            )
        return total

    def _soft_l0(self, pre: torch.Tensor, acts: torch.Tensor) -> torch.Tensor:
        """Mean active features of layers with thresholds, with a gradient for these (equation 9)."""
        assert self.threshold is not None, "no layer has thresholds"
        total = pre.new_zeros(())
        for layer, (start, stop, k) in enumerate(self.cfg.layers):
            if k is None:
                on = Step.apply(
                    pre[:, start:stop], self.threshold[start:stop], self.cfg.bandwidth, False
                )
                total = total + (on * self._gates(layer, acts)).sum(-1).mean()
        return total

    @property
    def dead(self) -> torch.Tensor:
        """Which features have not fired for ``dead_after_tokens``, ``[d_sae]``."""
        return self.tokens_since_fired > self.cfg.dead_after_tokens

    @torch.no_grad()
    def prepare_step(self, step: int, x: Float[torch.Tensor, "tokens d_in"]) -> None:
        """What comes before the forward pass of a step: bias, unit rows, the tree."""
        if step == 0 and not bool(self.b_dec.any()):
            self.b_dec.data.copy_(geometric_median(self.coder().units(x)[0]))
        self.W_dec.data.div_(self.get_W_dec_norm()[:, None])
        if self.threshold is not None:
            self.threshold.data.clamp_(min=0)
        if step in self._moves:
            self.reallocate()
        if step == self.cfg.freeze_step:
            self.reset_dead_to_root()

    @torch.no_grad()
    def record_step(
        self, step: int, acts: Float[torch.Tensor, "tokens d_sae"], loss: Float[torch.Tensor, ""]
    ) -> None:
        """What comes after the losses of a step: who fired, and the parents' capacities."""
        fired = (acts > 0).any(0)
        self.tokens_since_fired += len(acts)
        self.tokens_since_fired[fired] = 0
        if step >= self.cfg.freeze_step:
            return
        for layer, (start, _, _) in enumerate(self.cfg.layers):
            self.capacity[layer, : start + 1] += shares(loss.to(self.capacity.dtype), fired[:start])

    @torch.no_grad()
    def reallocate(self) -> None:
        """Moves dead children from parents above their quota to those below, and forgets capacities."""
        recent = self.tokens_since_fired <= self.cfg.parent_within_tokens
        for layer, (start, stop, _) in enumerate(self.cfg.layers):
            capacity = self.capacity[layer, : start + 1].clone()
            capacity[:start] *= recent[:start]
            if start and bool(capacity.any()):
                parents = self.parent[start:stop]
                place = torch.where(parents == ROOT, start, parents)
                place = move_dead_children(place, self.dead[start:stop], capacity)
                self.parent[start:stop] = torch.where(place == start, ROOT, place)
        self.capacity.zero_()

    @torch.no_grad()
    def reset_dead_to_root(self) -> None:
        """Frees dead children of their parents, whose gates may never open for them."""
        self.parent[self.dead] = ROOT
        self.capacity.zero_()

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        """Without the state of training."""
        for name in _STATE:
            del state_dict[name]
        self.process_state_dict_for_saving(state_dict)

    @classmethod
    @override
    def get_sae_config_class_for_architecture(cls, architecture: str) -> type[TrainingSAEConfig]:
        """The training config."""
        return get_sae_training_class(architecture)[1]


register_class(TreeTrainingSAE, TreeTrainingSAEConfig)
