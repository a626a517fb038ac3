"""What one dictionary is: a frozen record that names its file and the tensors it reads and writes.

One object for every kind of dictionary; what follows from the fields (files, hooks of all layers,
pages) is a property.  Making one from a local folder reads the headers of its file, a few kB.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

from gemmascope_plugin.arguments import human_size
from gemmascope_plugin.catalog.folder import folder_fields, layers_fields
from gemmascope_plugin.catalog.site_names import (
    CONFIG_FILES,
    PARAMETER_FILES,
    Format,
    Gain,
    L0Kind,
    at_layer,
)
from gemmascope_plugin.types import Kind, Provenance, Site

BUNDLED_PREFIX = "bundled/"
"""Repositories with this prefix lie inside the package; no network is needed."""

PROVENANCE_TEXT: dict[Provenance, str] = {
    "listed": "listed",
    "derived": "derived: follows from the published pattern, not seen in a listing",
}


@dataclass(frozen=True, kw_only=True)
class SaeSpec:
    """One dictionary: where its file is, what it reads, what it writes, how large it is.

    Example:
        >>> spec = gs.find(model="2b", site="res", layer=12, width="16k", l0="canonical").one()
        >>> spec.hook_out, spec.d_sae, spec.l0
        ('blocks.12.hook_resid_post', 16384, 82.0)
    """

    release: str
    """Name of the release in SAELens' registry, e.g. ``gemma-scope-2b-pt-res``."""
    sae_id: str
    """Id within the release, e.g. ``layer_20/width_16k/average_l0_71``."""
    repo_id: str
    """Repository, e.g. ``google/gemma-scope-2b-pt-res``."""
    path: str
    """Folder inside the repository."""
    model: str
    """Model name, e.g. ``gemma-2-2b``."""
    kind: Kind
    site: Site
    layer: int
    width: str
    """Label of the number of features, e.g. ``16k``."""
    d_in: int
    d_out: int
    d_sae: int
    l0: int | float | None
    """Active features per token that the release declares; ``l0_is`` says what kind of number."""
    hook_in: str
    """TransformerLens hook whose tensor is encoded, at ``layer``; ``hooks_in`` has all of them."""
    hook_out: str
    """TransformerLens hook whose tensor is reconstructed, at ``layer``; equals ``hook_in`` for an
    SAE."""
    nbytes: int
    """Size of the raw float32 parameters in bytes."""
    neuronpedia_id: str | None = None
    affine: bool = False
    """Whether the dictionary has an affine skip connection."""
    levels: tuple[int, ...] = ()
    """Matryoshka prefix sizes, smallest first; empty for a flat dictionary."""
    provenance: Provenance = "listed"
    canonical: bool = False
    """Whether this is the canonical choice for its layer and width: L0 nearest to 100."""
    format: Format = "npz"
    """How the files are laid out and keyed; ``filenames`` follows from it."""
    l0_is: L0Kind = "measured"
    """Whether ``l0`` was measured after training or is the target that training aimed at."""
    l0_label: str | None = None
    """Gemma Scope 2's word for the sparsity: ``small``, ``medium`` or ``big``."""
    gain: Gain = "without"
    """Whether the tensor read carries the gain of the norm before the MLP.  ``with`` for the
    transcoders and CLTs of Gemma Scope 2 only; ``without`` for everything else, Gemma Scope 1's
    transcoders and all dictionaries that read no such norm."""
    variant: str | None = None
    """What tells dictionaries of one site, layer, width and L0 apart: ``all`` (the suite that covers
    every layer), ``seed_1`` (another initialisation), ``snap``, ``tree-4``; None for the plain one."""
    layers: tuple[int, ...] = ()
    """All layers that a crosscoder or CLT reads and writes, ``layer`` being the first; empty for a
    dictionary of one layer.  ``d_in`` and ``d_out`` are those of one layer, ``d_sae`` is the total
    over the layers."""

    @property
    def filename(self) -> str:
        """Path of the (first) parameter file inside the repository."""
        return self._in_folder(PARAMETER_FILES[self.format].format(0))

    @property
    def filenames(self) -> tuple[str, ...]:
        """Paths of all parameter files inside the repository, never of examples.

        Crosscoders and CLTs have one file per layer, ``params_layer_0`` belonging to ``layers[0]``.
        """
        name = PARAMETER_FILES[self.format]
        return tuple(self._in_folder(name.format(i)) for i in range(len(self.layers) or 1))

    @property
    def config_filename(self) -> str | None:
        """Path of the JSON beside the parameters; None where the format has none.

        ``sae_lens`` and ``tree`` cannot be read without it; a few folders of Gemma Scope 2 were
        published without theirs, so there it may be absent.
        """
        name = CONFIG_FILES[self.format]
        return None if name is None else self._in_folder(name)

    @property
    def all_layers(self) -> tuple[int, ...]:
        """Every layer that is read: ``layers``, or the one layer."""
        return self.layers or (self.layer,)

    @property
    def hooks_in(self) -> tuple[str, ...]:
        """The hook read at each of ``all_layers``."""
        return tuple(at_layer(self.hook_in, self.layer, layer) for layer in self.all_layers)

    @property
    def hooks_out(self) -> tuple[str, ...]:
        """The hook reconstructed at each of ``all_layers``."""
        return tuple(at_layer(self.hook_out, self.layer, layer) for layer in self.all_layers)

    @property
    def d_sae_per_layer(self) -> int:
        """Features whose encoder reads one layer; all of them for a dictionary of one layer."""
        return self.d_sae // len(self.all_layers)

    def _in_folder(self, name: str) -> str:
        return str(PurePosixPath(self.path) / name)

    @property
    def bundled(self) -> bool:
        """Whether the file is part of this package."""
        return self.repo_id.startswith(BUNDLED_PREFIX)

    @property
    def local(self) -> bool:
        """Whether the file lies in a folder of this machine, which ``repo_id`` then names."""
        return Path(self.repo_id).is_absolute()

    @property
    def url(self) -> str | None:
        """Page of the repository folder; None for bundled dictionaries and local folders."""
        if self.bundled or self.local or "/" not in self.repo_id:
            return None
        return f"https://huggingface.co/{self.repo_id}/tree/main/{self.path}"

    @property
    def neuronpedia_url(self) -> str | None:
        """Neuronpedia's page of the dictionary, where it has one."""
        page = self.neuronpedia_id
        return None if page is None else f"https://www.neuronpedia.org/{page}"

    @property
    def l0_text(self) -> str:
        """The L0 for tables: ``71`` measured, ``target 60``, or the label alone."""
        if self.l0 is None:
            return self.l0_label or ""
        return f"target {self.l0:g}" if self.l0_is == "target" else f"{self.l0:g}"

    @property
    def layer_text(self) -> str:
        """The layer for tables; ``5,9,12,15`` or ``0-25`` where there are several."""
        if len(self.layers) > 4:
            return f"{self.layers[0]}-{self.layers[-1]}"
        return ",".join(map(str, self.all_layers))

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_folder(
        cls,
        path: str | Path,
        *,
        model: str,
        site: str,
        layer: int,
        kind: str = "sae",
        gain: Gain | None = None,
    ) -> SaeSpec:
        """A spec for a local ``params.npz`` or ``params.safetensors`` of any model.

        Args:
            path: Folder that holds the file, in Gemma Scope's keys.
            model: Name of the model, as you want to find it in results.
            site: ``res``, ``att``, ``mlp``, ``embedding`` or another name of one of them.
            layer: Zero-based layer.
            kind: ``sae`` or ``transcoder``.
            gain: Whether a transcoder reads the norm's output ``with`` or ``without`` the gain; by
                default what ``config.json`` says; where it says nothing, without for ``.npz`` and with
                for ``.safetensors``, as the two suites do.

        Returns:
            The spec, shapes read from the headers of the file.

        Raises:
            UnknownNameError: The site or the kind does not exist.
            MissingFileError: The folder has neither file.
            BadFileError: The file has no matching encoder and decoder matrices.
        """
        return cls(**folder_fields(path, model=model, site=site, layer=layer, kind=kind, gain=gain))

    @classmethod
    def from_layers_folder(
        cls,
        path: str | Path,
        *,
        model: str,
        kind: str,
        layers: Sequence[int] | None = None,
        gain: Gain | None = None,
    ) -> SaeSpec:
        """A spec for a local crosscoder or CLT of any model, one file per layer.

        Args:
            path: Folder that holds ``params_layer_0.safetensors`` and so on, in Gemma Scope 2's keys.
            model: Name of the model, as you want to find it in results.
            kind: ``crosscoder`` or ``clt``.
            layers: The model's layers, one for each file; by default those in its ``config.json`` or
                its name, or all from 0.
            gain: Whether a CLT reads the norm's output ``with`` or ``without`` the gain; by default what
                ``config.json`` says, and ``with`` where it says nothing, as in Gemma Scope 2.

        Returns:
            The spec, shapes read from the header of the first file.

        Raises:
            UnknownNameError: There is no such kind.
            MissingFileError: The folder has no such files.
            BadFileError: Not one layer for each file, no matching encoder and decoder, or a damaged
                ``config.json``.
        """
        return cls(**layers_fields(path, model=model, kind=kind, layers=layers, gain=gain))

    def facts(self) -> list[tuple[str, str]]:
        """What a person wants to know, as pairs of name and text."""
        norm = f"{self.gain} the gain of the norm before it"
        reads = f", {norm}" if self.kind in ("transcoder", "clt") else ""
        shape = f"{self.d_in} -> {self.d_sae} -> {self.d_out}"
        several = len(self.all_layers) > 1
        pairs: list[tuple[str, object]] = [
            ("kind, site", f"{self.kind}, {self.site}"),
            ("model", self.model),
            ("layers" if several else "layer", self.layer_text),
            (
                "reads",
                self.hook_in + (" and the same of the other layers" if several else "") + reads,
            ),
            ("reconstructs", self.hook_out if self.hook_out != self.hook_in else "the same"),
            ("shape", shape + (f", {self.d_sae_per_layer} features a layer" if several else "")),
            ("width", self.width),
            ("l0", self._l0_fact()),
            ("affine skip", "yes" if self.affine else "no"),
            ("variant", self.variant or "plain"),
            ("levels", ", ".join(map(str, self.levels))),
            ("canonical", "yes" if self.canonical else "no"),
            ("size", human_size(self.nbytes)),
            ("format", self.format),
            ("repository", self.repo_id),
            ("file", self.filename + (f" and {len(self.filenames) - 1} more" if several else "")),
            ("provenance", PROVENANCE_TEXT[self.provenance]),
            ("url", self.url or ""),
            ("neuronpedia", self.neuronpedia_url or ""),
        ]
        return [(name, str(value)) for name, value in pairs if value != ""]

    def _l0_fact(self) -> str:
        if self.l0 is None:
            return f"{self.l0_label}, target not published" if self.l0_label else "not declared"
        label = f" ({self.l0_label})" if self.l0_label else ""
        return f"{self.l0:g} {self.l0_is}{label}"

    def _repr_html_(self) -> str:
        from gemmascope_plugin.figures.fragments import card

        return card(f"{self.release} {self.sae_id}", self.facts())


DEFAULTS: dict[str, Any] = {f.name: f.default for f in fields(SaeSpec) if f.default is not MISSING}
"""Fields that need not be given, and what they are then."""


def unchecked(values: dict[str, Any]) -> SaeSpec:
    """A spec that owns ``values``, which must hold every field (see ``DEFAULTS``).

    The constructor of a frozen dataclass sets field by field and costs five times as much, and the
    tables make 12,000 specs.
    """
    spec = object.__new__(SaeSpec)
    object.__setattr__(spec, "__dict__", values)
    return spec
