"""Loads a Gemma 2 or Gemma 3 text model so that Gemma Scope dictionaries fit it.

1. transformers reads config, weights and tokenizer from a local folder, the cache or the hub.
2. The weights go into a ``HookedTransformer`` (``backend="hooked"``) or are wrapped in a
   ``TransformerBridge`` (``backend="bridge"``). Nothing is folded or centred: the activations are
   those that Gemma Scope was trained on.
3. The parameters are frozen and the model is in eval mode.

Cost: two copies of the weights for a moment with ``backend="hooked"``, one with ``"bridge"``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, get_args

import torch

from gemmascope_plugin.errors import MissingFileError, ModelError, check_choice
from gemmascope_plugin.models.convert import hooked_config
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.types import Backend

_SUPPORTED = ("gemma2", "gemma3_text")


def load_model(
    name_or_path: str | Path,
    *,
    backend: Backend = "hooked",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> HookedModel:
    """A TransformerLens model with raw activations, ready for Gemma Scope.

    Args:
        name_or_path: Name on the hub (``gemma-2-2b`` or ``google/gemma-2-2b``) or a local Hugging
            Face folder of any Gemma 2 or 3 text config.
        backend: ``"hooked"`` for ``HookedTransformer``, ``"bridge"`` for ``TransformerBridge``.
        device: Where the weights go.
        dtype: Type of the weights.

    Returns:
        The model, frozen, in eval mode.

    Raises:
        MissingFileError: The files are neither local nor cached and cannot be downloaded.
        ModelError: The folder holds another architecture.
        UnknownNameError: An unknown backend.
    """
    check_choice("backend", backend, get_args(Backend))
    hf, tokenizer, name = _from_transformers(name_or_path, dtype)
    build = hooked_from_hf if backend == "hooked" else bridge_from_hf
    model = build(hf, tokenizer, name)
    return model.to(device, print_details=False).eval().requires_grad_(False)


def hooked_from_hf(hf: Any, tokenizer: Any, name: str) -> Any:
    """Copies a transformers Gemma model into a ``HookedTransformer``, unfolded."""
    from transformer_lens import HookedTransformer
    from transformer_lens.pretrained.weight_conversions import convert_gemma_weights

    config = hooked_config(hf.config, name)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        model = HookedTransformer(config, tokenizer=tokenizer, move_to_device=False)
    model = model.to(hf.dtype, print_details=False)
    # Several converted tensors are views of hf's parameters; processing works in place.
    state = {k: v.detach().clone() for k, v in convert_gemma_weights(hf, config).items()}
    model.load_and_process_state_dict(
        state,
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,  # would shift soft-capped logits
        fold_value_biases=False,
    )
    return model.eval().requires_grad_(False)


def bridge_from_hf(hf: Any, tokenizer: Any, name: str) -> Any:
    """Wraps a transformers Gemma model, which is taken over, in a ``TransformerBridge``."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    bridge = build_bridge_from_module(
        hf, type(hf).__name__, hf_config=hf.config, tokenizer=tokenizer, model_name=name
    )
    # Freeze afterwards: TransformerLens 3.9 adds a trainable zero bias to the unembedding.
    return bridge.eval().requires_grad_(False)


def _from_transformers(name_or_path: str | Path, dtype: torch.dtype) -> tuple[Any, Any, str]:
    """Model, tokenizer and short name; errors translated into ours."""
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = Path(name_or_path)
    name = str(name_or_path)
    source = name if folder.is_dir() or "/" in name else f"google/{name}"
    try:
        config = AutoConfig.from_pretrained(source)
        if config.model_type not in _SUPPORTED:
            raise ModelError(
                f"{name!r} is a {config.model_type!r} model",
                exists="support for " + " and ".join(_SUPPORTED),
                fix="a Gemma 2 or a text-only Gemma 3 model",
            )
        tokenizer = AutoTokenizer.from_pretrained(source)
        with _no_weight_bar() if folder.is_dir() else nullcontext():
            hf = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, attn_implementation="eager"
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise MissingFileError(
            f"The model {name!r} could not be read ({str(error).splitlines()[0]})",
            fix=f"a local Hugging Face folder, or `hf download {source}` with access to it",
        ) from error
    return hf, tokenizer, folder.name


@contextmanager
def _no_weight_bar() -> Iterator[None]:
    """Hides transformers' bar over the tensors of local files; it would hide downloads as well."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
