"""Dictionaries with hook points, run at their sites; what flows on and its cost: ``hooked_site.py``.

A crosscoder or cross-layer transcoder runs at all its sites, layer by layer. With ``f_i`` the features
that read layer ``i``, the tensor at output ``j`` is written by ``D_j(f_0, ..., f_j)``. The features of
each layer are those of the tensor that is there in this very pass, whatever earlier layers made of it,
so with the error dropped every MLP of the model is replaced at once. Names of sub-hooks start with the
output hook of the layer that the features read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float

import gemmascope_plugin.saes as saes
from gemmascope_plugin.errors import MissingHookError, ModelError
from gemmascope_plugin.models.finite import check_weights
from gemmascope_plugin.saes import Coder, Weights
from gemmascope_plugin.saes.coder import cross_layer_of
from gemmascope_plugin.saes.cross_layer import CrossLayerDictionary
from gemmascope_plugin.splice.edit import Edit
from gemmascope_plugin.splice.hooked_site import HookedSite
from gemmascope_plugin.splice.window import Positions, Window
from gemmascope_plugin.types import SAE, ErrorMode


class HookedSAE(HookedSite):
    """Gives an SAE or transcoder its hook points and runs it at its site.

    Args:
        sae: SAELens ``JumpReLUSAE``, ``JumpReLUTranscoder`` or ``JumpReLUSkipTranscoder``, or a
            ``TreeSAE``; its parameters are frozen.
        error: What becomes of the reconstruction error, see ``hooked_site.py``.
        exclude: Special tokens by name (``"bos"``, ``"eos"``, ``"pad"``) or id that are left alone.
            Gemma Scope was trained without them.
        positions: Positions where the dictionary works, everything else being left alone: an integer, a
            slice, a list, a boolean mask ``[pos]`` or ``[batch, pos]``; negative ones count from the
            end of the prompt. None for all.
        level: For Matryoshka dictionaries and trees the prefix to run: 0 for the coarsest, -1 for the
            whole.
        two_stage: Encode exactly but faster, with a low-precision pass first; costs one and a half
            times the memory of the encoder, and time once. See ``saes/two_stage.py``.

    Raises:
        ModelError: The dictionary is neither plain JumpReLU nor a tree, has many sites, no two stages,
            or a weight that is not finite.
        MissingHookError: The dictionary does not say which hooks it belongs to.
        UnknownNameError: An unknown error mode, or no such level.

    Example:
        >>> suite = gs.tiny()
        >>> sae = gs.HookedSAE(suite.load("res", 1), error="drop", positions=-1)
        >>> with gs.splice(suite.model, sae) as spliced:
        ...     logits = spliced("today the keys near the cabinet")
        >>> sae
        HookedSAE(blocks.1.hook_resid_post, d_in=128, d_sae=512, error='drop', exclude=('bos',
          'eos', 'pad'), positions=...)
    """

    def __init__(
        self,
        sae: SAE,
        *,
        error: ErrorMode = "keep",
        exclude: str | int | Sequence[str | int] = ("bos", "eos", "pad"),
        positions: Positions = None,
        level: int | None = None,
        two_stage: bool = False,
    ) -> None:
        if (layers := cross_layer_of(sae)) is not None:
            raise ModelError(
                f"A {layers.cfg.kind} has many sites, a HookedSAE has one",
                fix="splice(model, sae), or HookedCrossLayer(sae)",
            )
        weights = saes.coder_of(sae, level)
        hook_in, hook_out = _site(sae)
        check_weights(sae.named_parameters(), f"The dictionary at {hook_out}")
        super().__init__(
            hook_in,
            hook_out,
            error=error,
            exclude=exclude,
            positions=positions,
            two_stage=weights.make_two_stage() if two_stage else None,
        )
        self.sae = sae.requires_grad_(False).eval()
        self.level = level
        self._weights = weights

    @property
    def weights(self) -> Coder:
        """Encoder and decoder, cut to its level."""
        return self._weights

    @property
    def d_sae(self) -> int:
        """Number of features, those of the level if one was chosen."""
        return self._weights.d_sae

    @property
    def widths(self) -> tuple[int, int]:
        """``d_in`` and ``d_out``."""
        return self._weights.W_enc.shape[0], self._weights.W_dec.shape[1]

    @property
    def model_name(self) -> str:
        """The model that the dictionary says it belongs to."""
        return self.sae.cfg.metadata.model_name or "no model name"

    @property
    def sites(self) -> tuple[HookedSite, ...]:
        """Itself: it has one site."""
        return (self,)

    def decoder_from(self, position: int) -> Float[torch.Tensor, "d_sae d_out"]:
        """``W_dec``."""
        assert position == 0, "an SAE has one site"
        return self._weights.W_dec

    def with_error(self, error: ErrorMode) -> HookedSAE:
        """The same dictionary and choice of tokens with another error mode."""
        twin = HookedSAE(
            self.sae, error=error, exclude=self.exclude, positions=self.positions, level=self.level
        )
        twin.two_stage = self.two_stage
        return twin

    def __repr__(self) -> str:
        route = self.hook_out if not self.is_transcoder else f"{self.hook_in} -> {self.hook_out}"
        more = "" if self.level is None else f", level={self.level}"
        more += "" if self.positions is None else ", positions=..."
        more += "" if self.two_stage is None else ", two_stage=True"
        return (
            f"HookedSAE({route}, d_in={self.widths[0]}, d_sae={self.d_sae}, "
            f"error={self.error!r}, exclude={self.exclude}{more})"
        )

    def forward(
        self,
        x: Float[torch.Tensor, "batch pos ..."],
        y: Float[torch.Tensor, "batch pos ..."],
        keep: Bool[torch.Tensor, "batch pos"],
        edits: Sequence[Edit] = (),
    ) -> Float[torch.Tensor, "batch pos ..."]:
        """The tensor that takes the place of ``y``, outside any model.

        Args:
            x: Tensor at the input site.
            y: Tensor at the output site; the same tensor as ``x`` for an SAE.
            keep: False at excluded tokens.
            edits: Edits of this dictionary's features.

        Raises:
            WidthMismatchError: ``x`` or ``y`` has another width than the dictionary.
        """
        acts_hook = f"{self.name}.hook_sae_acts_post"
        bound = [edit.bind(acts_hook, self.d_sae) for edit in edits]
        return self.write(y, self.read(x, Window(keep), bound))


def _site(sae: SAE) -> tuple[str, str]:
    """Input and output hook that the dictionary names."""
    hook_in = sae.cfg.metadata.hook_name
    if not hook_in:
        raise MissingHookError(
            "The dictionary does not say which hook it belongs to",
            fix="gemmascope_plugin.load(spec), or set sae.cfg.metadata.hook_name",
        )
    hook_out = sae.cfg.metadata.hook_name_out
    if not hook_out and "transcoder" in sae.cfg.architecture():
        raise MissingHookError(
            f"The transcoder reads {hook_in} and does not say which hook it writes to",
            fix="gemmascope_plugin.load(spec), or set sae.cfg.metadata.hook_name_out",
        )
    return hook_in, hook_out or hook_in


class HookedLayer(HookedSite):
    """One layer of a cross-layer dictionary; its weights are opened when they are first needed.

    ``position`` is an index into ``dictionary.cfg.layers``.
    """

    def __init__(
        self,
        dictionary: CrossLayerDictionary,
        position: int,
        *,
        error: ErrorMode,
        exclude: str | int | Sequence[str | int],
        positions: Positions,
    ) -> None:
        cfg = dictionary.cfg
        super().__init__(
            cfg.hooks_in[position],
            cfg.hooks_out[position],
            error=error,
            exclude=exclude,
            positions=positions,
        )
        self.dictionary = dictionary
        self.position = position
        self.layer = cfg.layers[position]

    @property
    def weights(self) -> Weights:
        """Encoder, bias and skip of this layer."""
        return saes.layer_weights(self.dictionary, self.position)

    @property
    def d_sae(self) -> int:
        """Number of features that read this layer."""
        return self.dictionary.cfg.d_sae[self.position]

    @property
    def widths(self) -> tuple[int, int]:
        """``d_in`` and ``d_out``."""
        cfg = self.dictionary.cfg
        return cfg.d_in, cfg.d_out

    @property
    def model_name(self) -> str:
        """The model that the dictionary says it belongs to."""
        return self.dictionary.cfg.metadata.get("model_name") or "no model name"

    def decoder_from(self, position: int) -> Float[torch.Tensor, "d_sae d_out"]:
        """``W_dec_position[:, this layer]``, a view of the file."""
        return self.dictionary.weights(position).W_dec[:, self.position]


class HookedCrossLayer(torch.nn.Module):
    """Gives a crosscoder or cross-layer transcoder its hook points and runs it at its sites.

    Args:
        sae: ``CrossCoder`` or ``CrossLayerTranscoder``.
        error: What becomes of the reconstruction error at every output, see ``hooked_site.py``.
        exclude: Special tokens by name or id that are left alone.
        positions: Positions where the dictionary works; None for all.

    Raises:
        UnknownNameError: An unknown error mode.

    Example:
        >>> suite = gs.tiny()
        >>> tokens = suite.task("agreement").bind(suite.model).clean
        >>> spec = gs.TrainSpec(
        ...     architecture="jumprelu_crosscoder", layers=(1, 2), d_sae=32, steps=5, batch_size=64,
        ...     rows=8,
        ... )
        >>> sae = gs.train(suite.model, spec, tokens, progress=False)
        >>> with gs.splice(suite.model, gs.HookedCrossLayer(sae.dictionary(), error="drop")) as spliced:
        ...     logits = spliced("today the keys near the cabinet")
        >>> logits.shape
        torch.Size([1, 7, 462])
    """

    def __init__(
        self,
        sae: CrossLayerDictionary,
        *,
        error: ErrorMode = "keep",
        exclude: str | int | Sequence[str | int] = ("bos", "eos", "pad"),
        positions: Positions = None,
    ) -> None:
        super().__init__()
        self.sae = sae
        self.error: ErrorMode = error
        self.sites: tuple[HookedSite, ...] = tuple(
            HookedLayer(sae, position, error=error, exclude=exclude, positions=positions)
            for position in range(sae.cfg.n_layers)
        )

    def with_error(self, error: ErrorMode) -> HookedCrossLayer:
        """The same dictionary and choice of tokens with another error mode."""
        first = self.sites[0]
        return HookedCrossLayer(
            self.sae, error=error, exclude=first.exclude, positions=first.positions
        )

    def __repr__(self) -> str:
        cfg, first = self.sae.cfg, self.sites[0]
        return (
            f"HookedCrossLayer({cfg.kind} of layers {list(cfg.layers)}, d_in={cfg.d_in}, "
            f"d_sae={sum(cfg.d_sae)}, error={self.error!r}, exclude={first.exclude})"
        )
