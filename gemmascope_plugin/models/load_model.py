"""Loads a Gemma 2 or Gemma 3 text model so that Gemma Scope dictionaries fit it.

1. ``weight_layout.py`` finds the files that a name, a folder or a GGUF file means.
2. ``transformers_model.py`` reads them, or takes a model that is in memory already; of a multimodal
   checkpoint the text tower is kept.
3. The weights go into a ``HookedTransformer`` (``backend="hooked"``) or are wrapped in a
   ``TransformerBridge`` (``backend="bridge"``). Nothing is folded or centred: the activations are
   those that Gemma Scope was trained on.
   ``HookedTransformer.from_pretrained`` looks Gemma's dimensions up by model *name* and cannot load any
   other shape, so its config is written out here, field by field. It has a field for the linear factor by
   which multimodal checkpoints stretch the rotary embedding of global layers; any other kind of scaling
   is refused.
4. The parameters are frozen and the model is in eval mode.
5. On request, logits are compared with those of transformers (``parity.py``).

Cost: what transformers' own loading costs; ``"hooked"`` holds the embedding twice, since TransformerLens
scales one copy. All other weights, the unembedding too, are the tensors that transformers read, seen in
TransformerLens' shapes, so that its passes need not copy them into transformers' layout and back.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

from gemmascope_plugin.arguments import as_device, as_dtype
from gemmascope_plugin.errors import ModelError, check_choice
from gemmascope_plugin.models.gate import gate
from gemmascope_plugin.models.parity import compare, fixed_tokens, last_logits
from gemmascope_plugin.models.protocol import HookedModel, device_of
from gemmascope_plugin.models.transformers_model import (
    TransformersModel,
    read_model,
    take_model,
)
from gemmascope_plugin.models.weight_layout import Source, find_weights
from gemmascope_plugin.types import Backend

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_TABLES = ("mask", "IGNORE", "rotary_sin", "rotary_cos")
"""What a ``HookedTransformer`` computes for itself."""
_ATTENTION = {"sliding_attention": "local", "full_attention": "global"}


@gate()
def load_model(
    name_or_path: str | Path | torch.nn.Module,
    *,
    backend: Backend = "hooked",
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "float32",
    source: Source = "auto",
    tokenizer: Any = "auto",
    check_parity: bool = False,
) -> HookedModel:
    """A TransformerLens model with raw activations, ready for Gemma Scope.

    Args:
        name_or_path: Name on the hub (``google/gemma-2-2b``, ``gemma-2-2b``, ``2b``), a local Hugging
            Face folder of any Gemma 2 or 3 config, multimodal ones included, a GGUF file, or a
            transformers model in memory. Of such a model ``"hooked"`` copies the weights and leaves it
            as it is; ``"bridge"`` takes it over: it is frozen, moved, and not to be used any more.
        backend: ``"hooked"`` for ``HookedTransformer``, ``"bridge"`` for ``TransformerBridge``.
        device: Where the weights go; ``"auto"`` for a GPU if there is one.
        dtype: Type of the weights, or its name.
        source: Which copy of a named model: ``"cache"``, the files of the hub that are here;
            ``"package"``, Gemma 3 270M from the extra ``[gemma]``, dequantised from 4 bits; ``"hub"``;
            ``"auto"``, the first of these that there is.
        tokenizer: A tokenizer; ``"auto"`` for the one beside the weights, None for prompts of ids only.
        check_parity: Compare logits with transformers on a fixed sequence longer than the sliding
            window.

    Returns:
        The model, frozen, in eval mode. Its attribute ``gemmascope_source`` says where the weights
        come from, ``gemmascope_eos_ids`` at which ids a text ends; with ``check_parity`` the
        comparison, a ``Parity``, is ``gemmascope_parity``.

    Raises:
        MissingFileError: The files are neither local nor cached and cannot be downloaded, or there is
            no tokenizer.
        MissingExtraError: The package was asked for, or a GGUF file, and the extra is not installed.
        ModelError: Another architecture, quantised weights, an adapter that is not merged, Gemma 3 in
            float16, or the comparison fails.
        UnknownNameError: An unknown backend, device, type or model, or a name that two models share.
        BadFileError: A GGUF file is damaged.

    Example:
        >>> from gemmascope_plugin.demo.tiny_suite import ASSETS, MODEL_FOLDER
        >>> model = gs.load_model(ASSETS / MODEL_FOLDER, backend="bridge", dtype="bfloat16")
        >>> type(model).__name__, model.cfg.n_layers
        ('TransformerBridge', 4)
    """
    check_choice("backend", backend, get_args(Backend))
    target, weight_type = as_device(device), as_dtype(dtype)
    is_in_memory = isinstance(name_or_path, torch.nn.Module)
    if is_in_memory:
        model = take_model(name_or_path, weight_type, tokenizer)
    else:
        model = read_model(find_weights(_path(name_or_path), source), weight_type, tokenizer)
    return _built(model, backend, target, weight_type, is_in_memory, check_parity)


def hooked_from_hf(
    hf: PreTrainedModel, tokenizer: Any, name: str, *, dtype: torch.dtype | None = None
) -> Any:
    """A ``HookedTransformer`` of a transformers Gemma model, unfolded.

    The model's weights are not copied where type and layout allow, and never changed.
    """
    from transformer_lens import HookedTransformer
    from transformer_lens.pretrained.weight_conversions import convert_gemma_weights

    config = hooked_config(hf.config, name)
    config.dtype = dtype or hf.dtype
    config.init_weights = False
    with warnings.catch_warnings(), _as_it_is(tokenizer):
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        model = HookedTransformer(config, tokenizer=tokenizer, move_to_device=False)
    with torch.no_grad():
        state = convert_gemma_weights(hf, config)
    state = {name: tensor.detach().to(config.dtype) for name, tensor in state.items()}
    report = model.load_state_dict(state, assign=True, strict=False)
    absent = [key for key in report.missing_keys if key.rpartition(".")[2] not in _TABLES]
    assert not absent and not report.unexpected_keys, (absent, report.unexpected_keys)
    # which tokens end a text
    model.generation_config = getattr(hf, "generation_config", None)  # pyright: ignore[reportArgumentType]
    return model.eval().requires_grad_(False)


def hooked_config(hf_config: PretrainedConfig, name: str) -> Any:
    """The TransformerLens config with the same mathematics as ``hf_config``."""
    from transformer_lens import HookedTransformerConfig

    is_gemma3 = hf_config.model_type == "gemma3_text"
    return HookedTransformerConfig(
        model_name=name,
        n_layers=hf_config.num_hidden_layers,
        d_model=hf_config.hidden_size,
        d_head=hf_config.head_dim,
        n_heads=hf_config.num_attention_heads,
        n_key_value_heads=hf_config.num_key_value_heads,
        d_mlp=hf_config.intermediate_size,
        d_vocab=hf_config.vocab_size,
        n_ctx=hf_config.max_position_embeddings,
        eps=hf_config.rms_norm_eps,
        act_fn=hf_config.hidden_activation,
        normalization_type="RMS",
        final_rms=True,
        gated_mlp=True,
        use_normalization_before_and_after=True,
        positional_embedding_type="rotary",
        rotary_dim=hf_config.head_dim,
        rotary_adjacent_pairs=False,
        use_attn_scale=True,
        attn_scale=hf_config.query_pre_attn_scalar**0.5,  # TransformerLens divides by it
        use_local_attn=True,
        window_size=hf_config.sliding_window,
        attn_types=[_ATTENTION[kind] for kind in hf_config.layer_types],
        attn_scores_soft_cap=hf_config.attn_logit_softcapping or -1.0,
        output_logits_soft_cap=hf_config.final_logit_softcapping or -1.0,
        original_architecture="Gemma3ForCausalLM" if is_gemma3 else "Gemma2ForCausalLM",
        device="cpu",
        **_rotary(hf_config, is_gemma3),
    )


def _rotary(hf_config: PretrainedConfig, is_gemma3: bool) -> dict[str, Any]:
    rope = hf_config.rope_parameters
    if not is_gemma3:
        _only(rope, "default")
        return {"rotary_base": int(rope["rope_theta"])}
    spread, local = rope["full_attention"], rope["sliding_attention"]
    _only(spread, "default", "linear")
    _only(local, "default")
    return {
        "rotary_base": int(spread["rope_theta"]),
        "rotary_base_local": int(local["rope_theta"]),
        "rotary_scaling_factor": float(spread.get("factor") or 1.0),
        "use_qk_norm": True,
    }


def _only(rope: dict[str, Any], *kinds: str) -> None:
    kind = rope.get("rope_type", "default")
    if kind not in kinds:
        raise ModelError(
            f"HookedTransformer cannot hold this model's scaled rotary embedding ({kind})",
            exists=" and ".join(kinds),
            fix='load_model(..., backend="bridge")',
        )


def bridge_from_hf(hf: PreTrainedModel, tokenizer: Any, name: str) -> Any:
    """Wraps a transformers Gemma model, which is taken over, in a ``TransformerBridge``."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    with _as_it_is(tokenizer):
        bridge = build_bridge_from_module(
            hf, type(hf).__name__, hf_config=hf.config, tokenizer=tokenizer, model_name=name
        )
    # Freeze afterwards: TransformerLens 3.9 adds a trainable zero bias to the unembedding.
    return bridge.eval().requires_grad_(False)


