"""Training with a soft top-k: SoftSAE, and the same with a fixed budget, on SAELens' trainer.

Method (arXiv 2605.06610), per step:

1. At the first step ``b_dec`` becomes the geometric median of the batch. At every step the decoder's
   rows are brought to unit norm, and their gradients along themselves vanish.
2. ``z = ReLU((x - b_dec) @ W_enc + b_enc)``; ``f = z * soft_topk(z, k_hat, alpha)``; ``k_hat`` is the
   budget network's, or ``k`` for every input (``SoftTopKTrainingSAE``).
3. ``|x - x_hat|^2 + softplus_5(mean k_hat - target) + AuxK / 32``. The second term, absent where the
   budget is fixed, bounds the mean budget from above alone. AuxK is the squared error, over the
   variance of the residual, of predicting the residual from the ``d_in / 2`` strongest dead features.
4. ``alpha`` falls linearly from 1 to its final value over the first ``alpha_steps``; the target of the
   mean budget falls linearly from ``d_in`` to ``k`` over the first per cent of all steps.
5. The last ``hard_steps`` select ``floor(k_hat)`` features hard, as inference does, and have no budget
   loss, so that the budget network stands still; so does everything in evaluation mode.

``alpha`` and the losses are in units of the input: the paper's has unit mean squared norm. A feature
counts as firing while its weight has not underflowed, so that none dies before ``alpha`` is small.

Cost: an SAE's step, plus the budget network, plus ``soft_topk``; one more buffer ``[batch, d_sae]``
than with a hard top-k.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Generic, TypeVar

import torch
from jaxtyping import Bool, Float
from sae_lens import TopKSAEConfig, TrainingSAE, TrainingSAEConfig
from sae_lens.saes.sae import SAEConfig, TrainCoefficientConfig, TrainStepInput, TrainStepOutput
from typing_extensions import override

from gemmascope_plugin.errors import ModelError
from gemmascope_plugin.saes.dense_encoder import standardise
from gemmascope_plugin.saes.lapsum import keep_top, soft_topk
from gemmascope_plugin.saes.registration import StrictConfig, register_class
from gemmascope_plugin.saes.soft import (
    ARCHITECTURE,
    BUDGETED,
    FOLDABLE,
    SoftSAEConfig,
    add_soft_weights,
    check_mean_budget,
    check_normalisation,
    predict_budget,
    refuse_to_fold,
    scale_budget_input,
)
from gemmascope_plugin.saes.sparse import Acts, Inputs
from gemmascope_plugin.saes.training.step_parts import geometric_median


def alpha_at(step: int, *, alpha_steps: int, final_alpha: float) -> float:
    """Width of the transition at a step, counted from 0."""
    return _line(step, alpha_steps, 1.0, final_alpha)


def target_at(step: int, *, target_steps: int, d_in: int, k: float | int) -> float:
    """What the mean budget of a batch should not exceed at a step."""
    return _line(step, target_steps, float(d_in), float(k))


def is_hard_at(step: int, *, total_steps: int, hard_steps: int) -> bool:
    """Whether a step selects hard."""
    return step >= total_steps - hard_steps


def check_schedule(
    *, total_steps: int, alpha_steps: int, hard_steps: int, final_alpha: float
) -> None:
    """Refuses phases that are negative or do not fit, and a ``final_alpha`` not between 0 and 1."""
    if min(alpha_steps, hard_steps) < 0 or alpha_steps + hard_steps > total_steps:
        raise ModelError(
            f"{alpha_steps} alpha_steps and {hard_steps} hard_steps do not fit into "
            f"{total_steps} total_steps",
            fix="more total_steps, or shorter phases; the paper has 2500 and 10000",
        )
    if not 0 < final_alpha < 1:
        raise ModelError(
            f"final_alpha is {final_alpha}", exists="values between 0 and 1", fix="final_alpha=1e-4"
        )


def _line(step: int, steps: int, start: float, end: float) -> float:
    """From ``start`` at step 0 to ``end`` at ``steps``, and there from then on."""
    return end if step >= steps else start + (end - start) * step / steps


@dataclass(kw_only=True)
class SoftTopKTrainingSAEConfig(StrictConfig, TrainingSAEConfig):
    """A fixed budget of ``k`` features, softly selected; saved for inference as SAELens' top-k SAE.

    Raises:
        ModelError: ``k`` is not a number of features, or the phases do not fit into ``total_steps``.
    """

    k: int | float
    total_steps: int
    """How many steps the training has."""
    alpha_steps: int = 2500
    hard_steps: int = 10_000
    final_alpha: float = 1e-4
    aux_loss_coefficient: float = 1 / 32
    decoder_init_norm: float | None = 1.0

    normalisations: ClassVar[tuple[str, ...]] = FOLDABLE
    rescale_acts_by_decoder_norm: ClassVar[bool] = False
    """A field of SAELens' top-k config."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_k()
        check_normalisation(self.normalize_activations, self.normalisations)
        check_schedule(
            total_steps=self.total_steps,
            alpha_steps=self.alpha_steps,
            hard_steps=self.hard_steps,
            final_alpha=self.final_alpha,
        )

    def check_k(self) -> None:
        """Refuses budgets that are not a number of features."""
        if not isinstance(self.k, int) or not 1 <= self.k < self.d_sae:
            raise ModelError(
                f"k is {self.k}, for {self.d_sae} features",
                exists=f"whole numbers from 1 to {self.d_sae - 1}",
            )

    @override
    @classmethod
    def architecture(cls) -> str:
        return "soft_topk"

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return TopKSAEConfig


