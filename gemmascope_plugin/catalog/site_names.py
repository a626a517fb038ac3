"""The words of the catalog: sites and their aliases, hook names, width labels, sizes.

A site is where a dictionary lives; the hook is the TransformerLens name of the tensor there.

1. A transcoder of Gemma Scope 1 reads the normalised MLP input *without* the gain of the norm
   (``ln2.hook_normalized``) and writes ``hook_mlp_out``, after the post-norm.  Transcoders and CLTs
   of Gemma Scope 2 write the same tensor and read the norm's output *with* the gain
   (``mlp.hook_in``; a model without that hook has it as the other tensor times the gain).
2. An attention dictionary reads the head outputs ``z``, heads flattened, before ``W_O``.
3. An embedding dictionary reads ``hook_embed``, which carries the factor sqrt(d_model).

Costs nothing: no imports beyond the standard library.
"""

from __future__ import annotations

from typing import Literal, get_args

from gemmascope_plugin.types import Kind, Site

Format = Literal["npz", "gemma-scope-2", "crosscoder", "clt", "sae_lens", "tree"]
"""File layout: Gemma Scope 1's archive; Gemma Scope 2's single file; its two layouts with one file
per layer; SAELens' own format; the checkpoints of the Tree SAE authors."""

L0Kind = Literal["measured", "target"]
Gain = Literal["without", "with"]

PARAMETER_FILES: dict[Format, str] = {
    "npz": "params.npz",
    "gemma-scope-2": "params.safetensors",
    "crosscoder": "params_layer_{}.safetensors",
    "clt": "params_layer_{}.safetensors",
    "sae_lens": "sae_weights.safetensors",
    "tree": "sae.safetensors",
}
"""Name of the parameter file, with a place for its number where there are several."""

CONFIG_FILES: dict[Format, str | None] = {
    "npz": None,
    "gemma-scope-2": "config.json",
    "crosscoder": "config.json",
    "clt": "config.json",
    "sae_lens": "cfg.json",
    "tree": "config.json",
}

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
"""Other names of a site; ``transcoder`` is not a site but a kind, see ``KIND_WORDS``."""

KIND_WORDS: dict[str, Kind] = {
    **dict.fromkeys(("transcoder", "transcoders"), "transcoder"),
    **dict.fromkeys(("crosscoder", "crosscoders"), "crosscoder"),
    **dict.fromkeys(("clt", "clts", "cross_layer_transcoder"), "clt"),
}
"""Words for a kind that are understood as a site, too."""

HOOKS: dict[tuple[Kind, Site], tuple[str, str]] = {
    ("sae", "res"): ("blocks.{layer}.hook_resid_post", "blocks.{layer}.hook_resid_post"),
    ("sae", "att"): ("blocks.{layer}.attn.hook_z", "blocks.{layer}.attn.hook_z"),
    ("sae", "mlp"): ("blocks.{layer}.hook_mlp_out", "blocks.{layer}.hook_mlp_out"),
    ("sae", "embedding"): ("hook_embed", "hook_embed"),
    ("transcoder", "mlp"): ("blocks.{layer}.ln2.hook_normalized", "blocks.{layer}.hook_mlp_out"),
}
"""Templates of (hook read, hook reconstructed) of Gemma Scope 1."""

GAINED_HOOK = "blocks.{layer}.mlp.hook_in"
"""What the transcoders and CLTs of Gemma Scope 2 read: the norm's output, gain included."""

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
GEMMA_SCOPE_2_PATH = "{folder}/layer_{{layer}}_width_{{width}}_l0_{{l0:.0f}}{ending}"
GEMMA_SCOPE_2_FOLDERS: dict[tuple[Kind, Site], str] = {
    ("sae", "res"): "resid_post",
    ("sae", "att"): "attn_out",
    ("sae", "mlp"): "mlp_out",
    ("transcoder", "mlp"): "transcoder",
}
"""Gemma Scope 2's folder of a kind and site."""


def standard_path(layer: int, width: str, l0: int | float) -> str:
    """Gemma Scope's folder of one dictionary, such as ``layer_20/width_16k/average_l0_71``."""
    return STANDARD_PATH.format(layer=layer, width=width, l0=l0)


def path_template(format: Format, kind: Kind, site: Site, *, affine: bool) -> str:
    """The folder of a dictionary, with places for ``layer``, ``width`` and ``l0``."""
    if format == "gemma-scope-2":
        folder = GEMMA_SCOPE_2_FOLDERS.get((kind, site), site)
        return GEMMA_SCOPE_2_PATH.format(folder=folder, ending="_affine" if affine else "")
    return EMBEDDING_PATH if site == "embedding" else STANDARD_PATH


def width_label(d_sae: int) -> str:
    """Gemma Scope's label of a number of features; the number itself where there is none."""
    return next((label for label, width in WIDTHS.items() if width == d_sae), str(d_sae))


def hooks(kind: Kind, site: Site, layer: int) -> tuple[str, str]:
    """TransformerLens names of the tensor read and the tensor reconstructed, of single layers."""
    read, write = HOOKS[kind, site]
    return read.format(layer=layer), write.format(layer=layer)


def at_layer(hook: str, layer: int, new_layer: int | str) -> str:
    """The same hook at another layer; hooks without a layer stay as they are."""
    return hook.replace(f"blocks.{layer}.", f"blocks.{new_layer}.")


def raw_nbytes(d_in: int, d_out: int, d_sae: int, *, affine: bool = False) -> int:
    """Size of the float32 parameters: both matrices, two feature vectors, one output bias."""
    return 4 * (d_sae * (d_in + d_out + 2) + d_out + (d_in * d_out if affine else 0))


def multi_layer_nbytes(d: int, d_sae: int, n_layers: int, *, affine: bool = False) -> int:
    """Size of the float32 parameters of a crosscoder or CLT with ``d_sae`` features in all.

    Every layer has its own encoder, and a decoder to each of the layers.
    """
    per_layer = d_sae // n_layers * (d * (1 + n_layers) + 2) + d + (d * d if affine else 0)
    return 4 * n_layers * per_layer