def _path(name_or_path: object) -> str | Path:
    if isinstance(name_or_path, (str, Path)) and str(name_or_path).strip():
        return name_or_path
    raise ModelError(
        f"load_model() got {type(name_or_path).__name__} {name_or_path!r:.60}",
        exists="names, folders, GGUF files, and transformers models in memory",
        fix='load_model("2b")',
    )


def _built(
    source: TransformersModel,
    backend: Backend,
    device: torch.device,
    dtype: torch.dtype,
    is_in_memory: bool,
    check_parity: bool,
) -> HookedModel:
    hf = source.hf
    tokens = fixed_tokens(hf.config) if check_parity else None
    # Before the bridge takes the model over and changes it.
    reference = last_logits(hf, tokens) if tokens is not None else None
    if backend == "hooked":
        model = hooked_from_hf(hf, source.tokenizer, source.name, dtype=dtype)
        if is_in_memory:
            _detach_from(model, hf)
    else:
        if is_in_memory:
            hf = hf.to(dtype)
            hf.set_attn_implementation("eager")
        model = bridge_from_hf(hf, source.tokenizer, source.name)
    if device_of(model) != device:  # thousands of modules are walked through
        model = model.to(device, print_details=False)
    model.gemmascope_source = source.origin
    model.gemmascope_eos_ids = source.end_ids
    if tokens is not None and reference is not None:
        model.gemmascope_parity = compare(model, reference, tokens).check()
    return model


def _detach_from(model: torch.nn.Module, hf: torch.nn.Module) -> None:
    """Gives a model its own copy of what it shares with another one, in the same layout."""
    shared = {parameter.untyped_storage().data_ptr() for parameter in hf.parameters()}
    for parameter in model.parameters():
        if parameter.untyped_storage().data_ptr() in shared:
            parameter.data = parameter.data.clone()


@contextmanager
def _as_it_is(tokenizer: Any) -> Iterator[None]:
    """While a model is built: a tokenizer that puts BOS first is said to do so, and little else.

    TransformerLens would read its files again to make sure of BOS, and copies its arguments, among them
    an object for each of Gemma's 6,414 special tokens.
    """
    if tokenizer is None or tokenizer.encode("") != [tokenizer.bos_token_id]:
        yield
        return
    arguments = {**tokenizer.init_kwargs, "add_bos_token": True}
    tokenizer.init_kwargs = {
        "name_or_path": arguments.get("name_or_path", ""),
        "add_bos_token": True,
    }
    try:
        yield
    finally:
        tokenizer.init_kwargs = arguments
