"""The words of the catalog: sites and their aliases, hook names, width labels, sizes.

A site is where a dictionary lives; the hook is the TransformerLens name of the tensor there.

1. A transcoder of Gemma Scope 1 reads the normalised MLP input *without* the gain of the norm
   (``ln2.hook_normalized``) and writes ``hook_mlp_out``, after the post-norm.
2. An attention dictionary reads the head outputs ``z``, heads flattened, before ``W_O``.
3. An embedding dictionary reads ``hook_embed``, which carries the factor sqrt(d_model).

Costs nothing: no imports beyond the standard library.
"""

from __future__ import annotations

from typing import get_args

from gemmascope_plugin.types import Kind, Site

SITES: tuple[Site, ...] = get_args(Site)
KINDS: tuple[Kind, ...] = get_args(Kind)

SITE_ALIASES: dict[str, Site] = {
    **{site: site for site in SITES},
    **dict.fromkeys(("resid_post", "residual", "resid", "hook_resid_post"), "res"),
    **dict.fromkeys(
        ("attn", "attention", "attn_out", "attn_z", "z", "hook_z", "attn.hook_z"), "att"
    ),
    **dict.fromkeys(("mlp_out", "hook_mlp_out"), "mlp"),
    **dict.fromkeys(("embed", "emb", "hook_embed"), "embedding"),
}
"""Other names of a site; ``transcoder`` is not a site but a kind, see ``TRANSCODER_WORDS``."""

TRANSCODER_WORDS = ("transcoder", "transcoders")

HOOKS: dict[tuple[Kind, Site], tuple[str, str]] = {
    ("sae", "res"): ("blocks.{layer}.hook_resid_post", "blocks.{layer}.hook_resid_post"),
    ("sae", "att"): ("blocks.{layer}.attn.hook_z", "blocks.{layer}.attn.hook_z"),
    ("sae", "mlp"): ("blocks.{layer}.hook_mlp_out", "blocks.{layer}.hook_mlp_out"),
    ("sae", "embedding"): ("hook_embed", "hook_embed"),
    ("transcoder", "mlp"): ("blocks.{layer}.ln2.hook_normalized", "blocks.{layer}.hook_mlp_out"),
}
"""Templates of (hook read, hook reconstructed)."""

WIDTHS: dict[str, int] = {
    "4k": 1 << 12,
    "16k": 1 << 14,
    "32k": 1 << 15,
    "65k": 1 << 16,
    "131k": 1 << 17,
    "262k": 1 << 18,
    "524k": 1 << 19,
    "1m": 1 << 20,
}
"""Gemma Scope's width labels; they are powers of two although they read like thousands."""

STANDARD_PATH = "layer_{layer}/width_{width}/average_l0_{l0:.0f}"
EMBEDDING_PATH = "embedding/width_{width}/average_l0_{l0:.0f}"


def standard_path(layer: int, width: str, l0: int | float) -> str:
    """Gemma Scope's folder of one dictionary, ``l0`` rounded to an integer.

    Args:
        layer: Zero-based layer.
        width: Width label, e.g. ``16k`` or ``512``.
        l0: Mean number of active features per token.

    Returns:
        E.g. ``layer_20/width_16k/average_l0_71``.
    """
    return STANDARD_PATH.format(layer=layer, width=width, l0=l0)


def width_label(d_sae: int) -> str:
    """Gemma Scope's label of a number of features; the number itself where there is none."""
    return next((label for label, width in WIDTHS.items() if width == d_sae), str(d_sae))


def hooks(kind: Kind, site: Site, layer: int) -> tuple[str, str]:
    """TransformerLens names of the tensor read and the tensor reconstructed.

    Raises:
        KeyError: When no single-layer dictionary of this kind lives at the site.
    """
    read, written = HOOKS[kind, site]
    return read.format(layer=layer), written.format(layer=layer)


def raw_nbytes(d_in: int, d_out: int, d_sae: int, *, affine: bool = False) -> int:
    """Size of the float32 parameters: both matrices, two feature vectors, one output bias."""
    return 4 * (d_sae * (d_in + d_out + 2) + d_out + (d_in * d_out if affine else 0))


def human_size(nbytes: int) -> str:
    """A size in decimal units, e.g. ``302.1 MB``."""
    size = float(nbytes)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"
