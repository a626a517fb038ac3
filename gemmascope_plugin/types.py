"""Words that several floors share."""

from __future__ import annotations

from typing import Literal

Kind = Literal["sae", "transcoder", "crosscoder", "clt"]
"""What a dictionary maps: a tensor to itself, MLP input to MLP output, several layers at once."""

Site = Literal["res", "att", "mlp", "embedding"]
"""Where it lives: residual stream after a block, attention head outputs ``z``, MLP, embedding."""

Provenance = Literal["listed", "derived"]
"""Whether a path is known to exist or follows from the published pattern only."""

ErrorMode = Literal["keep", "drop", "detach"]
"""What a splice does with the reconstruction error."""

Backend = Literal["hooked", "bridge"]
"""TransformerLens model class: ``HookedTransformer`` or ``TransformerBridge``."""

Direction = Literal["denoising", "noising"]
"""Clean values into the corrupted run, or corrupted values into the clean run."""