@dataclass(kw_only=True)
class SoftTrainingSAEConfig(SoftTopKTrainingSAEConfig):
    """SoftSAE: ``k`` is the mean budget, and may be any real number from 1 to below ``d_sae / 2``."""

    budget_loss_coefficient: float = 1.0

    normalisations: ClassVar[tuple[str, ...]] = BUDGETED

    @override
    def check_k(self) -> None:
        check_mean_budget(self.k, self.d_sae)

    @override
    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return SoftSAEConfig


Config = TypeVar("Config", bound=SoftTopKTrainingSAEConfig)


class SoftTopKTrainingSAE(TrainingSAE[Config], Generic[Config]):
    """A soft top-k with the same budget for every input."""

    b_enc: torch.nn.Parameter
    step: int = 0
    """The step that is under way; schedules follow it."""

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.b_enc = torch.nn.Parameter(
            torch.zeros(self.cfg.d_sae, dtype=self.dtype, device=self.device)
        )

    @property
    def alpha(self) -> float:
        """Width of the transition at this step; 0 where the selection is hard."""
        cfg = self.cfg
        hard = is_hard_at(self.step, total_steps=cfg.total_steps, hard_steps=cfg.hard_steps)
        if hard or not self.training:
            return 0.0
        return alpha_at(self.step, alpha_steps=cfg.alpha_steps, final_alpha=cfg.final_alpha)

    def budget_of(self, sae_in: Inputs) -> Float[torch.Tensor, "*tokens"]:
        """How many features each centred input may have."""
        return torch.full(sae_in.shape[:-1], float(self.cfg.k), device=sae_in.device)

    def budget_loss(self, budget: Float[torch.Tensor, "*tokens"]) -> dict[str, torch.Tensor]:
        """The loss terms that the budget adds: none, it is fixed."""
        return {}

    def _encode(self, x: Inputs) -> tuple[Acts, Acts, Float[torch.Tensor, "*tokens"]]:
        """Activations, non-negative scores and budgets."""
        sae_in = self.process_sae_in(x)
        scores = self.hook_sae_acts_pre(sae_in @ self.W_enc + self.b_enc).relu()
        budget, alpha = self.budget_of(sae_in), self.alpha
        if not alpha:
            return self.hook_sae_acts_post(keep_top(scores, budget.long())), scores, budget
        acts = scores * soft_topk(scores, budget, alpha)
        return self.hook_sae_acts_post(acts), scores, budget

    @override
    def encode_with_hidden_pre(self, x: Inputs) -> tuple[Acts, Acts]:
        """Activations and the non-negative scores they were selected from."""
        acts, scores, _ = self._encode(x)
        return acts, scores

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """One step: prepare, encode, reconstruct from unit rows, sum the losses."""
        x, self.step = step_input.sae_in, step_input.n_training_steps
        if self.cfg.normalize_activations == "layer_norm":
            # Losses in the units of the encoder, in which standardising again changes nothing.
            x = standardise(x)[0]
            step_input = replace(step_input, sae_in=x)
        self._prepare(x)
        acts, scores, budget = self._encode(x)
        # Normalised once more although the rows have unit norm: the gradient then has no part along
        # them.
        rows = torch.nn.functional.normalize(self.W_dec, dim=-1)
        out = self.hook_sae_recons(acts @ rows + self.b_dec)
        losses = {"mse_loss": self.mse_loss_fn(out, x).sum(-1).mean()}
        losses |= self.calculate_aux_loss(step_input, acts, scores, out)
        for name, term in self.budget_loss(budget).items():
            losses[name] = step_input.coefficients[name] * term
        return TrainStepOutput(
            sae_in=x,
            sae_out=out,
            feature_acts=acts,
            hidden_pre=scores,
            loss=torch.stack(list(losses.values())).sum(),
            losses=losses,
            metrics={"mean_k": budget.detach().mean(), "alpha": self.alpha},
        )

    @torch.no_grad()
    def _prepare(self, x: Float[torch.Tensor, "batch d_in"]) -> None:
        """Step 1; a bias that has been loaded or learned is kept."""
        if self.step == 0 and not self.b_dec.any():
            self.b_dec.copy_(geometric_median(x))
        self.W_dec.div_(self.get_W_dec_norm()[:, None])

    @override
    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: Float[torch.Tensor, "batch d_sae"],
        hidden_pre: Float[torch.Tensor, "batch d_sae"],
        sae_out: Float[torch.Tensor, "batch d_in"],
    ) -> dict[str, torch.Tensor]:
        """AuxK, 0 while no feature is dead."""
        name, dead = "auxiliary_reconstruction_loss", step_input.dead_neuron_mask
        if dead is None or not dead.any():
            return {name: sae_out.new_zeros(())}
        residual = (step_input.sae_in - sae_out).detach()
        loss = auxk_loss(residual, hidden_pre, dead, self.W_dec)
        return {name: step_input.coefficients[name] * loss}

    @override
    def get_coefficients(self) -> dict[str, TrainCoefficientConfig | float]:
        return {"auxiliary_reconstruction_loss": self.cfg.aux_loss_coefficient}

    @override
    def fold_W_dec_norm(self) -> None:
        refuse_to_fold()


