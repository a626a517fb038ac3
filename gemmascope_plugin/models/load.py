"""Loads a Gemma 2 or Gemma 3 text model so that Gemma Scope dictionaries fit it.

1. The name is resolved as ``find(model=...)`` does; ``4b-it`` is ``google/gemma-3-4b-it``.
2. transformers reads config, weights and tokenizer from a local folder, the cache or the hub; of a
   multimodal checkpoint the text tower is kept.
3. The weights go into a ``HookedTransformer`` (``backend="hooked"``) or are wrapped in a
   ``TransformerBridge`` (``backend="bridge"``). Nothing is folded or centred: the activations are
   those that Gemma Scope was trained on.
4. The parameters are frozen and the model is in eval mode.
5. On request, logits are compared with those of transformers (``parity.py``).

Cost: two copies of the weights for a moment with ``backend="hooked"``, one with ``"bridge"``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, get_args

import torch

from gemmascope_plugin.catalog.model_names import resolve_model
from gemmascope_plugin.catalog.tables import models
from gemmascope_plugin.errors import MissingFileError, ModelError, check_choice
from gemmascope_plugin.models.convert import hooked_config, text_tower
from gemmascope_plugin.models.parity import compare, fixed_tokens, last_logits
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.types import Backend

_SUPPORTED = ("gemma2", "gemma3_text", "gemma3")
_OWNER = "google/"
_BUNDLED = "gemma-2-tiny"


def load_model(
    name_or_path: str | Path,
    *,
    backend: Backend = "hooked",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    check_parity: bool = False,
) -> HookedModel:
    """A TransformerLens model with raw activations, ready for Gemma Scope.

    Args:
        name_or_path: Name on the hub (``google/gemma-2-2b``, ``gemma-2-2b``, ``2b``) or a local
            Hugging Face folder of any Gemma 2 or 3 config, multimodal ones included.
        backend: ``"hooked"`` for ``HookedTransformer``, ``"bridge"`` for ``TransformerBridge``.
        device: Where the weights go.
        dtype: Type of the weights.
        check_parity: Compare logits with transformers on a fixed sequence longer than the sliding
            window.

    Returns:
        The model, frozen, in eval mode; with ``check_parity`` the comparison, a ``Parity``, is its
        attribute ``gemmascope_parity``.

    Raises:
        MissingFileError: The files are neither local nor cached and cannot be downloaded.
        ModelError: The folder holds another architecture, or the comparison fails.
        UnknownNameError: An unknown backend, or a name that two models share.
    """
    check_choice("backend", backend, get_args(Backend))
    hf, tokenizer, name = _from_transformers(name_or_path, dtype)
    tokens = fixed_tokens(hf.config) if check_parity else None
    # Before the bridge takes the model over and changes it.
    reference = last_logits(hf, tokens) if tokens is not None else None
    build = hooked_from_hf if backend == "hooked" else bridge_from_hf
    model = build(hf, tokenizer, name)
    model = model.to(device, print_details=False).eval().requires_grad_(False)
    if tokens is not None and reference is not None:
        model.gemmascope_parity = compare(model, reference, tokens).check()
    return model


def hub_name(name: str) -> str:
    """The repository that a name means: ``2b`` and ``gemma-2-2b`` are ``google/gemma-2-2b``.

    Args:
        name: As typed; of another owner, or of no known model, it is taken literally.

    Returns:
        Owner and name.

    Raises:
        UnknownNameError: Two models share the name.
    """
    owner, slash, _ = name.rpartition("/")
    if slash and f"{owner}/" != _OWNER:
        return name
    gemmas = {known for known in models().values() if known.startswith(("gemma-2-", "gemma-3-"))}
    known = resolve_model(name, gemmas - {_BUNDLED})
    if known is None:
        return name if slash else f"{_OWNER}{name}"
    return f"{_OWNER}{known}"


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
    """Text model, tokenizer and short name; errors translated into ours."""
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoTokenizer

    folder = Path(name_or_path).expanduser()
    name = str(folder)
    if name.startswith(("/", ".", "~")) and not folder.is_dir():
        raise MissingFileError(
            f"There is no folder {name!r}",
            fix="the folder that save_pretrained() wrote, or a name on the hub like gemma-2-2b",
        )
    source = name if folder.is_dir() else hub_name(name)
    try:
        config = AutoConfig.from_pretrained(source)
        if config.model_type not in _SUPPORTED:
            raise ModelError(
                f"{name!r} is a {config.model_type!r} model",
                exists="support for " + " and ".join(_SUPPORTED),
                fix="a Gemma 2 or Gemma 3 model",
            )
        tokenizer = AutoTokenizer.from_pretrained(source)
        with _no_weight_bar() if folder.is_dir() else nullcontext():
            hf = _weights(source, config, dtype)
    except (OSError, ValueError, SafetensorError) as error:
        raise _unreadable(name, source, folder, error) from error
    return hf, tokenizer, Path(source).name


def _weights(source: str, config: Any, dtype: torch.dtype) -> Any:
    """The text model on the CPU."""
    from transformers import AutoModelForCausalLM, Gemma3ForConditionalGeneration

    nested = config.model_type == "gemma3"
    model_class: Any = Gemma3ForConditionalGeneration if nested else AutoModelForCausalLM
    return text_tower(model_class.from_pretrained(source, dtype=dtype, attn_implementation="eager"))


def _unreadable(name: str, source: str, folder: Path, error: Exception) -> MissingFileError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if name == _BUNDLED:
        fix = "gemmascope_plugin.tiny().model, which ships with the package"
    elif folder.is_dir():
        fix = "a folder with config.json, the tokenizer and whole *.safetensors files"
    else:
        from huggingface_hub import constants

        offline = "in a shell without HF_HUB_OFFLINE, " if constants.HF_HUB_OFFLINE else ""
        fix = (
            f"{offline}`hf download {source}` with access to it (hf auth login), "
            "or a local Hugging Face folder"
        )
    return MissingFileError(f"The model {name!r} could not be read ({reason})", fix=fix)


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
