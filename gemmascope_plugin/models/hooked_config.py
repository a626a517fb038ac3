"""What the two model classes need of a transformers Gemma: a text model, and a config.

1. The multimodal checkpoints (Gemma 3 from 4B on) are cut down to their text tower, a
   ``Gemma3ForCausalLM`` on the same tensors; the vision part is let go.
2. ``HookedTransformer.from_pretrained`` looks Gemma's dimensions up by model *name* and cannot load
   any other shape, so the config is written out here, field by field.
3. Those checkpoints stretch the rotary embedding of global layers by a linear factor, which
   ``HookedTransformer`` has a field for; any other kind of scaling is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gemmascope_plugin.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_ATTENTION = {"sliding_attention": "local", "full_attention": "global"}


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
