"""What ``verify`` found out about a dictionary in a model: figures, a verdict and its reasons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from gemmascope_plugin.catalog.cards import card
from gemmascope_plugin.catalog.site_names import L0Kind
from gemmascope_plugin.splice.fit import Fit
from gemmascope_plugin.splice.losses import Losses

Verdict = Literal["fits", "does not fit"]


@dataclass(frozen=True, kw_only=True)
class Report:
    """A dictionary in a model, on some text."""

    hook_in: str
    """The tensor that was read."""
    hook_out: str
    """The tensor that was reconstructed."""
    l0: float
    """Mean number of active features per token that is not excluded."""
    declared_l0: float | None
    """What the release says; None when it says nothing."""
    l0_is: L0Kind
    """Whether the declared L0 was measured after training or is the target of training."""
    fvu: float
    """Squared error over squared distance from the mean; NaN for a single token."""
    bos_l0: float | None
    """Active features at BOS, where no Gemma Scope dictionary was trained; None without any BOS."""
    losses: Losses
    """Next-token losses in nats: clean, spliced, with the error kept, with the site at zero."""
    n_tokens: int
    """Tokens that were measured."""
    exclude: tuple[str | int, ...]
    """Special tokens that were left out."""
    causes: tuple[str, ...] = ()
    """What is wrong, in a word or two each: ``wrong site``, ``wrong layer``, ``gain missing``, ``gain
    doubled``, ``BOS included``, ``BOS left out``, ``folded norms``, ``wrong model``; empty when the
    dictionary fits."""
    findings: tuple[str, ...] = ()
    """What looks wrong and the likely cause, a short text each."""
    tried: tuple[Fit, ...] = ()
    """What was measured under other tensors."""

    @property
    def verdict(self) -> Verdict:
        """Whether the dictionary belongs where it says, in this model."""
        return "does not fit" if self.causes else "fits"

    @property
    def fits(self) -> bool:
        """The verdict as a truth value."""
        return not self.causes

    @property
    def delta_loss(self) -> float:
        """Rise of the loss when only the reconstruction flows, in nats; NaN if it cannot be spliced."""
        return self.losses.spliced - self.losses.clean

    @property
    def delta_loss_kept(self) -> float:
        """Rise of the loss with the error added back; zero but for rounding."""
        return self.losses.kept - self.losses.clean

    @property
    def delta_loss_share(self) -> float:
        """:attr:`delta_loss` as a share of the rise when the site is set to zero."""
        rise = self.losses.zeroed - self.losses.clean
        return self.delta_loss / rise if rise else float("nan")

    def facts(self) -> list[tuple[str, str]]:
        """Pairs of name and text, as ``repr`` shows them."""
        route = (
            self.hook_out if self.hook_in == self.hook_out else f"{self.hook_in} -> {self.hook_out}"
        )
        loss = self.losses
        pairs = [
            ("verdict", self.verdict + (f": {', '.join(self.causes)}" if self.causes else "")),
            ("site", route),
            (
                "tokens",
                f"{self.n_tokens} (excluded: {', '.join(map(str, self.exclude)) or 'none'})",
            ),
            ("l0", f"{self.l0:.1f} ({self._declared()})"),
            ("l0 at BOS", "no BOS in the text" if self.bos_l0 is None else f"{self.bos_l0:.1f}"),
            ("fvu", f"{self.fvu:.3g}"),
            (
                "loss",
                f"{loss.clean:.4f} clean, {loss.spliced:.4f} spliced, {loss.zeroed:.4f} zeroed",
            ),
            ("delta loss", f"{self.delta_loss:+.4f}, {self.delta_loss_share:.2%} of zeroing"),
            ("with the error kept", f"{self.delta_loss_kept:+.1e}"),
        ]
        return pairs + [("finding", finding) for finding in self.findings]

    def _declared(self) -> str:
        if self.declared_l0 is None:
            return "none declared"
        return f"declared {self.declared_l0:g}{', a target' if self.l0_is == 'target' else ''}"

    def to_frame(self) -> Any:
        """A DataFrame of one row with every figure; rows of several reports can be concatenated."""
        import pandas as pd

        loss = self.losses
        row = {
            "hook_in": self.hook_in,
            "hook_out": self.hook_out,
            "verdict": self.verdict,
            "causes": ", ".join(self.causes),
            "l0": self.l0,
            "declared_l0": self.declared_l0,
            "l0_is": self.l0_is,
            "bos_l0": self.bos_l0,
            "fvu": self.fvu,
            "loss_clean": loss.clean,
            "loss_spliced": loss.spliced,
            "loss_kept": loss.kept,
            "loss_zeroed": loss.zeroed,
            "delta_loss": self.delta_loss,
            "delta_loss_share": self.delta_loss_share,
            "n_tokens": self.n_tokens,
            "exclude": ", ".join(map(str, self.exclude)),
            "findings": " ".join(self.findings),
        }
        return pd.DataFrame([row])

    def tried_frame(self) -> Any:
        """A DataFrame with one row per tensor that was tried beside the dictionary's own."""
        import pandas as pd

        columns = ["tensor", "would_mean", "l0", "fvu", "n_tokens"]
        rows = [(f.candidate.what, f.candidate.cause, f.l0, f.fvu, f.n_tokens) for f in self.tried]
        return pd.DataFrame(rows, columns=columns)

    def __repr__(self) -> str:
        return "Report\n" + "\n".join(f"  {name}: {text}" for name, text in self.facts())

    def _repr_html_(self) -> str:
        return card("verify", self.facts())
