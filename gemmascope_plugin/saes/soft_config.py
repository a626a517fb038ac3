"""Configs of the soft top-k dictionaries: SAELens' own, with a budget, schedules and strict reading.

What SAELens accepts or drops silently is refused here: keys that a config does not have, budgets that
no dictionary of that width can serve, phases that do not fit into the training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from sae_lens import TopKSAEConfig, TrainingSAEConfig
from sae_lens.saes.sae import SAEConfig, SAEMetadata
from typing_extensions import override

from gemmascope_plugin.errors import ModelError
from gemmascope_plugin.saes.registration import StrictConfig
from gemmascope_plugin.saes.soft_schedule import check_schedule

FOLDABLE = ("none", "expected_average_only_in")
"""Normalisations that become part of the weights."""
BUDGETED = (*FOLDABLE, "layer_norm")
"""SoftSAE's class standardises tokens by itself; SAELens' top-k, as which a fixed budget is saved, keeps
another token's deviation."""

ARCHITECTURE = "softsae"
"""The name under which SAELens knows both the inference and the training class."""


@dataclass(kw_only=True)
class SoftSAEConfig(StrictConfig, SAEConfig):
    """SAELens' config with the mean budget.

    Raises:
        ModelError: ``k`` is below 1 or not below half of ``d_sae``, or the input normalisation is one
            that the budget network cannot follow.
    """

    k: float | int
    """Mean number of active features that training aimed at; the budget lies between 1 and ``2 k``."""
    # SAELens passes a plain dict here when it reads a config, and replaces it by its own class after.
    metadata: Any = field(default_factory=SAEMetadata)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_mean_budget(self.k, self.d_sae)
        check_normalisation(self.normalize_activations, BUDGETED)

    @override
    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE


@dataclass(kw_only=True)
class SoftTopKTrainingSAEConfig(StrictConfig, TrainingSAEConfig):
    """A fixed budget of ``k`` features, softly selected; saved for inference as SAELens' top-k SAE.

    Raises:
        ModelError: ``k`` is no number of features, or the phases do not fit into ``total_steps``.
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
        """Refuses budgets that are no number of features."""
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


def check_mean_budget(k: float | int, d_sae: int) -> None:
    """Refuses mean budgets of which some input could be allotted more features than there are.

    Raises:
        ModelError: See above.
    """
    if not 1 <= k < d_sae / 2:
        raise ModelError(
            f"k is {k}, for {d_sae} features",
            exists=f"mean budgets from 1 to below {d_sae / 2:g}, since single inputs may take 2 k",
        )


def check_normalisation(given: str, known: Sequence[str]) -> None:
    """Refuses input normalisations that a dictionary cannot follow, or that splicing could not.

    Raises:
        ModelError: See above.
    """
    if given not in known:
        raise ModelError(
            f"A soft top-k dictionary cannot normalise its input by {given!r}",
            exists=", ".join(known),
        )
