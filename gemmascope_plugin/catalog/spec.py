"""What one dictionary is: a frozen record that names its file and the tensors it reads and writes.

Making one from a local folder reads the headers of its file, a few kB, and none of its values.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from gemmascope_plugin.catalog.cards import card
from gemmascope_plugin.catalog.sites import (
    HOOKS,
    KINDS,
    SITE_ALIASES,
    SITES,
    hooks,
    human_size,
    raw_nbytes,
    width_label,
)
from gemmascope_plugin.errors import BadFileError, UnknownNameError, nearest, shorten
from gemmascope_plugin.types import Kind, Provenance, Site

BUNDLED_PREFIX = "bundled/"
"""Repositories with this prefix lie inside the package; no network is needed."""


@dataclass(frozen=True, kw_only=True)
class SaeSpec:
    """One dictionary: where its file is, what it reads, what it writes, how large it is."""

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
    """Mean number of active features per token that the release declares."""
    hook_in: str
    """TransformerLens hook whose tensor is encoded."""
    hook_out: str
    """TransformerLens hook whose tensor is reconstructed; equals ``hook_in`` for an SAE."""
    nbytes: int
    """Size of the raw float32 parameters in bytes."""
    neuronpedia_id: str | None = None
    affine: bool = False
    """Whether the dictionary has an affine skip connection."""
    levels: tuple[int, ...] = ()
    """Matryoshka prefix sizes, smallest first; empty for a flat dictionary."""
    provenance: Provenance = "listed"
    canonical: bool = False
    """Whether the release calls this the canonical choice for its layer and width."""

    @property
    def filename(self) -> str:
        """Path of the parameter file inside the repository."""
        return str(PurePosixPath(self.path) / "params.npz")

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

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values."""
        return asdict(self)

    @classmethod
    def from_folder(
        cls, path: str | Path, *, model: str, site: str, layer: int, kind: str = "sae"
    ) -> SaeSpec:
        """A spec for a local ``params.npz`` of any model, in Gemma Scope's keys.

        Args:
            path: Folder that holds ``params.npz``.
            model: Name of the model, as you want to find it in results.
            site: ``res``, ``att``, ``mlp``, ``embedding`` or another name of one of them.
            layer: Zero-based layer.
            kind: ``sae`` or ``transcoder``.

        Returns:
            The spec, shapes read from the headers of the file.

        Raises:
            UnknownNameError: The site or the kind does not exist.
            MissingFileError: The folder has no ``params.npz``.
            BadFileError: The file has no ``W_enc`` and ``W_dec`` matrices.
        """
        known_kind, known_site = _known(kind, site)
        folder = Path(path).expanduser().resolve()
        d_in, d_sae, d_out = _shapes(folder / "params.npz")
        hook_in, hook_out = hooks(known_kind, known_site, layer)
        l0 = re.fullmatch(r"average_l0_(\d+(?:\.\d+)?)", folder.name)
        return cls(
            release="local",
            sae_id=folder.as_posix(),
            repo_id=folder.as_posix(),
            path=".",
            model=model,
            kind=known_kind,
            site=known_site,
            layer=layer,
            width=width_label(d_sae),
            d_in=d_in,
            d_out=d_out,
            d_sae=d_sae,
            l0=float(l0[1]) if l0 else None,
            hook_in=hook_in,
            hook_out=hook_out,
            nbytes=raw_nbytes(d_in, d_out, d_sae),
        )

    def _repr_html_(self) -> str:
        reads = self.hook_in if self.hook_in == self.hook_out else f"{self.hook_in} (read)"
        facts: list[tuple[str, object]] = [
            ("kind, site, layer", f"{self.kind}, {self.site}, {self.layer}"),
            ("model", self.model),
            ("hook", reads),
            ("shape", f"{self.d_in} -> {self.d_sae} -> {self.d_out}"),
            ("l0", "not declared" if self.l0 is None else f"{self.l0:g}"),
            ("size", human_size(self.nbytes)),
            ("file", f"{self.repo_id} {self.filename}"),
        ]
        if self.hook_in != self.hook_out:
            facts.insert(3, ("", f"{self.hook_out} (reconstructed)"))
        return card(f"{self.release} {self.sae_id}", facts)


def _known(kind: str, site: str) -> tuple[Kind, Site]:
    """The kind and the site meant by two words."""
    word = site.lower()
    if word in ("transcoder", "transcoders"):
        return "transcoder", "mlp"
    if word not in SITE_ALIASES:
        raise UnknownNameError(
            f"no site {site!r}", exists=shorten(SITES), nearest=nearest(site, SITE_ALIASES)
        )
    known_site = SITE_ALIASES[word]
    for known_kind in KINDS:
        if known_kind == kind and (known_kind, known_site) in HOOKS:
            return known_kind, known_site
    raise UnknownNameError(
        f"no dictionary of kind {kind!r} at site {known_site!r}",
        exists=shorten(f"{k} at {s}" for k, s in HOOKS),
        nearest=nearest(kind, {k for k, s in HOOKS if s == known_site}),
    )


def _shapes(file: Path) -> tuple[int, int, int]:
    """``d_in, d_sae, d_out`` of a file."""
    # Here, because zipfile is a third of the catalog's import time and only this needs it.
    from gemmascope_plugin.catalog.headers import read_headers

    members = {name: member.shape for name, member in read_headers(file).items()}
    encoder, decoder = members.get("W_enc", ()), members.get("W_dec", ())
    if len(encoder) != 2 or len(decoder) != 2 or encoder[1] != decoder[0]:
        raise BadFileError(
            f"{str(file)!r} has no matching matrices W_enc [d_in, d_sae] and W_dec [d_sae, d_out]",
            exists=shorten(f"{name} {list(shape)}" for name, shape in members.items()),
        )
    return encoder[0], encoder[1], decoder[1]