class SoftTrainingSAE(SoftTopKTrainingSAE[SoftTrainingSAEConfig]):
    """SoftSAE: a network allots each input its budget; saved for inference as ``SoftSAE``."""

    k_estimator: torch.nn.Sequential

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        add_soft_weights(self)

    @override
    def budget_of(self, sae_in: Inputs) -> Float[torch.Tensor, "*tokens"]:
        return predict_budget(self.k_estimator, sae_in, self.cfg.k)

    @override
    def budget_loss(self, budget: Float[torch.Tensor, "*tokens"]) -> dict[str, torch.Tensor]:
        """Softplus of how far the mean budget exceeds its target; none where selection is hard."""
        if not self.alpha:
            return {}
        cfg = self.cfg
        target = target_at(self.step, target_steps=cfg.total_steps // 100, d_in=cfg.d_in, k=cfg.k)
        return {"budget_loss": torch.nn.functional.softplus(budget.mean() - target, beta=5)}

    @override
    def get_coefficients(self) -> dict[str, TrainCoefficientConfig | float]:
        return {**super().get_coefficients(), "budget_loss": self.cfg.budget_loss_coefficient}

    @override
    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        super().fold_activation_norm_scaling_factor(scaling_factor)
        scale_budget_input(self.k_estimator, scaling_factor)


def auxk_loss(
    residual: Float[torch.Tensor, "batch d_in"],
    scores: Float[torch.Tensor, "batch d_sae"],
    dead: Bool[torch.Tensor, " d_sae"],
    W_dec: Float[torch.Tensor, "d_sae d_in"],
) -> Float[torch.Tensor, ""]:
    """What the ``d_in / 2`` strongest dead features leave of the residual, over its variance."""
    k = min(residual.shape[-1] // 2, int(dead.sum()))
    guess = keep_top(torch.where(dead, scores, 0), k) @ W_dec
    error = (residual - guess).pow(2).sum(-1).mean()
    variance = (residual - residual.mean(0)).pow(2).sum(-1).mean()
    return torch.where(variance > 0, error / variance, 0)


register_class(SoftTopKTrainingSAE, SoftTopKTrainingSAEConfig)
register_class(SoftTrainingSAE, SoftTrainingSAEConfig)
