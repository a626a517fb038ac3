"""What some rows say about the next token, computed when somebody asks: named words, or all of them.

``OfResiduals`` knows the end of the residual stream and goes through the vocabulary in tiles, see
``unembed.py``; ``OfLogits`` has the logits, where somebody else's hook has made them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int

from gemmascope_plugin.models.protocol import HookedModel, wide
from gemmascope_plugin.models.unembed import (
    Rows,
    Unembedding,
    Values,
    all_logits,
    divergence,
    log_normaliser,
    top_logits,
    unembedding,
)

Row = Float[torch.Tensor, " row"]


class Readout(ABC):
    """The next token of some rows; logits in float32 at least, after the soft-cap by default."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows."""

    @abstractmethod
    def rows(self, index: slice | torch.Tensor) -> Readout:
        """Some of the rows."""

    @abstractmethod
    def pick(self, ids: Int[torch.Tensor, "row choice"]) -> Float[torch.Tensor, "row choice"]:
        """Logits of some words, of other ones in every row."""

    @abstractmethod
    def log_normaliser(self) -> Row:
        """Log-sum-exp of all logits."""

    @abstractmethod
    def all(self) -> Float[torch.Tensor, "row d_vocab"]:
        """Every logit."""

    @abstractmethod
    def top(
        self, k: int
    ) -> tuple[
        Float[torch.Tensor, "row k"], Int[torch.Tensor, "row k"], Float[torch.Tensor, " row"]
    ]:
        """The largest logits, the words that have them, and the log-sum-exp; without gradients."""

    @abstractmethod
    def divergence_from(self, reference: Readout) -> Row:
        """``KL(reference || this)`` in nats; the reference is held."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the rows are."""

    def log_probs(self, ids: Int[torch.Tensor, "row choice"]) -> Float[torch.Tensor, "row choice"]:
        """Log-probabilities of some words."""
        return self.pick(ids) - self.log_normaliser()[:, None]


@dataclass(frozen=True, eq=False)
class OfResiduals(Readout):
    """From the end of the residual stream."""

    out: Unembedding
    x: Float[torch.Tensor, "row d_model"]
    """What the unembedding reads, from ``Unembedding.read``."""

    def __len__(self) -> int:
        return len(self.x)

    def rows(self, index: slice | torch.Tensor) -> OfResiduals:
        """Some of the rows."""
        return OfResiduals(self.out, self.x[index])

    def pick(self, ids: Int[torch.Tensor, "row choice"]) -> Float[torch.Tensor, "row choice"]:
        """Logits of some words: their rows of the weight and no others."""
        return self.out.logits_each(self.x, ids)

    def log_normaliser(self) -> Row:
        """In tiles."""
        return log_normaliser(self.out, self.x)

    def all(self) -> Float[torch.Tensor, "row d_vocab"]:
        """All at once."""
        return all_logits(self.out, self.x)

    def top(
        self, k: int
    ) -> tuple[
        Float[torch.Tensor, "row k"], Int[torch.Tensor, "row k"], Float[torch.Tensor, " row"]
    ]:
        """In tiles."""
        return top_logits(self.out, self.x, k)

    def divergence_from(self, reference: Readout) -> Row:
        """In tiles, where the reference is a residual as well."""
        if isinstance(reference, OfResiduals):
            return divergence(self.out, reference.x, self.x)
        return OfLogits(self.all()).divergence_from(reference)

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.x.device


@dataclass(frozen=True, eq=False)
class OfLogits(Readout):
    """From logits that there are anyway."""

    logits: Float[torch.Tensor, "row d_vocab"]

    @classmethod
    def of(cls, logits: Float[torch.Tensor, "row d_vocab"]) -> OfLogits:
        """In float32 at least."""
        return cls(wide(logits))

    def __len__(self) -> int:
        return len(self.logits)

    def rows(self, index: slice | torch.Tensor) -> OfLogits:
        """Some of the rows."""
        return OfLogits(self.logits[index])

    def pick(self, ids: Int[torch.Tensor, "row choice"]) -> Float[torch.Tensor, "row choice"]:
        """Logits of some words."""
        return self.logits.gather(-1, ids)

    def log_normaliser(self) -> Row:
        """Of all logits."""
        return self.logits.logsumexp(-1)

    def all(self) -> Float[torch.Tensor, "row d_vocab"]:
        """As they are."""
        return self.logits

    def top(
        self, k: int
    ) -> tuple[
        Float[torch.Tensor, "row k"], Int[torch.Tensor, "row k"], Float[torch.Tensor, " row"]
    ]:
        """Of all logits."""
        best = self.logits.detach().topk(k)
        return best.values, best.indices, self.log_normaliser().detach()

    def divergence_from(self, reference: Readout) -> Row:
        """From both distributions, held at once."""
        p = reference.all().detach().log_softmax(-1)
        return (p.exp() * (p - self.logits.log_softmax(-1))).sum(-1)

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.logits.device


def cross_entropy(
    model: HookedModel,
    resid: Rows,
    targets: Int[torch.Tensor, "*rows"],
    *,
    normed: bool = False,
) -> Values:
    """Minus the log-probability of one token at each residual, in nats.

    ``normed`` residuals have been through the final norm already, as ``unembed.hook_in`` has.
    """
    out = unembedding(model)
    x = out.read(resid, normed=normed)
    return log_normaliser(out, x) - out.logits_each(x, targets[..., None])[..., 0]
