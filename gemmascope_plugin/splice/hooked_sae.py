"""Dictionaries with hook points, run at their sites; what flows on and its cost: ``hooked_site.py``.

A crosscoder or cross-layer transcoder runs at all its sites, layer by layer. With ``f_i`` the features
that read layer ``i``, the tensor at output ``j`` is written by ``D_j(f_0, ..., f_j)``. The features of
each layer are those of the tensor that is there in this very pass, whatever earlier layers made of it,
so with the error dropped every MLP of the model is replaced at once. Names of sub-hooks start with the
output hook of the layer that the features read.

The gate for dictionaries stands at the end: what may stand where SAEs do, and what to type where
something else does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float

import gemmascope_plugin.saes as saes
from gemmascope_plugin.catalog import SaeSpec
from gemmascope_plugin.errors import InputError, MissingHookError, ModelError, UnknownNameError
from gemmascope_plugin.models.protocol import check_weights, describe, is_model, with_call
from gemmascope_plugin.saes import Coder
from gemmascope_plugin.saes.coder import cross_layer_of
from gemmascope_plugin.splice.edit import Edit
from gemmascope_plugin.splice.hooked_site import HookedLayer, HookedSite
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


class HookedCrossLayer(torch.nn.Module):
    """Gives a crosscoder or cross-layer transcoder its hook points and runs it at its sites.

    Args:
        sae: ``CrossCoder`` or ``CrossLayerTranscoder`` as files give them, or ``CrossCoderSAE`` or
            ``CLTSAE`` as training does.
        error: What becomes of the reconstruction error at every output, see ``hooked_site.py``.
        exclude: Special tokens by name or id that are left alone.
        positions: Positions where the dictionary works; None for all.

    Raises:
        ModelError: The dictionary has one site.
        UnknownNameError: An unknown error mode.

    Example:
        >>> suite = gs.tiny()
        >>> tokens = suite.task("agreement").bind(suite.model).clean
        >>> spec = gs.TrainSpec(
        ...     architecture="jumprelu_crosscoder", layers=(1, 2), d_sae=32, steps=5, batch_size=64,
        ...     rows=8,
        ... )
        >>> sae = gs.train(suite.model, spec, tokens, progress=False)
        >>> with gs.splice(suite.model, gs.HookedCrossLayer(sae, error="drop")) as spliced:
        ...     logits = spliced("today the keys near the cabinet")
        >>> logits.shape
        torch.Size([1, 7, 462])
    """

    def __init__(
        self,
        sae: SAE,
        *,
        error: ErrorMode = "keep",
        exclude: str | int | Sequence[str | int] = ("bos", "eos", "pad"),
        positions: Positions = None,
    ) -> None:
        super().__init__()
        dictionary = cross_layer_of(sae)
        if dictionary is None:
            raise ModelError(
                f"A {sae.cfg.architecture()} has one site, a HookedCrossLayer has many",
                fix="splice(model, sae), or HookedSAE(sae)",
            )
        self.sae = dictionary
        self.source = sae
        """What was given, of which ``sae`` holds views."""
        self.error: ErrorMode = error
        self.sites: tuple[HookedSite, ...] = tuple(
            HookedLayer(dictionary, position, error=error, exclude=exclude, positions=positions)
            for position in range(dictionary.cfg.n_layers)
        )

    def with_error(self, error: ErrorMode) -> HookedCrossLayer:
        """The same dictionary and choice of tokens with another error mode."""
        first = self.sites[0]
        return HookedCrossLayer(
            self.source, error=error, exclude=first.exclude, positions=first.positions
        )

    def __repr__(self) -> str:
        cfg, first = self.sae.cfg, self.sites[0]
        return (
            f"HookedCrossLayer({cfg.kind} of layers {list(cfg.layers)}, d_in={cfg.d_in}, "
            f"d_sae={sum(cfg.d_sae)}, error={self.error!r}, exclude={first.exclude})"
        )


Hooked = HookedSAE | HookedCrossLayer
Saes = SAE | Hooked | Iterable[Any] | Mapping[Any, Any] | None
"""One dictionary, hooked or not, a sequence of them, or a mapping whose values they are."""


def check_saes(saes: object, call: str = "") -> None:
    """Refuses what is not one dictionary or several; None passes, where they may be left out."""
    if saes is None or hasattr(saes, "specs") and isinstance(saes, Mapping):
        return  # a suite opens its dictionaries when they are asked for
    for sae in as_list(saes, call):
        check_sae(sae, call)


def check_sae(sae: object, call: str = "") -> None:
    """Refuses what is not one dictionary, with what to type."""
    if isinstance(sae, HookedSite) or _is_dictionary(sae):
        return
    if isinstance(sae, (list, tuple)) and len(sae) and all(map(_is_dictionary, sae)):
        raise InputError(
            f"One dictionary is meant here, {len(sae)} were given",
            fix=f"{call} once for each" if call else "one call for each",
        )
    raise _no_dictionary(sae, call)


def as_list(saes: object, call: str = "") -> list[Any]:
    """One dictionary, a sequence or a mapping as a list, which is not empty."""
    if isinstance(saes, torch.nn.Module):
        return [saes]
    if isinstance(saes, (str, bytes)) or not isinstance(saes, Iterable):
        raise _no_dictionary(saes, call)
    listed = list(saes.values()) if isinstance(saes, Mapping) else list(saes)
    if not listed:
        fix = with_call("gemmascope_plugin.load(spec) for one", call)
        raise UnknownNameError("No dictionary was given", fix=fix)
    return listed


def _is_dictionary(sae: object) -> bool:
    if not isinstance(sae, torch.nn.Module) or is_model(sae):
        return False
    if isinstance(sae, HookedSite) or cross_layer_of(sae) is not None or hasattr(sae, "sites"):
        return True
    # of which architectures something can be made is said where it is made
    return hasattr(sae, "W_dec") or hasattr(getattr(sae, "cfg", None), "architecture")


def _no_dictionary(value: object, call: str) -> InputError:
    order = f"{call}: the model first, then dictionaries" if call else "a loaded dictionary"
    if isinstance(value, SaeSpec):
        fix = "gemmascope_plugin.load(spec), or load_suite(specs) for several"
    elif isinstance(value, (list, tuple)) and value and isinstance(value[0], (SaeSpec, str)):
        fix = "[gemmascope_plugin.load(spec) for spec in specs], or load_suite(specs)"
    elif isinstance(value, str):
        fix = f"gemmascope_plugin.load((release, sae_id)) for a dictionary; {order}"
    elif is_model(value):
        return InputError(
            "The model stands where a dictionary belongs",
            fix=order if call else "the model first, then dictionaries",
        )
    else:
        fix = f"gemmascope_plugin.load(spec); {order}"
    return InputError(f"{describe(value)} is not a loaded dictionary", fix=fix)


def as_hooked(
    sae: SAE | Hooked,
    error: ErrorMode,
    exclude: str | int | Sequence[str | int],
    positions: Positions,
) -> Hooked:
    """The dictionary with hook points; what has them keeps its own options."""
    if isinstance(sae, Hooked):
        return sae
    check_sae(sae)
    if cross_layer_of(sae) is not None:
        return HookedCrossLayer(sae, error=error, exclude=exclude, positions=positions)
    return HookedSAE(sae, error=error, exclude=exclude, positions=positions)
