"""One dictionary in training: its SAELens trainer, its scales, its own random state.

1. The dictionary is built from the seed of its spec; its random state is its own, so that training
   several at once changes none of them.
2. Activations are scaled by one factor per site, measured once on the first bucket (arXiv 2408.05147,
   section 3.1); a transcoder's batch is input and target side by side.
3. ``SAETrainer.step`` does the step: forward, backward, clipping, Adam, warm-ups, firing counts. The
   learning rate follows half a cosine up and half a cosine down.
4. The trainer calls ``training_forward_pass`` and clips the gradient's norm at 1, always. So it trains an
   ``Objective`` in place of the dictionary, which adds the loss of ghost gradients where it is asked for,
   and stops the run before anything is changed at a loss or a gradient that is not finite. To clip at
   another norm ``c``, the loss is divided by ``c`` and the clipped gradients are multiplied by ``c``
   before the optimiser's step: the same as clipping at ``c``.
5. All that a step depends on can be taken out as tensors and plain numbers, and put back, bit by bit.

Ghost gradients (Jermyn and Templeton, "Ghost grads", Anthropic's Circuits Updates of January 2024; kept
for comparison): dead features learn from the residual ``r = x - x_hat`` through ``exp``. With ``z_D``
their pre-activations and ``W_D`` their decoder rows, ``g = exp(z_D) @ W_D`` has gradients where ReLU has
none; it is scaled per token to half the norm of ``r``, and ``|g - r|^2`` to the size of ``|r|^2``, both
factors being constants. ``r`` is a constant, too: no other feature feels this loss. Gemma Scope does not
use it; the auxiliary losses of the architectures do better.

Cost: that of SAELens' step, one norm of the gradients, and for ghosts a product of ``[batch, dead]`` and
``[dead, d_out]``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.training.sae_trainer import SAETrainer

from gemmascope_plugin.errors import BadFileError
from gemmascope_plugin.training.architectures import architecture, build
from gemmascope_plugin.training.buckets import Bucket
from gemmascope_plugin.training.train_spec import TrainSpec
from gemmascope_plugin.types import SAE

_EPS = 1e-6
_COUNTS = ("act_freq_scores", "n_forward_passes_since_fired")
_NUMBERS = (
    "n_training_steps",
    "n_training_samples",
    "n_frac_active_samples",
    "started_fine_tuning",
)


class NotFiniteError(ArithmeticError):
    """A loss or gradient is not finite; the weights are those of the step before."""


class Learner:
    """A dictionary with everything that trains it."""

    def __init__(
        self, spec: TrainSpec, bucket: Bucket, *, model_name: str, device: torch.device
    ) -> None:
        self.spec, self.device = spec, device
        self.kind = architecture(spec).kind
        self.hooks_in, self.hooks_out = spec.sites(self.kind)
        self.has_targets = self.hooks_in != self.hooks_out
        d_in, d_out = (sum(bucket[h].shape[1] for h in hooks) for hooks in self._sides)
        self.scales: list[list[float]] = [
            [self._scale(bucket, hook) for hook in hooks] for hooks in self._sides
        ]
        metadata = {"model_name": model_name, "hook_name": self.hooks_in[0], "prepend_bos": True}
        if self.has_targets:
            metadata["hook_name_out"] = self.hooks_out[0]
        self._random: dict[str, torch.Tensor] = {}
        with self._own_random():
            torch.manual_seed(spec.seed)
            self.sae = build(spec, d_in, d_out, metadata).to(device)
        ghost = 1.0 if spec.dead_coefficient is None else float(spec.dead_coefficient)
        self._objective = Objective(
            self.sae,
            max_grad_norm=float(spec.max_grad_norm),
            ghost=ghost if spec.dead_features == "ghost" else 0.0,
        )
        objective: Any = self._objective
        self.trainer: SAETrainer[Any, Any] = SAETrainer(self._config(), objective, iter(()))
        self.trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.trainer.optimizer, lambda step: lr_share(spec, step)
        )
        self._objective.watch(self.trainer.optimizer)

    def _config(self) -> SAETrainerConfig:
        spec = self.spec
        return SAETrainerConfig(
            total_training_samples=spec.steps * spec.batch_size,
            train_batch_size_samples=spec.batch_size,
            lr=spec.lr,
            lr_end=spec.lr,
            adam_beta1=spec.beta1,
            adam_beta2=spec.beta2,
            device=str(self.device),
            dead_feature_window=spec.dead_after,
            logger=LoggingConfig(log_to_wandb=False),
        )

    def _scale(self, bucket: Bucket, hook: str) -> float:
        if self.spec.scale in ("none", "layer_norm"):
            return 1.0
        x = bucket[hook]
        square = float(x.double().pow(2).sum(-1).mean())
        if square == 0:
            raise BadFileError(f"The activations at {hook!r} are all zero")
        return math.sqrt((x.shape[1] if self.spec.scale == "sqrt_d" else 1) / square)

    @property
    def _sides(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The hooks read and those reconstructed."""
        return self.hooks_in, self.hooks_out

    def tensors_of(
        self, bucket: Bucket, *, scaled: bool = False
    ) -> list[Float[torch.Tensor, "token _"]]:
        """What is read and what is reconstructed, each with all layers side by side."""
        sides = []
        for hooks, scales in zip(self._sides, self.scales, strict=True):
            tensors = [bucket[hook].to(self.device, torch.float32) for hook in hooks]
            if scaled:
                tensors = [scale * x for scale, x in zip(scales, tensors, strict=True)]
            sides.append(tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=-1))
        return sides

    def inputs(self, bucket: Bucket) -> Float[torch.Tensor, "token width"]:
        """What the dictionary is trained on, for some activations."""
        read, written = self.tensors_of(bucket, scaled=True)
        return torch.cat([read, written], dim=-1) if self.has_targets else read

    def step(self, batch: Bucket) -> TrainStepOutput:
        """One step."""
        with self._own_random():
            self.trainer.maybe_reset_sparsity()
            output = self.trainer.step(self.inputs(batch))
        self.trainer.n_training_steps += 1
        output.loss = output.loss * self._objective.max_grad_norm
        return output

    @contextmanager
    def _own_random(self) -> Iterator[None]:
        on_gpu = self.device.type == "cuda"
        with torch.random.fork_rng(devices=[self.device] if on_gpu else []):
            if self._random:
                torch.set_rng_state(self._random["cpu"])
                if on_gpu:
                    torch.cuda.set_rng_state(self._random["gpu"], self.device)
            yield
            self._random = {"cpu": torch.get_rng_state()}
            if on_gpu:
                self._random["gpu"] = torch.cuda.get_rng_state(self.device)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Weights, buffers, Adam's averages, firing counts and random states, by name."""
        tensors = {f"sae.{name}": value.detach() for name, value in self._state().items()}
        for name, parameter in self.sae.named_parameters():
            state = self.trainer.optimizer.state[parameter]
            tensors |= {f"adam.{name}.{key}": value for key, value in state.items()}
        tensors |= {f"count.{name}": getattr(self.trainer, name) for name in _COUNTS}
        return tensors | {f"random.{name}": value for name, value in self._random.items()}

    def _state(self) -> dict[str, torch.Tensor]:
        return dict(self.sae.named_parameters()) | dict(self.sae.named_buffers())

    def numbers(self) -> dict[str, Any]:
        """Everything else, as plain values."""
        trainer = self.trainer
        coefficients = {n: s.state_dict() for n, s in trainer.coefficient_schedulers.items()}
        return {
            "scales": self.scales,
            "counts": {name: getattr(trainer, name) for name in _NUMBERS},
            "coefficients": coefficients,
            "lr_scheduler": trainer.lr_scheduler.state_dict(),
            "groups": [
                {k: v for k, v in group.items() if k != "params"}
                for group in trainer.optimizer.param_groups
            ],
        }

    @torch.no_grad()
    def restore(self, tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> None:
        """Puts back what ``tensors`` and ``numbers`` gave."""
        state = self._state()
        names = {name.removeprefix("sae.") for name in tensors if name.startswith("sae.")}
        shapes = all(tensors[f"sae.{n}"].shape == state[n].shape for n in names & set(state))
        if names != set(state) or not shapes:
            raise BadFileError("The checkpoint holds a dictionary of other tensors or shapes")
        for name, value in state.items():
            value.copy_(tensors[f"sae.{name}"])
        trainer = self.trainer
        for name, parameter in self.sae.named_parameters():
            prefix = f"adam.{name}."
            moments = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
            # Adam counts its steps on the CPU.
            trainer.optimizer.state[parameter] = {
                key: value.clone() if key == "step" else value.to(parameter, copy=True)
                for key, value in moments.items()
            }
        for group, saved in zip(trainer.optimizer.param_groups, numbers["groups"], strict=True):
            group.update(saved)
        trainer.lr_scheduler.load_state_dict(numbers["lr_scheduler"])
        for name, state in numbers["coefficients"].items():
            trainer.coefficient_schedulers[name].load_state_dict(state)
        for name in _COUNTS:
            setattr(trainer, name, tensors[f"count.{name}"].to(self.device, copy=True))
        for name, value in numbers["counts"].items():
            setattr(trainer, name, value)
        if [len(side) for side in numbers["scales"]] != [len(side) for side in self.scales]:
            raise BadFileError("The checkpoint holds scales of other tensors")
        self.scales = [[float(scale) for scale in side] for side in numbers["scales"]]
        self._random = {
            name.removeprefix("random."): value.clone()
            for name, value in tensors.items()
            if name.startswith("random.")
        }


def lr_share(spec: TrainSpec, step: int) -> float:
    """Share of ``lr`` at a step: half a cosine from 0.1 to 1, then one from 1 to ``lr_end / lr``."""
    if step < spec.lr_warm_up:
        return 0.1 + 0.9 * (1 - math.cos(math.pi * step / spec.lr_warm_up)) / 2
    if spec.lr_end is None:
        return 1.0
    end, last = spec.lr_end / spec.lr, max(spec.steps - 1, spec.lr_warm_up + 1)
    done = min(1.0, (step - spec.lr_warm_up) / (last - spec.lr_warm_up))
    return end + (1 - end) * (1 + math.cos(math.pi * done)) / 2


class Objective:
    """Stands for a dictionary wherever SAELens' trainer uses it; ``ghost`` is a coefficient."""

    def __init__(self, sae: SAE, *, max_grad_norm: float, ghost: float) -> None:
        self.sae, self.max_grad_norm, self.ghost = sae, max_grad_norm, ghost

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sae, name)

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """The dictionary's own pass, with what is added."""
        output = self.sae.training_forward_pass(step_input=step_input)
        dead = step_input.dead_neuron_mask
        if self.ghost and dead is not None:
            residual = output.sae_in - output.sae_out
            loss = self.ghost * ghost_loss(residual, output.hidden_pre, self.sae.W_dec, dead)
            output.losses["ghost_loss"] = loss
            output.loss = output.loss + loss
        if not torch.isfinite(output.loss):
            parts = {name: value.item() for name, value in output.losses.items()}
            raise NotFiniteError(f"the loss is {output.loss.item()} ({parts})")
        output.loss = output.loss / self.max_grad_norm
        return output

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Checks and rescales the gradients before every step of an optimiser."""
        optimizer.register_step_pre_hook(lambda *_: self.prepare_gradients())

    @torch.no_grad()
    def prepare_gradients(self) -> None:
        """Checks the gradients of all parameters, and undoes the division of the loss."""
        gradients = [p.grad for p in self.sae.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if not torch.isfinite(norm):
            raise NotFiniteError(f"the norm of the gradients is {float(norm)}")
        if self.max_grad_norm != 1:
            torch._foreach_mul_(gradients, self.max_grad_norm)


def ghost_loss(
    residual: Float[torch.Tensor, "batch d_out"],
    pre: Float[torch.Tensor, "batch d_sae"],
    W_dec: Float[torch.Tensor, "d_sae d_out"],
    dead: Bool[torch.Tensor, " d_sae"],
) -> Float[torch.Tensor, ""]:
    """The loss of ghost gradients, zero where nothing is dead."""
    if not dead.any():
        return residual.new_zeros(())
    residual = residual.detach()
    ghost = torch.exp(pre[:, dead]) @ W_dec[dead]
    factor = residual.norm(dim=-1) / (_EPS + 2 * ghost.norm(dim=-1))
    error = (ghost * factor.detach()[:, None] - residual).pow(2).sum(-1)
    share = residual.pow(2).sum(-1) / (error + _EPS)
    return (error * share.detach()).mean()
